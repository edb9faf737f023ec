// WholeTensors: PEFT's `modules_to_save` and `bias`: tensors of the base that are trained whole,
// beside the adapters. Each is a replicated float32 copy that takes the place of the frozen one.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <memory>
#include <string>
#include <vector>

#include "peft/linear_method.h"
#include "peft/peft_config.h"

namespace graft::peft {

class WholeTensors {
 public:
  void fields(configs::Fields& f);
  /// @param adapted  the slots whose bias `lora_only` means
  void attach(AttachContext& context, const std::vector<const LinearSite*>& adapted);
  /// Copies the frozen values in.
  void initialize(BaseWeights& base);
  nlohmann::json to_peft_config(const SlotMap& slots) const;
  void from_peft_config(PeftConfigReader& config);

 private:
  struct Copy {
    const LinearSite* site;
    std::shared_ptr<models::LinearAdapter> adapter;
  };
  configs::StringOrList modules_to_save_ = {};
  std::string bias_ = "none";
  std::vector<Copy> weights_, biases_;
};

}  // namespace graft::peft
