// L2-SP: loss + (alpha / 2) sum_p (p - p_0)^2 + (beta / 2) sum_h h^2.
//       Li, Grandvalet and Davoine 2018, arXiv:1802.01483, eq. 2
// Trains nothing itself and is no part of the adapter: it holds what the methods before it in the
// list train, adapters or tensors of the base (the paper's own setting: after full), near the
// values p_0 they have before the first step (those of init_from, if they start there). p_0 lies in
// checkpoints, with the moments. h is what a classifier trains anew, its head: it has no values
// worth holding and decays to zero. The terms stand beside the mean over the step's targets, once a
// step, and are not in the loss that is reported. HF PEFT has no such method.
#include <ATen/ATen.h>

#include "configs/check.h"
#include "peft/method.h"

namespace graft::peft {
namespace {

class L2Sp : public Method {
 public:
  void fields(configs::Fields& f) override {
    f("alpha", alpha_, f.at_least(0), "weight of the squared distance from the start");
    f("beta", beta_, f.at_least(0), "of a classifier's head: weight of its square");
  }
  bool acts_on_others() const override { return true; }
  void attach(AttachContext& context) override {
    params_ = &context.params, count_ = params_->all().size();
    GRAFT_CHECK(count_ > 0, "peft: ", context.method,
                ": holds what methods before it in the list train; there is none");
    held_.clear();
    has_new_head_ = context.info.task != models::Task::kCausalLm;
    name_ = context.prefix + "start";
  }
  /// What the parameters are now is where they are held, until a checkpoint says otherwise.
  void initialize(BaseWeights&) override {
    for (size_t i = 0; i < count_; ++i) {
      const Param& param = params_->all()[i];
      held_.push_back({param, is_new(param) ? Tensor() : param.value.detach().clone()});
      if (held_.back().start.defined())
        params_->keep({.name = name_, .param = i, .value = held_.back().start});
    }
  }
  /// The derivative is element by element, so each rank adds that of what it owns.
  void after_reduce(const StepInfo&) override {
    const at::NoGradGuard no_grad;
    for (const auto& [param, start] : held_) {
      Tensor gradient = param.value.grad();
      if (start.defined()) {
        gradient.add_(param.value - start, alpha_);
      } else {
        gradient.add_(param.value, beta_);
      }
    }
  }

 private:
  struct Held {
    Param param;
    Tensor start;  ///< undefined: zero, of a new head
  };
  bool is_new(const Param& param) const {
    return has_new_head_ &&
           (param.name.ends_with(".head.weight") || param.name.ends_with(".head.bias"));
  }

  double alpha_ = 0.1, beta_ = 0.01;
  ParamSet* params_ = nullptr;
  size_t count_ = 0;  ///< of those trained by methods before
  bool has_new_head_ = false;
  std::string name_;
  std::vector<Held> held_;
};

}  // namespace

void register_l2_sp(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<L2Sp>(); }});
}

}  // namespace graft::peft
