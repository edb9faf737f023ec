// L2-SP: loss + (alpha / 2) sum_p (p - p_0)^2 over what the methods before it in the list train.
//       Li, Grandvalet and Davoine 2018, arXiv:1802.01483, eq. 2
// Trains nothing itself and is not saved: it holds the parameters of others, whatever their method,
// near the values p_0 they have before the first step (those of init_from, if they start there).
// The penalty stands beside the mean over the step's targets, once a step, and is not in the loss
// that is reported. With p_0 = 0 it would be L2 weight decay. HF PEFT has no such method.
#include <ATen/ATen.h>

#include "configs/check.h"
#include "peft/method.h"

namespace graft::peft {
namespace {

class L2SpPenalty : public models::LossAdapter {
 public:
  L2SpPenalty(double alpha, std::vector<Tensor> params)
      : alpha_(alpha), params_(std::move(params)) {}
  /// What the parameters are now is where they are held.
  void begin() {
    starts_.clear();
    for (const Tensor& p : params_) starts_.push_back(p.detach().clone());
  }
  Tensor penalty() const override {
    Tensor sum = at::zeros({}, params_.front().options().requires_grad(false));
    for (size_t i = 0; i < params_.size(); ++i)
      sum = sum + (params_[i] - starts_[i]).square().sum();
    return alpha_ / 2 * sum;
  }

 private:
  double alpha_;
  std::vector<Tensor> params_, starts_;
};

class L2Sp : public Method {
 public:
  void fields(configs::Fields& f) override {
    f("alpha", alpha_, f.at_least(0), "weight of the squared distance from the start");
  }
  bool acts_on_others() const override { return true; }
  void attach(AttachContext& context) override {
    std::vector<Tensor> params;
    for (const Param& param : context.params.all()) {
      GRAFT_CHECK(param.thawed == nullptr, "peft: l2_sp cannot hold ", param.name,
                  ", a tensor of the base that is trained whole; hold an adapter, or decay it");
      params.push_back(param.value);
    }
    GRAFT_CHECK(!params.empty(),
                "peft: l2_sp: holds what methods before it in the list train; there is none");
    penalty_ = std::make_shared<L2SpPenalty>(alpha_, std::move(params));
    GRAFT_CHECK(!context.slots.losses.empty(), "peft: l2_sp: this model has no loss");
    context.slots.losses.front().slot->push(penalty_);
  }
  void initialize(BaseWeights&) override { penalty_->begin(); }

 private:
  double alpha_ = 0.1;
  std::shared_ptr<L2SpPenalty> penalty_;
};

}  // namespace

void register_l2_sp(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<L2Sp>(); }});
}

}  // namespace graft::peft
