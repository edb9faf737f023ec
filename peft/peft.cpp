#include "peft/peft.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdlib>
#include <set>

#include "configs/check.h"
#include "peft/adapter_file.h"
#include "peft/peft_config.h"
#include "peft/peft_form.h"

namespace graft::peft {
namespace {

constexpr size_t kMostMethods = 64;  // one takes memory and a line of the config each

/// @param values  of the params, then of the constants; undefined: it keeps its own, or has no
///                elements
/// @param file    holds thawed weights, which are read one at a time, once the base is loaded
void set_values(const std::vector<Param>& params, const std::vector<Constant>& constants,
                const std::vector<Tensor>& values, const AdapterFile& file) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < params.size(); ++i) {
    if (values[i].defined()) params[i].set(values[i]);
    if (params[i].thawed == nullptr || !params[i].thawed->is_loaded()) continue;
    const auto own = params[i].thawed->own_range();
    params[i].value.copy_(file.tensor(params[i].hf_key).flatten().slice(0, own.begin, own.end));
    params[i].thawed->publish();
  }
  for (size_t i = 0; i < constants.size(); ++i) {
    if (const Tensor& value = values[params.size() + i]; value.defined())
      constants[i].value.copy_(value);
  }
}

void set_values(const ParamSet& set, const AdapterFile& file) {
  set_values(set.all(), set.constants(), file.read(set.all(), set.constants()), file);
}

bool is_head(const Param& param) { return param.name.ends_with(".head.weight"); }

/// How many adapters each matrix and norm has.
std::map<const LinearSite*, size_t> num_adapters(const SlotMap& slots) {
  std::map<const LinearSite*, size_t> counts;
  for (const auto* sites : {&slots.linears, &slots.gains}) {
    for (const LinearSite& site : *sites) counts[&site] = site.slot->size();
  }
  return counts;
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
    const bool is_unset = (field.may_be_null && field.value.text == "null") ||
                          (field.may_be_auto && field.value.text == "auto");
    GRAFT_CHECK(is_unset || is_within(field.bound, field.value), ExitCode::kData, path, ": ",
                field.name, " = ", configs::to_flow(field.value), ", expected ", field.type_text());
  }
}

}  // namespace

Peft::Peft(models::Model& model, at::Device device, uint64_t seed)
    : model_(model), device_(device), random_{seed, 0}, slots_(model) {}

/// A classifier's adapter has a head that no causal LM has.
void Peft::check_task(const std::string& directory) const {
  const auto config = read_saved_adapter(directory).config;
  const auto type = config.value("task_type", nlohmann::ordered_json());
  const models::ModelInfo info = model_.info();
  for (const models::TaskNames& task : models::kTasks) {
    if (task.task == models::Task::kCausalLm || task.task == info.task) continue;
    GRAFT_CHECK(type != task.peft_type, directory, ": an adapter for ", task.name, " (task_type ",
                task.peft_type, "), the model is a ", info.hf_class,
                "; `graft eval` with train.task: ", task.name,
                " computes with it, and no other verb has classifiers");
  }
}

/// A classifier's head is trained and saved with the first method, as PEFT does; a method that does
/// not list it among its modules_to_save gets it here.
/// @param wanted  whether, by the key of its weight in the file
template <class Wanted>
std::shared_ptr<WholeTensors> Peft::attach_with_head(Method& method, AttachContext& context,
                                                     const Wanted& wanted) {
  const auto& params = context.params.all();
  const size_t first = params.size();
  method.attach(context);
  const LinearSite* head = slots_.find_linear("head");
  if (head == nullptr || params.size() == first) return nullptr;
  // PEFT wraps the model once more where it puts modules into it; of prompts it does not.
  std::string_view prefix = "base_model.";
  bool is_listed = false;
  for (size_t i = first; i < params.size(); ++i) {
    if (params[i].hf_key.starts_with(kFilePrefix)) prefix = kFilePrefix;
    is_listed = is_listed || is_head(params[i]);
  }
  if (is_listed || model_.info().task == models::Task::kCausalLm ||
      !wanted(std::string(prefix) + head->hf_path + ".weight"))
    return nullptr;
  auto whole = std::make_shared<WholeTensors>("");
  whole->add(context, *head, prefix);
  return whole;
}

void Peft::attach_frozen(const std::string& directory, double weight, const std::string& name) {
  check_task(directory);
  Frozen frozen;
  frozen.method = method_of_directory(directory, frozen.method_name);
  frozen.directory = directory;
  frozen.name = name.empty() ? directory : name;
  frozen.weight = weight;
  const std::vector<size_t> experts = attach_experts(*frozen.method);
  const AdapterFile file(directory);
  file.check_modules(slots_);
  GRAFT_ASSERT(trained_.empty(), "frozen adapters lie below what is trained");
  AttachContext context{slots_,        model_.info(),
                        frozen.params, random_,
                        device_,       "frozen" + std::to_string(frozen_.size()) + ".",
                        true,          frozen.method_name,
                        experts};
  const auto before = num_adapters(slots_);
  try {
    frozen.head = attach_with_head(*frozen.method, context, [&](const std::string& key) {
      const auto names = file.names();
      return std::find(names.begin(), names.end(), key) != names.end();
    });
  } catch (const Error& error) {  // its fields are the directory's, not the user's
    throw Error(error.code() == ExitCode::kUsage ? ExitCode::kData : error.code(),
                directory + ": " + error.what());
  }
  check_named(directory, slots_,
              [&](const LinearSite& site) { return site.slot->size() > before.at(&site); });
  const std::string whose = frozen.method_name + " (" + directory + ")";
  note_thawed(frozen.params.all(), whose);
  for (const Param& param : frozen.params.all()) {
    param.value.set_requires_grad(false);
    if (param.thawed != nullptr) param.thawed->thaw(models::Thaw::kFile);
  }
  set_values(frozen.params, file);
  check_composes(whose);
  slots_.each([&](const auto& site) { site.slot->freeze(frozen_.size()); });
  frozen_.push_back(std::move(frozen));
  run_active();
}

/// The entry has its method, and that its experts.
void Peft::make_ready(MethodEntry& entry) {
  if (entry.method == nullptr) entry.method = method_of_directory(*entry.init_from, entry.name);
  attach_experts(*entry.method);
}

void Peft::attach(MethodEntry& entry, const std::string& resume) {
  const size_t index = trained_.size();
  GRAFT_CHECK(index < kMostMethods, "peft: ", index + 1, " methods, at most ", kMostMethods,
              " are allowed");
  make_ready(entry);
  if (entry.init_from) {
    check_task(*entry.init_from);
    AdapterFile(*entry.init_from).check_modules(slots_);
  }
  const std::string from = resume.empty() ? entry.init_from.value_or("") : resume;
  if (!from.empty()) entry.method->continue_from(read_saved_adapter(from));
  const size_t first = params_.all().size(), first_constant = params_.constants().size();
  AttachContext context{slots_,
                        model_.info(),
                        params_,
                        kernels::derive(random_, index + 1),
                        device_,
                        std::to_string(index) + ".",
                        !from.empty(),
                        entry.name,
                        attach_experts(*entry.method)};
  const auto before = num_adapters(slots_);
  auto head = attach_with_head(*entry.method, context,
                               [&](const std::string&) { return trains_head_.empty(); });
  if (entry.init_from) {
    check_named(*entry.init_from, slots_,
                [&](const LinearSite& site) { return site.slot->size() > before.at(&site); });
  }
  trained_.push_back({entry.name, entry.method, first, params_.all().size() - first, first_constant,
                      params_.constants().size() - first_constant, entry.init_from.value_or(""),
                      !from.empty(), std::move(head)});
  const Trained& part = trained_.back();
  const auto params = params_of(part);
  const auto constants = constants_of(part);
  const bool trains_head = std::any_of(params.begin(), params.end(), is_head);
  GRAFT_CHECK(!trains_head || trains_head_.empty(), "peft: ", entry.name,
              " trains the head, which ", trains_head_,
              " before it in the list trains already; leave it to one of them");
  if (trains_head) trains_head_ = entry.name;
  if (part.num_params + part.num_constants > 0) saved_.push_back(index);
  note_thawed(params, entry.name);
  check_composes(entry.name);
  check_replaces(before);
  check_thawed_alone();
  if (from.empty()) return;
  // Now, because how the base is stored may depend on them.
  const AdapterFile file(from);
  set_values(params, constants, file.read(params, constants), file);
}

void Peft::attach(std::vector<MethodEntry>& entries, const std::string& resume) {
  const auto is_saved = [](const MethodEntry& entry) {
    return entry.method == nullptr || !entry.method->acts_on_others();
  };
  const auto count = static_cast<size_t>(std::count_if(entries.begin(), entries.end(), is_saved));
  size_t part = 0;
  for (MethodEntry& entry : entries) make_ready(entry);
  for (MethodEntry& entry : entries) {
    const bool goes_on = !resume.empty() && is_saved(entry);
    attach(entry, goes_on ? part_directory(resume, part++, count) : "");
  }
}

std::vector<Peft::Start> Peft::starts() const {
  std::vector<Start> starts;
  for (const Trained& part : trained_) {
    if (part.goes_on) continue;
    for (const LinearSite* site : part.method->start_sites())
      starts.push_back({part.method.get(), site, part.name});
  }
  return starts;
}

void Peft::adopted() {
  for (const Trained& part : trained_) {
    if (!part.goes_on && !part.method->start_sites().empty()) part.method->adopted();
  }
}

std::vector<Method*> Peft::running() const {
  std::vector<Method*> methods;
  for (const Frozen& frozen : frozen_) {
    if (frozen.is_active) methods.push_back(frozen.method.get());
  }
  for (const Trained& part : trained_) methods.push_back(part.method.get());
  return methods;
}

bool Peft::changes_base() const {
  const auto methods = running();
  return std::any_of(methods.begin(), methods.end(),
                     [](const Method* m) { return m->changes_base(); });
}

Tensor Peft::prepare_weight(const std::string& name, Tensor w) const {
  const at::NoGradGuard no_grad;
  const LinearSite* site = slots_.find_linear(name.substr(0, name.rfind('.')));
  for (const Method* method : running()) {
    if (site != nullptr && method->changes_base()) w = method->prepare_weight(*site, w);
  }
  return w;
}

void Peft::base_is_prepared() {
  for (Method* method : running()) method->base_is_prepared();
}

void Peft::initialize(BaseWeights& base) {
  for (Frozen& frozen : frozen_) frozen.params.bind_thawed();
  params_.bind_thawed();
  check_base_copies(base);
  check_replaces({});
  for (const Frozen& frozen : frozen_) {
    frozen.method->initialize(
        base);  // may take values from the base, so the saved ones are set again
    if (frozen.head) frozen.head->initialize(base);
    set_values(frozen.params, AdapterFile(frozen.directory));
  }
  for (const Trained& part : trained_) {  // a later one may look at the values of those before it
    part.method->initialize(base);
    if (part.head) part.head->initialize(base);
    if (part.init_from.empty()) continue;
    const auto params = params_of(part);
    const auto constants = constants_of(part);
    const AdapterFile file(part.init_from);
    set_values(params, constants, file.read(params, constants), file);
  }
}

void Peft::check_base_copies(BaseWeights& base) const {
  for (const std::string& directory : directories())
    AdapterFile(directory).check_base_copies(slots_, base);
}

void Peft::check_fingerprints(const std::function<std::string()>& base) const {
  std::string this_one;
  for (const std::string& directory : directories()) {
    const std::string trained_on = base_fingerprint(directory);
    if (trained_on.empty()) continue;
    if (this_one.empty()) this_one = base();
    GRAFT_CHECK(trained_on == this_one, ExitCode::kData, directory,
                ": was trained on a base with fingerprint ", trained_on, ", this one has ",
                this_one,
                "; name the base it was trained on, or say model.any_base: true (--any-base) if "
                "this is another form of the same model");
  }
}

std::vector<std::string> Peft::directories() const {
  std::vector<std::string> all;
  for (const Frozen& frozen : frozen_) all.push_back(frozen.directory);
  for (const Trained& part : trained_) {
    if (!part.init_from.empty()) all.push_back(part.init_from);
  }
  return all;
}

void Peft::after_reduce(const StepInfo& info) {
  const auto call = [&](bool acts_on_others) {
    for (const Trained& part : trained_) {
      if (part.method->acts_on_others() == acts_on_others) part.method->after_reduce(info);
    }
  };
  call(true), call(false);  // what is added to a gradient is there when its method looks at it
}

void Peft::after_step(const StepInfo& info) {
  for (const Trained& part : trained_) part.method->after_step(info);
  params_.publish_thawed();
}

Peft::Saved Peft::save(size_t index, const BaseFacts& base) const {
  const Trained& part = trained_.at(saved_.at(index));
  const std::string type = part.method->peft_type();
  Saved saved;
  saved.config = part.method->to_peft_config(slots_);
  saved.config["peft_type"] = type.empty() ? nlohmann::json(nullptr) : nlohmann::json(type);
  saved.config["task_type"] = base.task_type;
  saved.config["base_model_name_or_path"] = base.name_or_path;
  saved.config["revision"] =
      base.revision.empty() ? nlohmann::json(nullptr) : nlohmann::json(base.revision);
  saved.config["inference_mode"] = true;
  if (part.head) {
    nlohmann::json& whole = saved.config["modules_to_save"];
    whole.push_back(slots_.find_linear("head")->hf_path);
  }
  nlohmann::json facts = saved.config.value(kOwnEntries, nlohmann::json::object());
  saved.config.erase(kOwnEntries);
  facts.update({{"method", part.name}, {"base_fingerprint", base.fingerprint}});
  if (!base.labels.empty()) facts["labels"] = base.labels;
  if (!base.created_by.empty()) facts["created_by"] = base.created_by;
  saved.metadata = {{"format", "pt"}, {kFactsKey, facts.dump()}};
  for (const Param& param : params_of(part)) {
    if (param.thawed != nullptr) {
      saved.thawed.emplace_back(param.hf_key, param.thawed);
    } else if (param.value.numel() > 0) {
      saved.tensors.emplace_back(param.hf_key, param.saved().cpu());
    }
  }
  for (const Constant& constant : constants_of(part)) {
    if (constant.is_saved) saved.tensors.emplace_back(constant.hf_key, constant.value.cpu());
  }
  return saved;
}

void Peft::load(const std::string& directory) {
  std::vector<std::vector<Tensor>> values;
  for (size_t i = 0; i < num_saved(); ++i) {
    const AdapterFile file(part_directory(directory, i, num_saved()));
    const Trained& part = trained_[saved_[i]];
    values.push_back(file.read(params_of(part), constants_of(part)));
  }
  for (size_t i = 0; i < num_saved(); ++i) {
    const Trained& part = trained_[saved_[i]];
    set_values(params_of(part), constants_of(part), values[i],
               AdapterFile(part_directory(directory, i, num_saved())));
  }
}

std::vector<Param> Peft::params_of(const Trained& part) const {
  const auto begin = params_.all().begin() + static_cast<std::ptrdiff_t>(part.first_param);
  return {begin, begin + static_cast<std::ptrdiff_t>(part.num_params)};
}

std::vector<Constant> Peft::constants_of(const Trained& part) const {
  const auto begin = params_.constants().begin() + static_cast<std::ptrdiff_t>(part.first_constant);
  return {begin, begin + static_cast<std::ptrdiff_t>(part.num_constants)};
}

std::shared_ptr<Method> method_of_directory(const std::string& directory, std::string& name) {
  const SavedAdapter adapter = read_saved_adapter(directory);
  const auto entry = adapter.config.find("peft_type");
  const std::string type =
      entry != adapter.config.end() && entry->is_string() ? entry->get<std::string>() : "";
  const std::string ours = adapter.facts.value("method", "");
  std::set<std::string> known;
  std::shared_ptr<Method>
      found;  // of several names for one type that which the file was trained by
  for (const auto& registered : methods().entries()) {
    std::shared_ptr<Method> method = registered.make();
    if (!method->peft_type().empty()) known.insert(method->peft_type());
    const bool is_ours = type.empty() && registered.name == ours;
    if (!is_ours && (type.empty() || method->peft_type() != type || !method->is_in(adapter)))
      continue;
    if (found == nullptr || registered.name == ours) found = method, name = registered.name;
  }
  if (found != nullptr) {
    found->from_peft_config(adapter);
    check_bounds(*found, directory + "/adapter_config.json");
    return found;
  }
  throw Error(ExitCode::kData, directory + "/adapter_config.json: peft_type '" + type +
                                   "' is not supported; known: " +
                                   configs::join({known.begin(), known.end()}, ", "));
}

std::string base_fingerprint(const std::string& directory) {
  const auto facts = AdapterFile(directory).facts();
  const auto found = facts.find("base_fingerprint");
  return found != facts.end() && found->is_string() ? found->get<std::string>() : "";
}

std::string part_directory(const std::string& directory, size_t index, size_t count) {
  return count == 1 ? directory : directory + "/" + std::to_string(index);
}

}  // namespace graft::peft
