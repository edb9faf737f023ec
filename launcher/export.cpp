#include "launcher/export.h"

#include <ATen/ATen.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/facts.h"
#include "launcher/source_weights.h"
#include "models/base.h"
#include "models/io/gguf_writer.h"
#include "models/io/json_file.h"
#include "models/io/open_source.h"
#include "models/io/safetensors.h"
#include "models/match.h"
#include "peft/adapter_file.h"
#include "peft/peft.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using Json = nlohmann::json;

/// The adapter on its base, as if it were to be trained on: checked against the model, its config
/// in one form.
struct Adapted {
  std::unique_ptr<models::Model> model;
  std::unique_ptr<peft::Peft> adapters;
  peft::Peft::Saved saved;
};

Adapted put_on_model(const ExportOptions& options) {
  Adapted a;
  a.model = models::make_model(models::read_base_config(options.model));
  a.adapters = std::make_unique<peft::Peft>(*a.model, at::kCPU, 0);
  std::vector<peft::MethodEntry> entries{{"", nullptr, options.adapter}};
  a.adapters->attach(entries);
  a.adapters->load(options.adapter);
  a.saved = a.adapters->save(0, {});
  if (peft::AdapterFile(options.adapter).has_base_copies()) {
    const auto source = models::io::open_source(options.model);
    const auto weights = models::match_weights(*a.model, *source);
    SourceWeights base(weights, *source);
    a.adapters->check_base_copies(base);
  }
  return a;
}

enum class BaseCopies { kKeep, kDrop };

/// The adapter's own files. Copies of the base may be dropped once they were held against it.
peft::Peft::Saved read_adapter(const std::string& directory, BaseCopies copies) {
  peft::Peft::Saved saved;
  saved.config = models::io::read_json_file(directory + "/adapter_config.json");
  GRAFT_CHECK(saved.config.is_object() && saved.config.value("peft_type", Json()).is_string(),
              directory,
              ": its method has no PEFT form (adapter_config.json names no peft_type), so no other "
              "program can read it");
  const models::io::SafetensorsFile file(directory + "/adapter_model.safetensors");
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

void export_gguf(const ExportOptions& options) {
  const Adapted a = put_on_model(options);
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
    if (file_alpha == 0) file_alpha = alpha;
    if (alpha != file_alpha) lora_b = lora_b * (alpha / file_alpha);
    const auto found = *a.model->names().to_gguf(site.name + ".weight");
    if (found.transform != models::Transform::kIdentity)
      lora_b = models::rope_rows_to_gguf(lora_b, info.head_dim);
    tensors.emplace_back(found.name + ".lora_a", lora_a.to(at::kFloat));
    tensors.emplace_back(found.name + ".lora_b", lora_b.to(at::kFloat));
  }
  GRAFT_CHECK(left.empty(), "export: llama.cpp's adapters hold LoRA of linear layers only, not ",
              left.begin()->first);
  const std::string arch =
      info.model_type == "mistral" ? "llama" : info.model_type;  // llama.cpp's name for it
  models::io::write_gguf(options.output,
                         {{"general.architecture", arch},
                          {"general.type", std::string("adapter")},
                          {"adapter.type", std::string("lora")},
                          {"adapter.lora.alpha", static_cast<float>(file_alpha)}},
                         tensors);
}

}  // namespace

void export_adapter(const ExportOptions& options) {
  GRAFT_CHECK(!fs::exists(options.output), "export: ", options.output,
              " exists; nothing is overwritten");
  GRAFT_CHECK(options.to != "gguf" || !options.model.empty(),
              "export: --to gguf needs --model: names and the order of rows come from the base");
  const auto parts = adapter_parts(options.adapter);
  GRAFT_CHECK(parts.front() == options.adapter, "export: ", options.adapter, " holds ",
              parts.size(), " adapters; export one of them, such as ", parts.front());
  const at::NoGradGuard no_grad;
  if (options.to == "gguf") return export_gguf(options);
  const bool checked = !options.model.empty();
  if (checked) put_on_model(options);
  const peft::Peft::Saved saved =
      read_adapter(options.adapter, checked ? BaseCopies::kDrop : BaseCopies::kKeep);
  if (options.to == "safetensors") {
    return models::io::write_safetensors(
        options.output, saved.tensors, {{"format", "pt"}, {"adapter_config", saved.config.dump()}});
  }
  fs::create_directories(options.output);
  models::io::write_safetensors(options.output + "/adapter_model.safetensors", saved.tensors,
                                {{"format", "pt"}});
  write_text(options.output + "/adapter_config.json", saved.config.dump(2) + "\n");
}

}  // namespace graft::launcher
