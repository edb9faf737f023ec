#include "peft/rank_scores.h"

#include <ATen/ATen.h>

#include <cmath>

namespace graft::peft {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

class Scored : public torch::autograd::Function<Scored> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& y, const Tensor& x, const Tensor& a,
                        const Tensor& b, const Tensor& score) {
    context->save_for_backward({x, a, b, score});
    return y.clone();  // others may add to it in place
  }
  static tensor_list backward(AutogradContext* context, tensor_list gradients) {
    const auto saved = context->get_saved_variables();
    const Tensor x = saved[0].flatten(0, -2);
    const Tensor &a = saved[1], &b = saved[2];
    const Tensor dy = gradients[0].flatten(0, -2);
    constexpr int64_t kRows = 256;  // of D at a time
    Tensor sum = at::zeros_like(saved[3]);
    for (int64_t row = 0; row < b.size(0); row += kRows) {
      const Tensor update = b.slice(0, row, row + kRows).mm(a);
      const Tensor gradient = dy.slice(1, row, row + kRows).t().mm(x);
      sum += (update * gradient.to(at::kFloat)).abs().sum();
    }
    sum *= kScoreShrink / std::sqrt(static_cast<double>(b.size(0) * a.size(1)));
    return {gradients[0], Tensor(), Tensor(), Tensor(), sum};
  }
};

}  // namespace

void smooth_score(const Tensor& score, const SmoothScore& smooth, double beta1, double beta2) {
  smooth.importance.mul_(beta1).add_(score, 1 - beta1);
  smooth.deviation.mul_(beta2).add_((score - smooth.importance).abs(), 1 - beta2);
}

Tensor scored(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
              const Tensor& score) {
  return Scored::apply(y, x, a, b, score);
}

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
    smooth_score(sensitivity, {importance_[i], deviation_[i]}, beta1, beta2);
  }
}

Tensor RankScores::of_rows() const {
  const auto of = [&](size_t i) { return importance_[i] * deviation_[i]; };
  return of(2).flatten() + of(0).mean(1) + of(1).mean(0);
}

void RankScores::choose(const Tensor& threshold) const {
  chosen_.copy_((of_rows() > threshold).unsqueeze(1));
}

void RankScores::choose_best(const std::vector<const RankScores*>& slots, int64_t target,
                             double share) {
  std::vector<Tensor> scores;
  for (const RankScores* slot : slots) scores.push_back(slot->of_rows());
  const Tensor all = at::cat(scores);
  const auto budget = static_cast<int64_t>(static_cast<double>(all.numel() - target) * share +
                                           static_cast<double>(target));
  if (budget >= all.numel()) return;
  const Tensor threshold = std::get<0>(all.kthvalue(all.numel() - budget));
  for (const RankScores* slot : slots) slot->choose(threshold);
}

void RankScores::keep_chosen() const { factors_[2].mul_(chosen_); }

void add_orthogonality(const Tensor& a, const Tensor& b, int64_t count, double weight) {
  const auto add = [&](const Tensor& rows, const Tensor& gradient) {
    const Tensor m = rows.slice(0, 0, count);
    const Tensor distance = m.mm(m.t()) - at::eye(count, m.options());
    gradient.slice(0, 0, count)
        .add_((distance / distance.norm().clamp_min(1e-12)).mm(m), 2 * weight);
  };
  add(a, a.grad());
  add(b.t(), b.grad().t());
}

}  // namespace graft::peft
