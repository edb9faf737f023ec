#include "peft/peft.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdlib>

#include "configs/check.h"
#include "peft/adapter_file.h"

namespace graft::peft {
namespace {

constexpr size_t kMostMethods = 64;  // one takes memory and a line of the config each

void set_values(const std::vector<Param>& params, const std::vector<Tensor>& values) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < params.size(); ++i) params[i].value.copy_(values[i]);
}

bool is_within(const configs::Bound& bound, const configs::Node& value) {
  if (value.kind != configs::Node::Kind::kScalar) {
    return std::all_of(value.items.begin(), value.items.end(),
                       [&](const auto& item) { return is_within(bound, item); });
  }
  if (!bound.choices.empty()) {
    return std::find(bound.choices.begin(), bound.choices.end(), value.text) != bound.choices.end();
  }
  return (!bound.low && !bound.high) || bound.allows(std::strtod(value.text.c_str(), nullptr));
}

/// The bounds of a method's fields hold for what a file says too.
void check_bounds(Method& method, const std::string& path) {
  for (const auto& field :
       configs::describe_section([&](configs::Fields& f) { method.fields(f); }).members) {
    GRAFT_CHECK(is_within(field.bound, field.value), ExitCode::kData, path, ": ", field.name, " = ",
                configs::to_flow(field.value), ", expected ", field.type_text());
  }
}

}  // namespace

Peft::Peft(models::Model& model, at::Device device, uint64_t seed)
    : model_(model), device_(device), random_{seed, 0}, slots_(model) {}

void Peft::attach_frozen(const std::string& directory) {
  std::string name;
  Frozen frozen{method_of_directory(directory, name), {}, directory};
  const AdapterFile file(directory);
  file.check_modules(slots_);
  AttachContext context{slots_,  model_.info(), frozen.params,
                        random_, device_,       "frozen" + std::to_string(frozen_.size()) + "."};
  try {
    frozen.method->attach(context);
  } catch (const Error& error) {  // its fields are the directory's, not the user's
    throw Error(error.code() == ExitCode::kUsage ? ExitCode::kData : error.code(),
                directory + ": " + error.what());
  }
  for (const Param& param : frozen.params.all()) param.value.set_requires_grad(false);
  set_values(frozen.params.all(), file.read(frozen.params.all()));
  frozen_.push_back(std::move(frozen));
}

void Peft::attach(MethodEntry& entry) {
  const size_t index = trained_.size();
  GRAFT_CHECK(index < kMostMethods, "peft: ", index + 1, " methods, at most ", kMostMethods,
              " are allowed");
  if (entry.method == nullptr) entry.method = method_of_directory(*entry.init_from, entry.name);
  if (entry.init_from) AdapterFile(*entry.init_from).check_modules(slots_);
  const size_t first = params_.all().size();
  AttachContext context{slots_,  model_.info(),
                        params_, kernels::derive(random_, index + 1),
                        device_, std::to_string(index) + "."};
  entry.method->attach(context);
  trained_.push_back({entry.name, entry.method, first, params_.all().size() - first,
                      entry.init_from.value_or("")});
  if (entry.init_from) AdapterFile(*entry.init_from).read(params_of(trained_.back()));
}

void Peft::attach(std::vector<MethodEntry>& entries) {
  for (MethodEntry& entry : entries) attach(entry);
}

void Peft::initialize(BaseWeights& base) {
  check_base_copies(base);
  for (const Frozen& frozen : frozen_) {
    frozen.method->initialize(
        base);  // may take values from the base, so the saved ones are set again
    set_values(frozen.params.all(), AdapterFile(frozen.directory).read(frozen.params.all()));
  }
  for (const Trained& part : trained_) part.method->initialize(base);
  for (const Trained& part : trained_) {
    if (part.init_from.empty()) continue;
    const auto params = params_of(part);
    set_values(params, AdapterFile(part.init_from).read(params));
  }
}

void Peft::check_base_copies(BaseWeights& base) const {
  for (const Frozen& frozen : frozen_)
    AdapterFile(frozen.directory).check_base_copies(slots_, base);
  for (const Trained& part : trained_) {
    if (!part.init_from.empty()) AdapterFile(part.init_from).check_base_copies(slots_, base);
  }
}

void Peft::after_reduce(const StepInfo& info) {
  for (const Trained& part : trained_) part.method->after_reduce(info);
}

void Peft::after_step(const StepInfo& info) {
  for (const Trained& part : trained_) part.method->after_step(info);
}

Peft::Saved Peft::save(size_t index, const BaseFacts& base) const {
  const Trained& part = trained_.at(index);
  const std::string type = part.method->peft_type();
  Saved saved;
  saved.config = part.method->to_peft_config(slots_);
  saved.config["peft_type"] = type.empty() ? nlohmann::json(nullptr) : nlohmann::json(type);
  saved.config["task_type"] = base.task_type;
  saved.config["base_model_name_or_path"] = base.name_or_path;
  saved.config["revision"] =
      base.revision.empty() ? nlohmann::json(nullptr) : nlohmann::json(base.revision);
  saved.config["inference_mode"] = true;
  const nlohmann::json facts = {{"method", part.name}, {"base_fingerprint", base.fingerprint}};
  saved.metadata = {{"format", "pt"}, {kFactsKey, facts.dump()}};
  for (size_t i = part.first_param; i < part.first_param + part.num_params; ++i) {
    const Param& param = params_.all()[i];
    saved.tensors.emplace_back(param.hf_key.empty() ? param.name : param.hf_key,
                               param.value.detach().cpu());
  }
  return saved;
}

void Peft::load(const std::string& directory) {
  std::vector<Tensor> values;
  for (size_t i = 0; i < trained_.size(); ++i) {
    const AdapterFile file(part_directory(directory, i, trained_.size()));
    const auto part = file.read(params_of(trained_[i]));
    values.insert(values.end(), part.begin(), part.end());
  }
  set_values(params_.all(), values);
}

std::vector<Param> Peft::params_of(const Trained& part) const {
  const auto begin = params_.all().begin() + static_cast<std::ptrdiff_t>(part.first_param);
  return {begin, begin + static_cast<std::ptrdiff_t>(part.num_params)};
}

std::shared_ptr<Method> method_of_directory(const std::string& directory, std::string& name) {
  const SavedAdapter adapter = read_saved_adapter(directory);
  const auto entry = adapter.config.find("peft_type");
  const std::string type =
      entry != adapter.config.end() && entry->is_string() ? entry->get<std::string>() : "";
  std::vector<std::string> known;
  for (const auto& registered : methods().entries()) {
    std::shared_ptr<Method> method = registered.make();
    if (method->peft_type().empty()) continue;
    known.push_back(method->peft_type());
    if (method->peft_type() != type) continue;
    method->from_peft_config(adapter);
    check_bounds(*method, directory + "/adapter_config.json");
    name = registered.name;
    return method;
  }
  throw Error(ExitCode::kData, directory + "/adapter_config.json: peft_type '" + type +
                                   "' is not supported; known: " + configs::join(known, ", "));
}

std::string part_directory(const std::string& directory, size_t index, size_t count) {
  return count == 1 ? directory : directory + "/" + std::to_string(index);
}

}  // namespace graft::peft
