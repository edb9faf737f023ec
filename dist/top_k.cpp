#include "dist/top_k.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "configs/check.h"
#include "dist/comm.h"
#include "kernels/select/select.h"

namespace graft::dist {
namespace {

constexpr int64_t kPlacesTag = -3;  // of this all_gather, as tree_reduce has its own

size_t part_of(const CutVector& v, const Comm& comm) {
  return v.slices.size() == 1 ? 0 : static_cast<size_t>(comm.rank());
}

/// Of a vector that every rank has whole, rank 0 counts.
bool counts_here(const CutVector& v, const Comm& comm) {
  return v.slices.size() > 1 || comm.rank() == 0;
}

/// The bits of the k-th largest score, and how many of the scores with these bits are among the k.
struct Threshold {
  int64_t bits = 0, num_ties = 0;
};

Threshold find_threshold(Comm& comm, std::span<const CutVector> scores, int64_t k) {
  Threshold found{0, k};
  for (const kernels::Digit digit : kernels::kDigits) {
    at::Tensor counts = at::zeros({digit.num_values()}, scores[0].mine.options().dtype(at::kLong));
    for (const CutVector& v : scores) {
      if (counts_here(v, comm))
        counts += kernels::digit_counts(v.mine, digit, static_cast<uint32_t>(found.bits));
    }
    comm.all_reduce(counts, Traffic::kControl);
    counts = counts.cpu();
    int64_t value = digit.num_values() - 1;
    for (; counts.const_data_ptr<int64_t>()[value] < found.num_ties; --value) {
      found.num_ties -= counts.const_data_ptr<int64_t>()[value];
      GRAFT_ASSERT(value > 0, "fewer scores than were counted");
    }
    found.bits |= value << digit.shift;
  }
  return found;
}

/// Everyone gets the places of all ranks: of each vector, slice by slice.
std::vector<at::Tensor> gather_places(Comm& comm, std::span<const CutVector> scores,
                                      const std::vector<at::Tensor>& mine) {
  const int64_t world = comm.size(), num = static_cast<int64_t>(scores.size());
  at::Tensor counts = at::zeros({world, num}, at::kLong);
  for (int64_t i = 0; i < num; ++i) counts[comm.rank()][i] = mine[static_cast<size_t>(i)].numel();
  const at::Device device = scores[0].mine.device();
  counts = counts.to(device);
  comm.all_reduce(counts, Traffic::kControl);
  counts = counts.cpu();
  const int64_t most = counts.sum(1).max().item<int64_t>();
  const at::Tensor all_mine = at::cat(mine);
  const at::Tensor sent = at::constant_pad_nd(all_mine, {0, most - all_mine.numel()}).contiguous();
  at::Tensor received = at::empty({world, most}, sent.options());
  if (most > 0) comm.all_gather(sent, received, Traffic::kControl, kPlacesTag)->wait();
  std::vector<int64_t> at(static_cast<size_t>(world), 0);
  std::vector<at::Tensor> places;
  for (int64_t i = 0; i < num; ++i) {
    std::vector<at::Tensor> parts;
    for (int64_t r = 0; r < world; ++r) {
      const int64_t count = counts[r][i].item<int64_t>();
      parts.push_back(received[r].narrow(0, at[static_cast<size_t>(r)], count));
      at[static_cast<size_t>(r)] += count;
    }
    places.push_back(at::cat(parts));
  }
  return places;
}

}  // namespace

std::vector<at::Tensor> global_top_k(Comm& comm, std::span<const CutVector> scores, int64_t k) {
  int64_t total = 0;
  for (const CutVector& v : scores) total += v.numel;
  GRAFT_CHECK(0 < k && k <= total, "the ", k, " largest of ", total, " scores were asked for");
  const Threshold threshold = find_threshold(comm, scores, k);

  // Ties in the order of vectors and slices: each slice learns how many come before it.
  const int64_t world = comm.size();
  at::Tensor ties = at::zeros({static_cast<int64_t>(scores.size()), world}, at::kLong);
  std::vector<at::Tensor> bits;
  for (size_t i = 0; i < scores.size(); ++i) {
    bits.push_back(kernels::score_bits(scores[i].mine));
    if (counts_here(scores[i], comm))
      ties[static_cast<int64_t>(i)][comm.rank()] = bits[i].eq(threshold.bits).sum().cpu();
  }
  ties = ties.to(scores[0].mine.device());
  comm.all_reduce(ties, Traffic::kControl);
  ties = ties.cpu();
  const at::Tensor before = ties.flatten().cumsum(0).view_as(ties) - ties;

  std::vector<at::Tensor> mine;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (!counts_here(scores[i], comm)) {
      mine.push_back(at::empty({0}, bits[i].options()));
      continue;
    }
    const int64_t left =
        threshold.num_ties - before[static_cast<int64_t>(i)][comm.rank()].item<int64_t>();
    const at::Tensor tied = bits[i].eq(threshold.bits);
    const at::Tensor chosen =
        bits[i].gt(threshold.bits).logical_or(tied.logical_and(tied.cumsum(0).le(left)));
    mine.push_back(chosen.nonzero().squeeze(1) + scores[i].slices[part_of(scores[i], comm)].begin);
  }
  return gather_places(comm, scores, mine);
}

}  // namespace graft::dist
