// The common half of every Comm: argument checks, byte counting, and small helpers for control
// traffic.
#include "dist/comm.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "configs/check.h"

namespace graft::dist {
namespace {

constexpr int64_t kTextTag = -1;  // block numbers, the other tags, start at 0

int64_t bytes_of(const at::Tensor& t) { return static_cast<int64_t>(t.nbytes()); }

void check_contiguous(const at::Tensor& t, const char* call) {
  GRAFT_ASSERT(t.defined() && t.is_contiguous(), call, " needs a contiguous tensor");
}

void check_peer(const Comm& comm, int peer, const char* call) {
  GRAFT_ASSERT(peer >= 0 && peer < comm.size(), call, ": rank ", peer, " of ", comm.size());
}

at::Tensor text_tensor(const std::string& text) {
  at::Tensor t = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
  if (!text.empty()) std::memcpy(t.mutable_data_ptr(), text.data(), text.size());
  return t;
}

}  // namespace

void Comm::all_reduce(at::Tensor& t, Traffic traffic) {
  check_contiguous(t, "all_reduce");
  const at::ScalarType type = t.scalar_type();
  GRAFT_ASSERT(type == at::kFloat || type == at::kDouble || type == at::kLong,
               "all_reduce sums float32, float64 or int64, not ", at::toString(type));
  do_all_reduce(t);
  count(traffic, 2 * (size() - 1) * bytes_of(t) / size());
}

std::unique_ptr<Work> Comm::all_gather(const at::Tensor& shard, at::Tensor& out, Traffic traffic,
                                       int64_t tag) {
  check_contiguous(shard, "all_gather");
  check_contiguous(out, "all_gather");
  GRAFT_ASSERT(bytes_of(out) == size() * bytes_of(shard), "all_gather of ", bytes_of(shard),
               " bytes from ", size(), " ranks into ", bytes_of(out), " bytes");
  std::unique_ptr<Work> work = do_all_gather(shard, out, tag);
  count(traffic, (size() - 1) * bytes_of(shard));
  return work;
}

void Comm::all_to_all(const at::Tensor& in, at::Tensor& out, Traffic traffic) {
  check_contiguous(in, "all_to_all");
  check_contiguous(out, "all_to_all");
  GRAFT_ASSERT(in.dim() > 0 && in.size(0) % size() == 0 && bytes_of(in) == bytes_of(out),
               "all_to_all of ", in.sizes(), " into ", out.sizes(), " over ", size(), " ranks");
  do_all_to_all(in, out);
  count(traffic, bytes_of(in) / size() * (size() - 1));
}

void Comm::broadcast(at::Tensor& t, int root, Traffic traffic) {
  check_contiguous(t, "broadcast");
  check_peer(*this, root, "broadcast");
  do_broadcast(t, root);
  if (rank() != root) count(traffic, bytes_of(t));
}

void Comm::send(const at::Tensor& t, int to, Traffic) {
  check_contiguous(t, "send");
  check_peer(*this, to, "send");
  GRAFT_ASSERT(to != rank(), "rank ", to, " sends to itself");
  do_send(t, to);
}

void Comm::recv(at::Tensor& t, int from, Traffic traffic) {
  check_contiguous(t, "recv");
  check_peer(*this, from, "recv");
  GRAFT_ASSERT(from != rank(), "rank ", from, " receives from itself");
  do_recv(t, from);
  count(traffic, bytes_of(t));
}

void check_in_step(const char* what, const std::vector<int64_t>& values) {
  const auto same = [&](int64_t value) { return value == values[0]; };
  if (std::all_of(values.begin(), values.end(), same)) return;
  std::string list;
  for (size_t r = 0; r < values.size(); ++r) {
    list += detail::concat(r ? ", " : "", "rank ", r, ": ", values[r]);
  }
  throw Error(ExitCode::kBug, detail::concat("ranks are out of step in all_gather, their ", what,
                                             " differ: ", list));
}

std::string broadcast_text(Comm& comm, const std::string& text, int root) {
  at::Tensor size = at::full({1}, static_cast<int64_t>(text.size()), at::kLong);
  comm.broadcast(size, root, Traffic::kControl);
  at::Tensor bytes =
      comm.rank() == root ? text_tensor(text) : at::empty({size.item<int64_t>()}, at::kByte);
  comm.broadcast(bytes, root, Traffic::kControl);
  return {static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()};
}

std::vector<std::string> gather_texts(Comm& comm, const std::string& text) {
  at::Tensor sizes = at::empty({comm.size()}, at::kLong);
  comm.all_gather(at::full({1}, static_cast<int64_t>(text.size()), at::kLong), sizes,
                  Traffic::kControl, kTextTag)
      ->wait();
  const int64_t longest = sizes.max().item<int64_t>();
  const at::Tensor mine =
      at::constant_pad_nd(text_tensor(text), {0, longest - static_cast<int64_t>(text.size())});
  at::Tensor all = at::empty({comm.size(), longest}, at::kByte);
  comm.all_gather(mine, all, Traffic::kControl, kTextTag)->wait();
  std::vector<std::string> texts;
  for (int64_t r = 0; r < comm.size(); ++r) {
    const char* row = static_cast<const char*>(all.const_data_ptr()) + r * longest;
    texts.emplace_back(row, sizes[r].item<int64_t>());
  }
  return texts;
}

bool agree(Comm& comm, bool ok) {
  at::Tensor failures = at::full({1}, ok ? 0 : 1, at::kLong);
  comm.all_reduce(failures, Traffic::kControl);
  return failures.item<int64_t>() == 0;
}

}  // namespace graft::dist
