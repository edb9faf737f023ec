#include "tests/dist/comm_contract.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "configs/check.h"

namespace graft::dist::testing {
namespace {

/// Runs `call` and checks the bytes it adds to the count of kReduced.
template <class Call>
void expect_bytes(Comm& comm, int64_t bytes, Call call) {
  const int64_t before = comm.bytes(Traffic::kReduced);
  call();
  EXPECT_EQ(comm.bytes(Traffic::kReduced) - before, bytes);
}

at::Tensor multiples(int64_t factor, int64_t count, at::TensorOptions options) {
  return (at::arange(count, at::kLong) * factor).to(options);
}

}  // namespace

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() &&
         at::equal(a.contiguous().view(at::kByte), b.contiguous().view(at::kByte));
}

void expect_sums(Comm& comm, at::Device device) {
  const int64_t world = comm.size();
  for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kLong}) {
    const auto options = at::TensorOptions().dtype(type).device(device);
    at::Tensor t = multiples(comm.rank() + 1, 1001, options);
    expect_bytes(comm, 2 * (world - 1) * static_cast<int64_t>(t.nbytes()) / world,
                 [&] { comm.all_reduce(t, Traffic::kReduced); });
    EXPECT_TRUE(same_bits(t, multiples(world * (world + 1) / 2, 1001, options)));
  }
  at::Tensor half = at::zeros({4}, at::TensorOptions().dtype(at::kBFloat16).device(device));
  EXPECT_THROW(comm.all_reduce(half, Traffic::kReduced), Error);
}

void expect_gathers(Comm& comm, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kInt).device(device);
  const at::Tensor mine = multiples(comm.rank() + 1, 300, options);
  at::Tensor first = at::zeros({comm.size(), 300}, options);
  at::Tensor second = at::zeros_like(first);
  expect_bytes(comm, (comm.size() - 1) * 2400, [&] {  // two under way at once, as a prefetch is
    const auto a = comm.all_gather(mine, first, Traffic::kReduced, 5);
    const auto b = comm.all_gather(mine, second, Traffic::kReduced, 6);
    a->wait();
    b->wait();
  });
  for (int64_t r = 0; r < comm.size(); ++r) {
    EXPECT_TRUE(same_bits(first[r], multiples(r + 1, 300, options))) << "from rank " << r;
  }
  EXPECT_TRUE(same_bits(first, second));
}

void expect_exchanges(Comm& comm, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  std::vector<at::Tensor> sent, expected;
  for (int64_t r = 0; r < comm.size(); ++r) {
    sent.push_back(multiples(100 * (comm.rank() + 1) + r, 7, options));
    expected.push_back(multiples(100 * (r + 1) + comm.rank(), 7, options));
  }
  at::Tensor out = at::zeros({comm.size(), 7}, options);
  expect_bytes(comm, (comm.size() - 1) * 28,
               [&] { comm.all_to_all(at::stack(sent), out, Traffic::kReduced); });
  EXPECT_TRUE(same_bits(out, at::stack(expected)));
}

void expect_broadcasts(Comm& comm, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  const int root = comm.size() - 1;
  at::Tensor t = multiples(comm.rank() + 1, 50, options);
  expect_bytes(comm, comm.rank() == root ? 0 : 200,
               [&] { comm.broadcast(t, root, Traffic::kReduced); });
  EXPECT_TRUE(same_bits(t, multiples(root + 1, 50, options)));
}

void expect_messages(Comm& comm, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  constexpr int64_t kCount = 100'000;  // too long for MPI's eager path
  if (comm.rank() > 0) {
    expect_bytes(comm, 0, [&] {
      comm.send(multiples(comm.rank() + 1, kCount, options), 0, Traffic::kReduced);
    });
    return;
  }
  for (int from = 1; from < comm.size(); ++from) {
    at::Tensor t = at::zeros({kCount}, options);
    expect_bytes(comm, 4 * kCount, [&] { comm.recv(t, from, Traffic::kReduced); });
    EXPECT_TRUE(same_bits(t, multiples(from + 1, kCount, options)));
  }
}

void expect_out_of_step_gather_throws(Comm& comm, at::Device device) {
  const at::Tensor mine = at::ones({64}, at::TensorOptions().device(device));
  at::Tensor all = at::zeros({comm.size(), 64}, mine.options());
  const bool late = comm.rank() == comm.size() - 1;
  try {
    comm.all_gather(mine, all, Traffic::kGathered, late ? 3 : 4)->wait();
    ADD_FAILURE() << "rank " << comm.rank() << " did not notice";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kBug);
    EXPECT_NE(std::string(error.what()).find("rank 0: 4"), std::string::npos) << error.what();
  }
}

void expect_texts(Comm& comm) {
  const std::string mine(comm.rank() * 3, static_cast<char>('a' + comm.rank()));
  const std::vector<std::string> texts = gather_texts(comm, mine);
  ASSERT_EQ(texts.size(), static_cast<size_t>(comm.size()));
  for (int r = 0; r < comm.size(); ++r) {
    EXPECT_EQ(texts[r], std::string(r * 3, static_cast<char>('a' + r)));
  }
  const int root = comm.size() - 1;
  EXPECT_EQ(broadcast_text(comm, mine, root), std::string(root * 3, static_cast<char>('a' + root)));
  EXPECT_TRUE(agree(comm, true));
  EXPECT_FALSE(agree(comm, comm.rank() != root));
}

void expect_contract(Comm& comm, at::Device device) {
  expect_sums(comm, device);
  expect_gathers(comm, device);
  expect_exchanges(comm, device);
  expect_broadcasts(comm, device);
  expect_messages(comm, device);
  if (comm.size() > 1) expect_out_of_step_gather_throws(comm, device);
  if (device.is_cpu()) expect_texts(comm);
  comm.barrier();
}

}  // namespace graft::dist::testing
