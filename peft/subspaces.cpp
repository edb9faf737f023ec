#include "peft/subspaces.h"

#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/projection.h"

namespace graft::peft {

std::pair<Tensor, Tensor> singular_vectors(const Tensor& w, int64_t r, int seed) {
  constexpr int kIterations = 2;
  const bool is_wide = w.size(0) < w.size(1);
  const Tensor m = is_wide ? w.t() : w;
  const auto generator = torch_generator(static_cast<uint64_t>(seed));
  const auto basis_of = [](const Tensor& t) { return std::get<0>(at::linalg_qr(t)); };
  Tensor q = basis_of(m.mm(at::randn({m.size(1), r}, generator, m.options())));
  for (int i = 0; i < kIterations; ++i) q = basis_of(m.mm(basis_of(m.t().mm(q))));
  const auto [u, s, vh] = at::linalg_svd(q.t().mm(m), /*full_matrices=*/false);
  if (is_wide) return {vh.t(), q.mm(u).t()};
  return {q.mm(u), vh};
}

Tensor clusters_of(const Tensor& rows, int64_t count, int seed) {
  constexpr int kIterations = 10;  // PEFT's
  const auto places = first_of_randperm(rows.size(0), count, static_cast<uint64_t>(seed));
  Tensor centres = rows.index_select(0, places), nearest;
  for (int i = 0; i < kIterations; ++i) {
    nearest = at::cdist(rows, centres).argmin(1);
    const Tensor members = at::one_hot(nearest, count).to(rows.scalar_type());
    const Tensor sizes = members.sum(0).unsqueeze(1);
    centres = at::where(sizes > 0, members.t().mm(rows) / sizes.clamp_min(1), centres);
  }
  return nearest;
}

SubspaceScores::SubspaceScores(Tensor a, Tensor b, const Tensor& subspaces, int64_t count,
                               const std::string& slot)
    : count_(count),
      subspaces_(subspaces, count, slot + ": adamss_subspaces"),
      factors_{std::move(a), std::move(b)} {
  for (size_t i = 0; i < factors_.size(); ++i) {
    importance_[i] = at::zeros_like(factors_[i].detach());
    deviation_[i] = at::zeros_like(factors_[i].detach());
  }
  active_ = at::ones({count}, importance_[0].options());
}

void SubspaceScores::list(AttachContext& context, const LinearSite& site) const {
  const auto list_one = [&](const std::string& leaf, const Tensor& value) {
    context.params.add(Constant{context.prefix + site.name + "." + leaf,
                                "graft.adamss." + site.hf_path + "." + leaf, value, true});
  };
  list_one("A.importance", importance_[0]), list_one("B.importance", importance_[1]);
  list_one("A.deviation", deviation_[0]), list_one("B.deviation", deviation_[1]);
  list_one("active", active_);
}

void SubspaceScores::update(double beta1, double beta2) const {
  for (size_t i = 0; i < factors_.size(); ++i) {
    const Tensor score = (factors_[i] * factors_[i].grad()).abs();
    deviation_[i].mul_(beta2).add_((score - importance_[i]).abs(), 1 - beta2);
    importance_[i].mul_(beta1).add_(score, 1 - beta1);
  }
}

void SubspaceScores::keep_best(const std::vector<SubspaceScores*>& slots, int64_t target) {
  std::vector<Tensor> scores, active;
  for (const SubspaceScores* slot : slots) {
    scores.push_back(slot->of_subspaces());
    active.push_back(slot->active_);
  }
  const Tensor left = at::cat(scores).masked_select(at::cat(active) > 0);
  if (target < left.numel()) {
    const Tensor threshold = -std::get<0>(left.neg().kthvalue(target));
    for (size_t i = 0; i < slots.size(); ++i) slots[i]->active_.mul_(scores[i] > threshold);
  }
  for (const SubspaceScores* slot : slots) {
    for (const auto* sums : {&slot->importance_, &slot->deviation_}) {
      for (const Tensor& sum : *sums) sum.zero_();
    }
  }
}

void SubspaceScores::hold() {
  for (size_t i = 0; i < factors_.size(); ++i) {
    held_[i] = factors_[i].detach().clone();
    factors_[i].grad().mul_(moves(i));
  }
}

void SubspaceScores::restore() const {
  for (size_t i = 0; i < factors_.size(); ++i)
    factors_[i].copy_(at::where(moves(i) > 0, factors_[i], held_[i]));
}

Tensor SubspaceScores::of_subspaces() const {
  const Tensor a = importance_[0] * deviation_[0], b = importance_[1] * deviation_[1];
  const Tensor member = members();
  return a.view({count_, -1}).mean(1) + member.t().mv(b.mean(1)) / member.sum(0).clamp_min(1);
}

Tensor SubspaceScores::members() const {
  return at::one_hot(subspaces_.checked(), count_).to(at::kFloat);
}

/// 1 or 0 for each row of a factor.
Tensor SubspaceScores::moves(size_t i) const {
  const Tensor rows =
      i == 0 ? active_.repeat_interleave(factors_[1].size(1)) : members().mv(active_);
  return rows.unsqueeze(1);
}

}  // namespace graft::peft
