#include "peft/eva.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace graft::peft {

void IncrementalPca::fit(Tensor x) {
  const int64_t n = x.size(0);
  if (stands_still_ || n < count_) return;
  const Tensor x64 = x.to(at::kDouble);
  const Tensor mean = x64.mean(0);
  const Tensor spread = (x64 - mean).square().sum(0);
  Tensor rows = (x64 - mean).to(at::kFloat);
  const Tensor before = components_;
  if (seen_ == 0) {
    mean_ = mean, variance_ = spread;
  } else {
    const auto seen = static_cast<double>(seen_), all = seen + static_cast<double>(n);
    const double weight = seen * static_cast<double>(n) / all;
    const Tensor shift = mean_ - mean;
    rows = at::cat({singular_values_.unsqueeze(1) * components_, rows,
                    (std::sqrt(weight) * shift).to(at::kFloat).unsqueeze(0)});
    variance_ = variance_ + spread + weight * shift.square();
    mean_ = (mean_ * seen + mean * static_cast<double>(n)) / all;
  }
  seen_ += n;
  const auto [u, s, vt] = at::linalg_svd(rows, /*full_matrices=*/false);
  // The largest element of a direction is positive, whatever the sign the decomposition gave it.
  const Tensor largest = vt.gather(1, vt.abs().argmax(1, /*keepdim=*/true));
  components_ = (vt * largest.sign()).slice(0, 0, count_).contiguous();
  singular_values_ = s.slice(0, 0, count_).contiguous();
  if (before.defined())
    stands_still_ = at::cosine_similarity(components_, before, 1).ge(tau_).all().item<bool>();
}

Tensor IncrementalPca::explained_variance_ratio() const {
  return (singular_values_.to(at::kDouble).square() / variance_.sum()).to(at::kFloat);
}

std::vector<int> share_ranks(const std::vector<Tensor>& ratios, int64_t budget) {
  std::vector<size_t> slot_of;
  std::vector<float> ratio_of;
  for (size_t i = 0; i < ratios.size(); ++i) {
    for (int64_t k = 0; k < ratios[i].size(0); ++k) {
      slot_of.push_back(i);
      ratio_of.push_back(ratios[i][k].item<float>());
    }
  }
  std::vector<size_t> order(slot_of.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return ratio_of[a] > ratio_of[b]; });
  std::vector<int> ranks(ratios.size());
  for (size_t k = 0; k < std::min(order.size(), static_cast<size_t>(budget)); ++k)
    ++ranks[slot_of[order[k]]];
  return ranks;
}

}  // namespace graft::peft
