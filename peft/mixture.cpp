#include "peft/mixture.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "configs/check.h"

namespace graft::peft {
namespace {

/// The LoRAs of one matrix: their factors side by side, put there at the first use.
class MixedLinear : public models::LinearAdapter {
 public:
  struct Part {
    int64_t number;  ///< of the LoRA
    std::shared_ptr<models::LinearAdapter> adapter;
  };
  MixedLinear(std::shared_ptr<Mixture> mixture, int64_t matrix, std::vector<Part> parts)
      : mixture_(std::move(mixture)), matrix_(matrix), parts_(std::move(parts)) {}

  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    if (!a_.defined() || a_.scalar_type() != x.scalar_type()) put_side_by_side(x.scalar_type());
    const Tensor s_BTR = mixture_->scalings(matrix_).index_select(-1, numbers_R_);
    const Tensor y = base(x);
    return y + at::linear(at::linear(x, a_) * s_BTR.to(x.scalar_type()), b_).to(y.scalar_type());
  }

 private:
  void put_side_by_side(at::ScalarType dtype) {
    const at::NoGradGuard constants;
    std::vector<Tensor> a, b, numbers;
    for (const auto& [number, adapter] : parts_) {
      const models::LowRank part = *adapter->low_rank();
      a.push_back(part.a), b.push_back(part.b * part.scale);
      numbers.push_back(at::full({part.a.size(0)}, number, part.a.options().dtype(at::kLong)));
    }
    a_ = at::cat(a).to(dtype), b_ = at::cat(b, 1).to(dtype), numbers_R_ = at::cat(numbers);
  }

  std::shared_ptr<Mixture> mixture_;
  int64_t matrix_;
  std::vector<Part> parts_;
  Tensor a_, b_, numbers_R_;  ///< [R, in], [out, R] with the scales, the LoRA of each rank
};

class MixedBlock : public models::CarryAdapter {
 public:
  explicit MixedBlock(std::shared_ptr<Mixture> mixture) : mixture_(std::move(mixture)) {}
  models::Carry forward(models::Carry carry, const Stage& stage, const models::Pass&) override {
    return mixture_->run(std::move(carry), stage);
  }

 private:
  std::shared_ptr<Mixture> mixture_;
};

}  // namespace

models::Carry Mixture::add_scalings(models::Carry carry, Tensor s_BTMN) {
  place_ = carry.tensors.size();
  carry.tensors.push_back(std::move(s_BTMN));
  return carry;
}

models::Carry Mixture::run(models::Carry carry, const models::CarryAdapter::Stage& stage) {
  now_BTMN_ = carry.tensors.at(place_);
  GRAFT_CHECK(now_BTMN_.size(1) == carry.h().size(1), "peft: ", carry.h().size(1),
              " positions for ", now_BTMN_.size(1),
              " tokens: LoRAs cannot be mixed by token beside a soft prompt");
  models::Carry out = stage(std::move(carry));
  now_BTMN_.reset();
  return out;
}

Tensor Mixture::scalings(int64_t matrix) const {
  return now_BTMN_.select(2, now_BTMN_.size(2) == 1 ? 0 : matrix);
}

int64_t attach_mixture(AttachContext& context, const std::vector<std::string>& names,
                       const std::shared_ptr<Mixture>& mixture) {
  int64_t matrices = 0;
  const auto& experts = context.experts;
  context.slots.each([&](const auto& site) {
    std::vector<MixedLinear::Part> parts;
    for (const auto& frozen : site.slot->frozen()) {
      const auto& adapter = frozen.adapter;
      const auto number = std::find(experts.begin(), experts.end(), frozen.owner) - experts.begin();
      if (number == std::ssize(experts)) continue;
      bool is_lora = false;
      if constexpr (requires { adapter->low_rank(); }) {
        is_lora = site.layer >= 0 && adapter->low_rank().has_value();
        parts.push_back({number, adapter});
      }
      GRAFT_CHECK(is_lora, names[static_cast<size_t>(number)], ": at ", site.name,
                  " it is no LoRA of a matrix in the blocks (without a bias, that took nothing "
                  "from the base): it cannot be mixed");
    }
    if constexpr (requires { site.layer; }) {
      if (!parts.empty())
        site.slot->push(std::make_shared<MixedLinear>(mixture, matrices++, std::move(parts)));
    }
  });
  for (const auto& site : context.slots.carries)
    site.slot->push(std::make_shared<MixedBlock>(mixture));
  return matrices;
}

}  // namespace graft::peft
