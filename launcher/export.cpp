#include "launcher/export.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "configs/check.h"
#include "launcher/adapter_folder.h"
#include "launcher/checkpoint/folder.h"
#include "launcher/source_weights.h"
#include "models/io/gguf_writer.h"
#include "models/io/json_file.h"
#include "models/io/safetensors.h"
#include "peft/adapter_file.h"
#include "peft/lycoris_file.h"
#include "peft/peft.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using Json = nlohmann::json;

/// Adapters on their base, as if they were to be trained on.
struct Adapted {
  std::unique_ptr<models::Model> model;
  std::unique_ptr<peft::Peft> adapters;
  peft::Peft::Saved saved;           ///< checked against the model, its config in one form
  std::optional<LoraReport> report;  ///< of a conversion
};

Adapted put_on_model(const std::string& directory, const ExportOptions& options) {
  UnloadedBase base(options.model);
  Adapted a;
  a.model = base.make_model();
  a.adapters = std::make_unique<peft::Peft>(*a.model, at::kCPU, 0);
  peft::MethodEntry entry{"", nullptr, directory};
  a.adapters->attach(entry);
  a.saved = a.adapters->save(0, {});
  const peft::AdapterFile file(directory);
  const bool has_print = !options.any_base && !peft::base_fingerprint(directory).empty();
  if (has_print || file.has_base_copies()) {
    a.adapters->check_base_copies(base.open(*a.model));
    if (has_print) a.adapters->check_fingerprints([&] { return base.fingerprint(); });
  }
  return a;
}

/// What the first adapter says of its base, for the one that takes its place.
peft::BaseFacts base_facts(const std::string& directory) {
  const auto adapter = peft::read_saved_adapter(directory);
  const auto text = [&](const char* key) {
    const auto found = adapter.config.find(key);
    return found != adapter.config.end() && found->is_string() ? found->get<std::string>() : "";
  };
  const std::string task = text("task_type");
  return {text("base_model_name_or_path"), task.empty() ? "CAUSAL_LM" : task, "", text("revision")};
}

Adapted put_on_as_lora(const ExportOptions& options) {
  UnloadedBase base(options.model);
  const auto model = base.make_model();
  peft::Peft stack(*model, at::kCPU, 0);
  const auto parts = attach_all(stack, options.adapters);
  peft::BaseWeights& weights = base.open(*model);
  if (!options.any_base) stack.check_fingerprints([&] { return base.fingerprint(); });
  stack.initialize(weights);
  auto [lora_model, lora, report] = as_lora(stack, weights, base.make_model(), options.rank);
  auto saved = lora->save(0, base_facts(parts.front()));
  return {std::move(lora_model), std::move(lora), std::move(saved), report};
}

enum class BaseCopies { kKeep, kDrop };

/// The adapter's own files. Copies of the base may be dropped once they were held against it.
peft::Peft::Saved read_adapter(const std::string& directory, BaseCopies copies) {
  peft::Peft::Saved saved;
  saved.config = models::io::read_json_file(directory + kAdapterConfig);
  GRAFT_CHECK(saved.config.is_object() && saved.config.value("peft_type", Json()).is_string(),
              directory,
              ": its method has no PEFT form (adapter_config.json names no peft_type), so no other "
              "program can read it");
  const models::io::SafetensorsFile file(directory + kAdapterWeights);
  for (const auto& entry : file.entries()) {
    if (copies == BaseCopies::kKeep || !entry.name.ends_with(peft::kBaseCopy))
      saved.tensors.emplace_back(entry.name, file.read(entry.name));
  }
  return saved;
}

/// alpha / rank of a layer, from a config whose patterns hold whole module paths.
double scale_of(const Json& config, const std::string& module, int64_t rank) {
  const Json& alphas = config.at("alpha_pattern");
  const double alpha =
      (alphas.contains(module) ? alphas.at(module) : config.at("lora_alpha")).get<double>();
  return alpha / (config.at("use_rslora").get<bool>() ? std::sqrt(static_cast<double>(rank))
                                                      : static_cast<double>(rank));
}

void export_gguf(const Adapted& a, const std::string& path) {
  const Json& config = a.saved.config;
  GRAFT_CHECK(config.at("peft_type") == "LORA",
              "export: llama.cpp holds LoRA adapters; this one is ", config.at("peft_type").dump());
  std::map<std::string, Tensor> left(a.saved.tensors.begin(), a.saved.tensors.end());
  const auto take = [&](const std::string& key) {
    Tensor t = left.contains(key) ? left[key] : Tensor();
    left.erase(key);
    return t;
  };
  const models::ModelInfo info = a.model->info();
  std::vector<std::pair<std::string, Tensor>> tensors;
  double file_alpha = 0;  // llama.cpp scales by file_alpha / the layer's rank
  for (const peft::LinearSite& site : a.adapters->slots().linears) {
    const std::string key = "base_model.model." + site.hf_path;
    const Tensor lora_a = take(key + ".lora_A.weight");
    Tensor lora_b = take(key + ".lora_B.weight");
    if (!lora_a.defined()) continue;
    GRAFT_CHECK(!(site.name == "head" && info.tied_head),
                "export: the base's head shares the embedding's table, so ",
                "llama.cpp has no tensor for the adapter at ", site.hf_path);
    const double alpha =
        scale_of(config, site.hf_path, lora_a.size(0)) * static_cast<double>(lora_a.size(0));
    const auto held = static_cast<float>(alpha);
    GRAFT_CHECK(held != 0 && std::isfinite(held), ExitCode::kNumerics, "export: alpha of ",
                site.hf_path, " is ", alpha, "; llama.cpp needs a float32 other than 0");
    if (file_alpha == 0) file_alpha = alpha;
    if (alpha != file_alpha) lora_b = lora_b * (alpha / file_alpha);
    const auto found = *a.model->names().to_gguf(site.name + ".weight");
    if (found.transform != models::Transform::kIdentity)
      lora_b = models::rope_rows_to_gguf(lora_b, info.head_dim);
    lora_b = lora_b.to(at::kFloat);
    GRAFT_CHECK(at::isfinite(lora_b).all().item<bool>(), ExitCode::kNumerics, "export: B of ",
                site.hf_path, " times ", alpha / file_alpha,
                ", its alpha in terms of the file's, leaves float32");
    tensors.emplace_back(found.name + ".lora_a", lora_a.to(at::kFloat));
    tensors.emplace_back(found.name + ".lora_b", lora_b);
  }
  GRAFT_CHECK(left.empty(), "export: llama.cpp's adapters hold LoRA of linear layers only, not ",
              left.begin()->first);
  const std::string arch =
      info.model_type == "mistral" ? "llama" : info.model_type;  // llama.cpp's name for it
  models::io::write_gguf(path,
                         {{"general.architecture", arch},
                          {"general.type", std::string("adapter")},
                          {"adapter.type", std::string("lora")},
                          {"adapter.lora.alpha", static_cast<float>(file_alpha)}},
                         tensors);
}

/// Folders of a LyCORIS file; each is put on the model, so that what cannot be used is not left.
void import_lycoris(const ExportOptions& options) {
  const std::string& file = options.adapters.front();
  GRAFT_CHECK(options.adapters.size() == 1 && options.as.empty() && options.to == "peft" &&
                  !options.model.empty(),
              "export: ", file,
              " is a file; one of LyCORIS's becomes a folder with --to peft --model BASE");
  UnloadedBase base(options.model);
  const auto model = base.make_model();
  const auto parts = peft::read_lycoris(file, peft::SlotMap(*model), base.open(*model));
  FolderReplacement output(options.output);
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::string part = peft::part_directory(output.partial_path(), i, parts.size());
    write_adapter_files(part, parts[i], parts[i].metadata);
    put_on_model(part, options);
  }
  output.commit();
}

void export_lycoris(const ExportOptions& options) {
  UnloadedBase base(options.model);
  const auto model = base.make_model();
  const peft::SlotMap slots(*model);
  peft::BaseWeights& weights = base.open(*model);
  models::io::NamedTensors tensors;
  std::set<std::string> names;
  for (const std::string& part : adapter_parts(options.adapters.front())) {
    for (auto& tensor : peft::write_lycoris(put_on_model(part, options).saved, slots, weights)) {
      GRAFT_CHECK(names.insert(tensor.first).second, "export: two adapters of ",
                  options.adapters.front(), " have a ", tensor.first,
                  "; LyCORIS has one of a kind at each module");
      tensors.push_back(std::move(tensor));
    }
  }
  models::io::write_safetensors(options.output, tensors, {{"format", "pt"}});
}

}  // namespace

std::optional<LoraReport> export_adapter(const ExportOptions& options) {
  check_unused("export", options.output);
  const bool converts = options.as == "lora", gguf = options.to == "gguf";
  const std::string& first = options.adapters.front();
  GRAFT_CHECK((!gguf && options.to != "lycoris") || !options.model.empty(), "export: --to ",
              options.to, " needs --model: names and the order of rows come from the base");
  GRAFT_CHECK(!converts || !options.model.empty(),
              "export: --as lora needs --model, the base that the adapter changes");
  GRAFT_CHECK(!converts || options.to != "lycoris",
              "export: --as lora is for peft, safetensors "
              "and gguf; --to lycoris writes each type as LyCORIS has it");
  GRAFT_CHECK(converts || options.rank == 0, "export: --rank is that of --as lora");
  const at::NoGradGuard no_grad;
  if (fs::is_regular_file(first)) {
    import_lycoris(options);
    return {};
  }
  if (!converts) {
    const auto parts = adapter_parts(first);
    const bool in_one = options.to == "lycoris" || parts.front() == first;
    GRAFT_CHECK(options.adapters.size() == 1 && in_one,
                "export: ", std::max(parts.size(), options.adapters.size()),
                " adapters; export one of them, such as ", parts.front(),
                ", or all as one with --as lora");
  }
  if (options.to == "lycoris") {
    export_lycoris(options);
    return {};
  }
  Adapted a;
  if (!options.model.empty()) a = converts ? put_on_as_lora(options) : put_on_model(first, options);
  if (gguf) {
    export_gguf(a, options.output);
    return a.report;
  }
  const peft::Peft::Saved saved =
      converts ? std::move(a.saved)
               : read_adapter(options.adapters.front(),
                              options.model.empty() ? BaseCopies::kKeep : BaseCopies::kDrop);
  if (options.to == "safetensors") {
    models::io::write_safetensors(options.output, saved.tensors,
                                  {{"format", "pt"}, {"adapter_config", saved.config.dump()}});
    return a.report;
  }
  FolderReplacement output(options.output);
  write_adapter_files(output.partial_path(), saved, {{"format", "pt"}});
  output.commit();
  return a.report;
}

}  // namespace graft::launcher
