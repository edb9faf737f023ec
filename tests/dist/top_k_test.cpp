// The global top-k against a stable sort of everything in one place.
#include "dist/top_k.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <mutex>

#include "configs/check.h"
#include "dist/comm_factory.h"

namespace graft::dist {
namespace {

/// Three vectors; every fourth score is one of two values, so that ties lie on both sides of cuts.
std::vector<at::Tensor> vectors() {
  std::vector<at::Tensor> all;
  for (const int64_t n : {90, 1, 257}) {
    at::Tensor v = at::arange(n * 7, n * 8).mul(37).remainder(101).to(at::kFloat).div(101);
    v.slice(0, 0, n, 4).fill_(0.5);
    v.slice(0, 1, n, 8).zero_();
    all.push_back(v);
  }
  return all;
}

/// Whether each vector's elements are chosen, by a stable sort of their concatenation.
std::vector<at::Tensor> by_sorting(const std::vector<at::Tensor>& all, int64_t k) {
  const at::Tensor order = std::get<1>(at::cat(all).sort(/*stable=*/true, 0, /*descending=*/true));
  at::Tensor chosen = at::zeros({order.numel()}, at::kBool);
  chosen.index_fill_(0, order.slice(0, 0, k), true);
  std::vector<at::Tensor> places;
  int64_t at = 0;
  for (const at::Tensor& v : all) {
    places.push_back(chosen.narrow(0, at, v.numel()).nonzero().squeeze(1));
    at += v.numel();
  }
  return places;
}

/// Cuts that differ from vector to vector; a rank may have nothing of one.
std::vector<Slice> cut(int64_t numel, int world, int64_t shift) {
  std::vector<Slice> slices;
  int64_t begin = 0;
  for (int r = 0; r < world; ++r) {
    const int64_t end = r + 1 == world ? numel : std::min(numel, numel * (r + 1) / world + shift);
    slices.push_back({begin, end});
    begin = end;
  }
  return slices;
}

TEST(GlobalTopK, IsTheStableSortsAtAnyWorldSize) {
  const auto all = vectors();
  std::mutex mutex;
  for (const int world : {1, 2, 3, 4}) {
    for (const int64_t k : {1, 20, 87, 100, 200, 348}) {
      const auto expected = by_sorting(all, k);
      run_virtual_ranks(world, [&](Comm& comm) {
        std::vector<CutVector> cuts;
        for (size_t i = 0; i < all.size(); ++i) {
          // The last vector is whole on every rank.
          const auto slices = i == 2 ? std::vector<Slice>{{0, 257}}
                                     : cut(all[i].numel(), world, static_cast<int64_t>(i) + 3);
          const Slice own = slices[i == 2 ? 0 : static_cast<size_t>(comm.rank())];
          cuts.push_back({all[i].numel(), slices, all[i].slice(0, own.begin, own.end).clone()});
        }
        const auto places = global_top_k(comm, cuts, k);
        const std::lock_guard lock(mutex);
        for (size_t i = 0; i < all.size(); ++i)
          EXPECT_TRUE(at::equal(places[i], expected[i])) << "vector " << i << ", k " << k;
      });
    }
  }
}

TEST(GlobalTopK, MoreThanThereAreAreRefused) {
  const auto comm = make_single_comm();
  const CutVector v{3, {{0, 3}}, at::ones({3})};
  EXPECT_THROW(global_top_k(*comm, {&v, 1}, 4), Error);
}

}  // namespace
}  // namespace graft::dist
