// WholeTensors: PEFT's `modules_to_save` and `bias`: tensors of the base that are trained whole,
// beside the adapters. Each is a replicated float32 copy that takes the place of the frozen one.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <memory>
#include <string>
#include <vector>

#include "peft/attach.h"
#include "peft/peft_config.h"

namespace graft::peft {

/// y = base(x) + (b' - b): exactly base(x) until b' has moved; b is zero where the base has none.
class WholeBias : public models::LinearAdapter {
 public:
  WholeBias(const LinearSite& site, at::Device device);
  void initialize(const LinearSite& site, BaseWeights& base);
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override;
  Tensor merged_bias(const Tensor& b) const override;

 private:
  Tensor bias_, frozen_;
};

class WholeTensors {
 public:
  /// @param bias_only  what PEFT calls the biases of the adapted matrices: "lora_only"; empty: the
  ///                   method has no `bias`
  /// @param modules    the default of modules_to_save
  explicit WholeTensors(std::string bias_only, configs::StringOrList modules = {})
      : bias_only_(std::move(bias_only)), modules_to_save_(std::move(modules)) {}

  void fields(configs::Fields& f);
  /// @param adapted  the slots whose bias `bias_only` means
  /// @param factor   of "weight" and "bias"
  void attach(AttachContext& context, const std::vector<const LinearSite*>& adapted,
              const LearningRateFactor& factor = {});
  /// One matrix more, with its bias.
  /// @param prefix  of its keys in files, before the path of the module
  void add(AttachContext& context, const LinearSite& site, std::string_view prefix,
           const LearningRateFactor& factor = {});
  /// Copies the frozen values in.
  void initialize(BaseWeights& base);
  nlohmann::json to_peft_config(const SlotMap& slots) const;
  void from_peft_config(PeftConfigReader& config);

 private:
  struct Copy {
    const LinearSite* site;
    std::shared_ptr<models::LinearAdapter> adapter;
  };
  std::string bias_only_;
  configs::StringOrList modules_to_save_;
  std::string bias_ = "none";
  std::vector<Copy> weights_, biases_;
};

}  // namespace graft::peft
