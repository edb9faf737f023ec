#include "peft/layer_loss.h"

#include <ATen/ATen.h>

#include <utility>

#include "configs/check.h"
#include "peft/attach.h"

namespace graft::peft {
namespace {

Tensor nothing(const models::Carry& carry) {
  return at::zeros({}, carry.h().options().dtype(at::kFloat));
}

}  // namespace

class LayerLoss::Around : public models::CarryAdapter {
 public:
  Around(std::shared_ptr<LayerLoss> loss, bool is_first)
      : loss_(std::move(loss)), is_first_(is_first) {}
  models::Carry forward(models::Carry carry, const Stage& stage,
                        const models::Pass& pass) override {
    if (!loss_->is_wanted(pass)) return stage(std::move(carry));
    if (is_first_) {
      loss_->place_ = carry.tensors.size();
      carry.tensors.push_back(nothing(carry));
    }
    carry = stage(std::move(carry));
    Tensor& sum = carry.tensors.at(loss_->place_);
    if (const Tensor term = std::exchange(loss_->term_, {}); term.defined()) sum = sum + term;
    return carry;
  }

 private:
  std::shared_ptr<LayerLoss> loss_;
  bool is_first_;
};

class LayerLoss::AtLoss : public models::LossAdapter {
 public:
  explicit AtLoss(std::shared_ptr<LayerLoss> loss) : loss_(std::move(loss)) {}
  Tensor term(const models::Carry& carry, const models::Pass& pass) override {
    if (!loss_->is_wanted(pass)) return nothing(carry);
    return loss_->weight_ * carry.tensors.at(loss_->place_);
  }

 private:
  std::shared_ptr<LayerLoss> loss_;
};

std::shared_ptr<LayerLoss> LayerLoss::attach(AttachContext& context, double weight) {
  std::shared_ptr<LayerLoss> loss(new LayerLoss(weight));
  const auto& blocks = context.slots.carries;
  check_slots(context, std::min(blocks.size(), context.slots.losses.size()),
              "the losses of layers");
  for (const auto& site : blocks)
    site.slot->push(std::make_shared<Around>(loss, &site == &blocks.front()));
  for (const auto& site : context.slots.losses) site.slot->push(std::make_shared<AtLoss>(loss));
  return loss;
}

}  // namespace graft::peft
