#include "peft/observer.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "configs/check.h"

namespace graft::peft {
namespace {

/// Those of the lane's positions that hold a token. A head sees [targets, in], no others.
Observation without_padding(const Tensor& x, const Tensor& dy, const data::Batch& batch,
                            const Observer::Seen& seen_by) {
  if (x.dim() == 2) {
    return {x.to(at::kFloat), dy.defined() ? dy.to(at::kFloat) : dy,
            at::ones({x.size(0)}, x.options().dtype(at::kBool))};
  }
  GRAFT_CHECK(x.dim() == 3 && x.size(1) == batch.tokens_BL.size(1), "peft: ", seen_by.site->name,
              " sees ", x.sizes(), " where the rows are ", batch.tokens_BL.sizes(), ": ",
              seen_by.method, " starts from data and cannot be combined with ", seen_by.prompts,
              ", which puts positions beside the tokens; start it in a run of its own");
  const Tensor is_token_BL = batch.documents_BL.to(x.device()).ge(0);
  const auto rows = [&](const Tensor& t) {
    return t.defined() ? t.detach().index({is_token_BL}) : t;
  };
  Observation seen{rows(x).to(at::kFloat), rows(dy), rows(batch.labels_BL.to(x.device()).ge(0))};
  if (dy.defined()) seen.dy = seen.dy.to(at::kFloat);
  return seen;
}

class Watch;

/// y itself; on the way down its gradient is shown to the adapter. The probe makes autograd come
/// here where nothing else of the stage needs a gradient.
struct Shown : torch::autograd::Function<Shown> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& y,
                        const Tensor& /*probe*/, const Tensor& x, const Watch* watch,
                        const data::Batch* batch) {
    context->save_for_backward({x});
    context->saved_data["watch"] = reinterpret_cast<int64_t>(watch);
    context->saved_data["batch"] = reinterpret_cast<int64_t>(batch);
    return y.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list dy);
};

class Watch : public models::LinearAdapter {
 public:
  Watch(Observer::Seen seen, Tensor probe) : seen_(std::move(seen)), probe_(std::move(probe)) {}
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    Tensor y = base(x);
    if (probe_.defined()) return Shown::apply(y, probe_, x.detach(), this, pass.batch);
    show(x, {}, *pass.batch);
    return y;
  }
  void show(const Tensor& x, const Tensor& dy, const data::Batch& batch) const {
    const at::NoGradGuard no_grad;
    seen_.see(without_padding(x, dy, batch, seen_));
  }

 private:
  Observer::Seen seen_;
  Tensor probe_;  ///< undefined: gradients are not asked for
};

torch::autograd::variable_list Shown::backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::variable_list dy) {
  // What autograd can save of a handle is a number. NOLINTBEGIN(performance-no-int-to-ptr)
  const auto* watch = reinterpret_cast<const Watch*>(context->saved_data["watch"].toInt());
  const auto* batch = reinterpret_cast<const data::Batch*>(context->saved_data["batch"].toInt());
  // NOLINTEND(performance-no-int-to-ptr)
  watch->show(context->get_saved_variables()[0], dy[0], *batch);
  return {dy[0], Tensor(), Tensor(), Tensor(), Tensor()};
}

}  // namespace

Observer::Observer(std::vector<Seen> sites, int num_stages, Gradients gradients)
    : sites_(std::move(sites)), probes_(static_cast<size_t>(num_stages)) {
  for (const Seen& seen : sites_) {
    Tensor probe;
    if (gradients == Gradients::kYes) {
      probe = at::zeros({}).set_requires_grad(true);
      probes_[static_cast<size_t>(seen.site->stage)].push_back(probe);
    }
    seen.site->slot->push(std::make_shared<Watch>(seen, probe));
  }
}

Observer::~Observer() {
  for (const Seen& seen : sites_) seen.site->slot->pop();
}

}  // namespace graft::peft
