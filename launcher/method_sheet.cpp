#include "launcher/method_sheet.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>

#include "configs/check.h"
#include "launcher/version.h"
#include "models/base.h"
#include "peft/peft.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;

/// What a method does to one model.
struct Trial {
  std::vector<std::string> roles;  ///< slots it acts at
  bool mergeable = true, starts_as_base = true, thaws = false, is_sparse = false;
  int64_t trained = 0, base = 0;  ///< parameters
};

template <class Site>
void add_role(const Site& site, std::vector<std::string>& roles) {
  const bool is_new = std::find(roles.begin(), roles.end(), site.role) == roles.end();
  if (!site.slot->empty() && is_new) roles.push_back(site.role);
}

/// @param option  "key: value" beside the method's defaults, or nothing
/// @throws graft::Error if the method does not fit the model
Trial attach(const std::string& method, const std::string& model_path,
             const std::string& option = "") {
  const auto model = models::make_model(models::read_base_config(model_path));
  peft::Peft adapters(*model, at::kCPU, 0);
  auto entry =
      configs::read_text<peft::MethodEntry>("method: " + method + "\n" + option + "\n", method);
  if (entry.method->acts_on_others()) {
    auto other = configs::read_text<peft::MethodEntry>("method: lora\n", "lora");
    adapters.attach(other);
  }
  const int64_t others = adapters.params().numel();
  adapters.attach(entry);
  const peft::SlotMap& slots = adapters.slots();
  Trial trial;
  const bool has_slots = !entry.method->acts_on_others();
  slots.each_beside_matrices([&](const auto& site) { add_role(site, trial.roles); });
  trial.mergeable = has_slots && trial.roles.empty();  // so far: anything but matrices
  for (const auto* sites : {&slots.linears, &slots.gains}) {
    for (const auto& site : *sites) {
      add_role(site, trial.roles);
      for (const auto& adapter : site.slot->adapters())
        trial.mergeable = trial.mergeable && adapter->mergeable();
    }
  }
  if (!has_slots) trial.roles.clear();  // they are those of others
  trial.starts_as_base = entry.method->starts_as_base();
  trial.trained = adapters.params().numel() - others;
  trial.thaws = adapters.params().has_thawed();
  trial.is_sparse = entry.method->is_sparse();
  trial.base = num_parameters(*model);
  return trial;
}

/// A model that the method can be put on, and what it does there.
struct Fit {
  std::string family, shape;
  std::string biased_shape;  ///< the smallest whose linear layers have biases; empty: none has
  Trial trial;
};

bool has_biases(models::Model& model) {
  const auto& linears = peft::SlotMap(model).linears;
  return std::any_of(linears.begin(), linears.end(), [](auto& site) { return site.info.has_bias; });
}

/// Of each family the smallest shipped shape that it fits, one without biases first: some defaults
/// are wider than a tiny model. None above ten billion parameters is tried: adapters on it take
/// seconds to make.
std::vector<Fit> fits(const std::string& method) {
  constexpr int64_t kMostParameters = 10'000'000'000;
  using Order = std::pair<bool, int64_t>;                      // has biases, parameters
  std::map<std::string, std::map<Order, std::string>> shapes;  // by family
  for (const auto& entry : fs::directory_iterator(source_dir() + "/configs/models")) {
    if (entry.path().extension() != ".yaml") continue;
    const auto model = models::make_model(models::read_base_config(entry.path()));
    shapes[model->info().family].emplace(Order{has_biases(*model), num_parameters(*model)},
                                         entry.path());
  }
  std::vector<Fit> found;
  for (const auto& [family, by_size] : shapes) {
    const auto biased = by_size.lower_bound({true, 0});
    for (const auto& [order, shape] : by_size) {
      if (order.second > kMostParameters) continue;
      try {
        found.push_back(
            {family, shape, biased == by_size.end() ? "" : biased->second, attach(method, shape)});
        break;
      } catch (const Error&) {  // it does not fit, which is the answer
      }
    }
  }
  return found;
}

/// The other choices of each field that has them, "key: value".
std::vector<std::string> other_choices(const std::string& method) {
  std::vector<std::string> options;
  for (const auto& field : method_fields(method).members) {
    if (field.type == configs::Type::kBoolean)
      options.push_back(field.name + ": " + (field.value.text == "true" ? "false" : "true"));
    if (field.type != configs::Type::kString) continue;
    for (const std::string& choice : field.bound.choices) {
      if (choice != field.value.text) options.push_back(field.name + ": \"" + choice + "\"");
    }
  }
  return options;
}

/// The forms `graft export` and `graft merge` can give it.
std::vector<std::string> forms(const std::string& method, const std::string& peft_type,
                               bool mergeable) {
  std::vector<std::string> names;
  if (!peft_type.empty()) names = {"peft", "safetensors"};
  if (method == "lora") names.emplace_back("gguf");
  if (mergeable) names.emplace_back("merged model");
  return names;
}

/// What holds for the defaults, and the choices with which it is otherwise.
void add_behaviour(const std::string& method, const Fit& fit, Facts& facts) {
  facts["mergeable"] = fit.trial.mergeable;
  facts["starts_as_base"] = fit.trial.starts_as_base;
  Facts merge = Facts::array(), start = Facts::array();
  for (const std::string& option : other_choices(method)) {
    std::optional<Trial> trial;
    try {
      trial = attach(method, fit.shape, option);
    } catch (const Error&) {  // needs other fields beside it
      continue;
    }
    if (trial->mergeable != fit.trial.mergeable) merge.push_back(option);
    if (trial->starts_as_base != fit.trial.starts_as_base) start.push_back(option);
  }
  if (!fit.biased_shape.empty()) {
    try {
      if (attach(method, fit.biased_shape).mergeable != fit.trial.mergeable)
        merge.push_back("a base with biases");
    } catch (const Error&) {  // too small
    }
  }
  if (!merge.empty()) facts[fit.trial.mergeable ? "not_mergeable_with" : "mergeable_with"] = merge;
  if (!start.empty()) facts[fit.trial.starts_as_base ? "not_as_base_with" : "as_base_with"] = start;
}

Facts on_model(const std::string& method, const std::string& model) {
  try {
    const Trial trial = attach(method, model);
    return {{"model", model},
            {"slots", trial.roles},
            {"trained_parameters", trial.trained},
            {"base_parameters", trial.base},
            {"share", static_cast<double>(trial.trained) / static_cast<double>(trial.base)}};
  } catch (const Error& error) {
    if (model != default_shape()) throw;
    return {{"model", model}, {"does_not_fit", error.what()}};
  }
}

}  // namespace

std::string default_shape() { return source_dir() + "/configs/models/smollm2_135m.yaml"; }

configs::FieldDoc method_fields(const std::string& method) {
  peft::MethodEntry entry{method, peft::methods().make(method), std::nullopt};
  return configs::describe_section([&](configs::Fields& f) { entry.fields(f); });
}

Facts method_sheet(const peft::MethodFacts& method, const std::string& model) {
  const std::string type = peft::methods().make(method.name)->peft_type();
  Facts facts{{"name", method.name},
              {"group", method.group},
              {"paper", method.paper},
              {"formula", method.summary}};
  facts["peft_type"] = type.empty() ? Facts(nullptr) : Facts(type);
  const auto found = fits(method.name);
  std::vector<std::string> families;
  for (const Fit& fit : found) families.push_back(fit.family);
  if (!found.empty()) facts["families"] = families;  // else on_model tells which field is needed
  if (!found.empty()) {
    const Fit& fit = found.front();
    facts["slots_by_default"] = fit.trial.roles;
    add_behaviour(method.name, fit, facts);
    facts["storage"] = fit.trial.thaws         ? "S"
                       : fit.trial.is_sparse   ? "P"
                       : fit.trial.trained > 0 ? "R"
                                               : "N";
    facts["exports_to"] = forms(method.name, type, fit.trial.mergeable);
  }
  facts["on_model"] = on_model(method.name, model);
  return facts;
}

}  // namespace graft::launcher
