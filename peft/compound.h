// CompoundMethod: a method made of others. It owns them, shows the fields of each under its name
// and forwards the lifecycle; all are saved in one file, so their tensors must have different keys.
// A child whose first values come from matrices or data, or that changes the base, is refused: of
// whom a slot would be is not known here.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "peft/method.h"

namespace graft::peft {

/// A method of the catalogue with other defaults.
/// @param fields  as a user would write them: "{sites: [mlp], scaling: 4}"
std::unique_ptr<Method> method_with(const std::string& name, const std::string& fields);

class CompoundMethod : public Method {
 public:
  struct Child {
    std::string name;  ///< the section of its fields
    std::shared_ptr<Method> method;

    void fields(configs::Fields& f) { method->fields(f); }
  };
  explicit CompoundMethod(std::vector<Child> children) : children_(std::move(children)) {}

  void fields(configs::Fields& f) override;
  void continue_from(const SavedAdapter& adapter) override;
  /// @throws graft::Error (kUsage) for a child with points of a start
  void attach(AttachContext& context) override;
  void initialize(BaseWeights& base) override;
  void after_reduce(const StepInfo& info) override;
  void after_step(const StepInfo& info) override;
  bool starts_as_base() const override;
  nlohmann::json to_peft_config(const SlotMap& slots) const override;
  void from_peft_config(const SavedAdapter& adapter) override;

 protected:
  std::vector<Child> children_;
};

}  // namespace graft::peft
