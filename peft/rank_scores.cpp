#include "peft/rank_scores.h"

#include <ATen/ATen.h>

namespace graft::peft {

RankScores::RankScores(std::array<Tensor, 3> factors) : factors_(std::move(factors)) {
  for (size_t i = 0; i < factors_.size(); ++i) {
    importance_[i] = at::zeros_like(factors_[i].detach());
    deviation_[i] = at::zeros_like(factors_[i].detach());
  }
  chosen_ = at::ones_like(factors_[2].detach());
}

void RankScores::list(AttachContext& context, const LinearSite& site) const {
  const auto list_one = [&](const std::string& leaf, const Tensor& value) {
    context.params.add(Constant{context.prefix + site.name + "." + leaf,
                                "graft.adalora." + site.hf_path + "." + leaf, value, true});
  };
  constexpr const char* kLeaves[] = {"lora_A", "lora_B", "lora_E"};
  for (size_t i = 0; i < factors_.size(); ++i) {
    list_one(std::string(kLeaves[i]) + ".importance", importance_[i]);
    list_one(std::string(kLeaves[i]) + ".deviation", deviation_[i]);
  }
  list_one("chosen", chosen_);
}

void RankScores::update(double beta1, double beta2) const {
  for (size_t i = 0; i < factors_.size(); ++i) {
    const Tensor sensitivity = (factors_[i] * factors_[i].grad()).abs();
    importance_[i].mul_(beta1).add_(sensitivity, 1 - beta1);
    deviation_[i].mul_(beta2).add_((sensitivity - importance_[i]).abs(), 1 - beta2);
  }
}

Tensor RankScores::of_rows() const {
  const auto of = [&](size_t i) { return importance_[i] * deviation_[i]; };
  return of(2).flatten() + of(0).mean(1) + of(1).mean(0);
}

void RankScores::choose(const Tensor& threshold) const {
  chosen_.copy_((of_rows() > threshold).unsqueeze(1));
}

void RankScores::keep_chosen() const { factors_[2].mul_(chosen_); }

}  // namespace graft::peft
