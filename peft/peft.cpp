#include "peft/peft.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "configs/check.h"
#include "models/io/json_file.h"

namespace graft::peft {
namespace {

constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter_model.safetensors";

/// PEFT writes the whole base matrix beside an adapted embedding or head; it is the base's, not the
/// adapter's.
bool is_base_copy(std::string_view key) { return key.ends_with(".base_layer.weight"); }

/// What an adapter directory holds for `params`, in their order. Nothing is set.
/// @throws graft::Error (kData) with the missing, unknown and misshapen tensors
std::vector<Tensor> read_values(const std::vector<Param>& params, const std::string& directory) {
  const models::io::SafetensorsFile file(directory + "/" + kWeightsFile);
  std::vector<std::string> problems;
  std::set<std::string, std::less<>> wanted;
  std::vector<Tensor> values;
  for (const Param& param : params) {
    const std::string& key = param.hf_key.empty() ? param.name : param.hf_key;
    wanted.insert(key);
    if (file.find(key) == nullptr) {
      problems.push_back("missing: " + key);
      continue;
    }
    values.push_back(file.read(key));
    if (values.back().sizes() != param.value.sizes()) {
      problems.push_back(detail::concat("shape: ", key, " is ", values.back().sizes(),
                                        ", expected ", param.value.sizes()));
    } else if (!at::isfinite(values.back()).all().item<bool>()) {
      problems.push_back("not finite: " + key);
    }
  }
  for (const auto& entry : file.entries()) {
    if (!wanted.contains(entry.name) && !is_base_copy(entry.name))
      problems.push_back("unknown: " + entry.name);
  }
  GRAFT_CHECK(problems.empty(), ExitCode::kData, file.path(), " does not fit this model:\n  ",
              configs::join(problems, "\n  "));
  return values;
}

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
  return (!bound.low && !bound.high) || bound.allows(std::stod(value.text));
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
  AttachContext context{slots_,  model_.info(), frozen.params,
                        random_, device_,       "frozen" + std::to_string(frozen_.size()) + "."};
  frozen.method->attach(context);
  for (const Param& param : frozen.params.all()) param.value.set_requires_grad(false);
  set_values(frozen.params.all(), read_values(frozen.params.all(), directory));
  frozen_.push_back(std::move(frozen));
}

void Peft::attach(std::vector<MethodEntry>& entries) {
  for (size_t i = 0; i < entries.size(); ++i) {
    MethodEntry& entry = entries[i];
    if (entry.method == nullptr) entry.method = method_of_directory(*entry.init_from, entry.name);
    const size_t first = params_.all().size();
    AttachContext context{slots_,  model_.info(),          params_, kernels::derive(random_, i + 1),
                          device_, std::to_string(i) + "."};
    entry.method->attach(context);
    trained_.push_back({entry.name, entry.method, first, params_.all().size() - first,
                        entry.init_from.value_or("")});
  }
}

void Peft::initialize(BaseWeights& base) {
  for (const Frozen& frozen : frozen_) {
    frozen.method->initialize(
        base);  // may take values from the base, so the saved ones are set again
    set_values(frozen.params.all(), read_values(frozen.params.all(), frozen.directory));
  }
  for (const Trained& part : trained_) part.method->initialize(base);
  for (const Trained& part : trained_) {
    if (!part.init_from.empty())
      set_values(params_of(part), read_values(params_of(part), part.init_from));
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
  saved.config["revision"] = nullptr;
  saved.config["inference_mode"] = true;
  saved.config["graft"] = {{"method", part.name}, {"base_fingerprint", base.fingerprint}};
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
    const auto part =
        read_values(params_of(trained_[i]), part_directory(directory, i, trained_.size()));
    values.insert(values.end(), part.begin(), part.end());
  }
  set_values(params_.all(), values);
}

std::vector<Param> Peft::params_of(const Trained& part) const {
  const auto begin = params_.all().begin() + static_cast<std::ptrdiff_t>(part.first_param);
  return {begin, begin + static_cast<std::ptrdiff_t>(part.num_params)};
}

std::shared_ptr<Method> method_of_directory(const std::string& directory, std::string& name) {
  const std::string path = directory + "/" + kConfigFile;
  GRAFT_CHECK(std::filesystem::exists(path), ExitCode::kData, directory, ": no ", kConfigFile,
              "; expected an adapter folder in PEFT's layout");
  nlohmann::json config = models::io::read_json_file(path);
  GRAFT_CHECK(config.is_object(), ExitCode::kData, path, ": not an object");
  const std::string type =
      config.value("peft_type", nlohmann::json()).is_string() ? config["peft_type"] : "";
  config.erase("graft");
  std::vector<std::string> known;
  for (const auto& entry : methods().entries()) {
    std::shared_ptr<Method> method = entry.make();
    if (method->peft_type().empty()) continue;
    known.push_back(method->peft_type());
    if (method->peft_type() != type) continue;
    method->from_peft_config(config);
    check_bounds(*method, path);
    name = entry.name;
    return method;
  }
  throw Error(ExitCode::kData, path + ": peft_type '" + type +
                                   "' is not supported; known: " + configs::join(known, ", "));
}

std::string part_directory(const std::string& directory, size_t index, size_t count) {
  return count == 1 ? directory : directory + "/" + std::to_string(index);
}

}  // namespace graft::peft
