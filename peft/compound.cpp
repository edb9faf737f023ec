#include "peft/compound.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "peft/adapter_file.h"
#include "peft/peft_form.h"

namespace graft::peft {
namespace {

/// What a child is made from.
SavedAdapter part_of(const SavedAdapter& adapter, const std::string& child) {
  const auto section = adapter.config.find(child);
  GRAFT_CHECK(section != adapter.config.end() && section->is_object(), ExitCode::kData,
              "adapter_config.json: no section ", child);
  SavedAdapter part{*section, adapter.tensors,
                    section->value(kOwnEntries, nlohmann::json::object())};
  part.config.erase(kOwnEntries);
  return part;
}

}  // namespace

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
    Method& child = *children_[i].method;
    child.attach(inner);
    GRAFT_CHECK(
        child.start_sites().empty() && child.calibration().rows == 0 && child.share_chosen() == 0 &&
            !child.changes_base() && !child.acts_on_others(),
        "peft: ", children_[i].name, ": first values from matrices or data, a changed base ",
        "and acting on others are not for a part of a method; list it as a method of its own");
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

void CompoundMethod::continue_from(const SavedAdapter& adapter) {
  for (const Child& child : children_) child.method->continue_from(part_of(adapter, child.name));
}

void CompoundMethod::from_peft_config(const SavedAdapter& adapter) {
  for (const Child& child : children_) child.method->from_peft_config(part_of(adapter, child.name));
}

}  // namespace graft::peft
