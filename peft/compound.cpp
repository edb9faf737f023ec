#include "peft/compound.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "peft/adapter_file.h"
#include "peft/peft_form.h"

namespace graft::peft {

std::unique_ptr<Method> method_with(const std::string& name, const std::string& fields) {
  auto method = methods().make(name);
  configs::Problems problems;
  const configs::Node root = configs::parse_with_overrides(fields, name, {}, problems);
  configs::read_section(root, problems, [&](configs::Fields& f) { method->fields(f); });
  GRAFT_ASSERT(problems.empty(), name, ": ", problems.first());
  return method;
}

void CompoundMethod::fields(configs::Fields& f) {
  for (Child& child : children_) f(child.name, child, "fields of this part");
}

void CompoundMethod::attach(AttachContext& context) {
  for (size_t i = 0; i < children_.size(); ++i) {
    AttachContext inner = context;
    inner.random = kernels::derive(context.random, i + 1);
    inner.prefix = context.prefix + children_[i].name + ".";
    children_[i].method->attach(inner);
  }
}

void CompoundMethod::initialize(BaseWeights& base) {
  for (const Child& child : children_) child.method->initialize(base);
}

void CompoundMethod::after_reduce(const StepInfo& info) {
  for (const Child& child : children_) child.method->after_reduce(info);
}

void CompoundMethod::after_step(const StepInfo& info) {
  for (const Child& child : children_) child.method->after_step(info);
}

bool CompoundMethod::starts_as_base() const {
  return std::all_of(children_.begin(), children_.end(),
                     [](const Child& child) { return child.method->starts_as_base(); });
}

/// A section for each child; what only Graft knows of it stays in there.
nlohmann::json CompoundMethod::to_peft_config(const SlotMap& slots) const {
  nlohmann::json config = nlohmann::json::object();
  for (const Child& child : children_) config[child.name] = child.method->to_peft_config(slots);
  return config;
}

void CompoundMethod::from_peft_config(const SavedAdapter& adapter) {
  for (const Child& child : children_) {
    const auto section = adapter.config.find(child.name);
    GRAFT_CHECK(section != adapter.config.end() && section->is_object(), ExitCode::kData,
                "adapter_config.json: no section ", child.name);
    SavedAdapter part{*section, adapter.tensors,
                      section->value(kOwnEntries, nlohmann::json::object())};
    part.config.erase(kOwnEntries);
    child.method->from_peft_config(part);
  }
}

}  // namespace graft::peft
