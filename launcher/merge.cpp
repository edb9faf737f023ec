#include "launcher/merge.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <span>

#include "configs/check.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/facts.h"
#include "launcher/progress.h"
#include "launcher/source_weights.h"
#include "launcher/tokenizer_pipe.h"
#include "models/base.h"
#include "models/io/gguf_source.h"
#include "models/io/open_source.h"
#include "models/io/safetensors.h"
#include "models/match.h"
#include "peft/peft.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using Json = nlohmann::json;
using AdapterSlot = models::Slot<models::LinearAdapter>;

constexpr const char* kTokenizerFile = "tokenizer.json";
/// What a folder has beside config.json and weights that the merged one needs too.
constexpr const char* kCompanions[] = {kTokenizerFile,
                                       "tokenizer_config.json",
                                       "special_tokens_map.json",
                                       "added_tokens.json",
                                       "vocab.json",
                                       "merges.txt",
                                       "tokenizer.model",
                                       "chat_template.jinja",
                                       "generation_config.json"};

/// One tensor of the folder to be written.
struct Planned {
  std::string name;  ///< Hugging Face's
  at::ScalarType dtype;
  const models::MatchedWeight* from;
  const AdapterSlot* slot;                   ///< with adapters, or null
  std::function<Tensor()> replacement = {};  ///< gives the tensor that takes the base's place

  int64_t bytes() const {
    return from->weight->numel() * static_cast<int64_t>(c10::elementSize(dtype));
  }
};

const char* dtype_name(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "BF16" : dtype == at::kHalf ? "F16" : "F32";
}

at::ScalarType output_dtype(const std::string& option, const std::string& stored) {
  if (option == "bfloat16") return at::kBFloat16;
  if (option == "auto" && stored == "BF16") return at::kBFloat16;
  if (option == "auto" && stored == "F16") return at::kHalf;
  return at::kFloat;
}

/// Where each adapted matrix's adapters are. Nothing else may be adapted.
std::map<std::string, const AdapterSlot*> adapted_slots(const peft::SlotMap& slots) {
  const auto refuse = [](const auto& sites) {
    for (const auto& site : sites) {
      GRAFT_CHECK(site.slot->empty(), "merge: an adapter acts at ", site.name,
                  ", which is no matrix; only changes of matrices can be merged");
    }
  };
  refuse(slots.sublayers), refuse(slots.attentions), refuse(slots.sequences);
  refuse(slots.tensors), refuse(slots.carries), refuse(slots.losses);
  std::map<std::string, const AdapterSlot*> adapted;
  for (const auto* sites : {&slots.linears, &slots.gains}) {
    for (const peft::LinearSite& site : *sites) {
      for (const auto& adapter : site.slot->adapters()) {
        GRAFT_CHECK(adapter->mergeable(), "merge: the adapter at ", site.name,
                    " is not a change of its matrix alone (a bias, say) and cannot be merged");
      }
      if (!site.slot->empty()) adapted[site.name + ".weight"] = site.slot;
    }
  }
  return adapted;
}

/// The tensors to write, in the model's order.
std::vector<Planned> plan(const std::vector<models::MatchedWeight>& weights,
                          const peft::Peft& adapters, const models::ModelInfo& info,
                          const std::string& dtype) {
  const peft::SlotMap& slots = adapters.slots();
  auto adapted = adapted_slots(slots);
  auto replaced = adapters.replaced_weights();
  GRAFT_CHECK(!adapted.empty() || !replaced.empty(), ExitCode::kData,
              "merge: the adapters change no matrix");
  const bool untie =
      info.tied_head && (adapted.contains("embed.weight") || adapted.contains("head.weight"));
  const auto slot_of = [&](const std::string& name) {
    return adapted.contains(name) ? adapted[name] : nullptr;
  };
  std::vector<Planned> planned;
  for (const models::MatchedWeight& w : weights) {
    const at::ScalarType type = output_dtype(dtype, w.source->dtype);
    planned.push_back(
        {slots.names->to_hf(w.name)->name, type, &w, slot_of(w.name), replaced[w.name]});
    // The head reads the untouched table: once the embedding differs from it, or the head does,
    // there are two.
    if (untie && w.name == "embed.weight") {
      planned.push_back({slots.names->to_hf("head.weight")->name, type, &w, slot_of("head.weight"),
                         replaced[w.name]});
    }
  }
  return planned;
}

double energy(const Tensor& t) { return t.to(at::kDouble).square().sum().item<double>(); }

/// Reads, merges and rounds one tensor.
Tensor merged_tensor(const Planned& item, models::io::TensorSource& source, int64_t head_dim,
                     MergeReport& report) {
  Tensor stored = source.read(item.from->source->name);
  if (item.from->transform != models::Transform::kIdentity)
    stored = models::rope_rows_from_gguf(stored, head_dim);
  if (item.slot == nullptr && !item.replacement) return stored.to(item.dtype);
  const Tensor base = stored.to(at::kFloat);
  Tensor merged = item.replacement ? item.replacement().to(at::kFloat) : base;
  if (item.slot != nullptr) {
    for (const auto& adapter : item.slot->adapters()) merged = adapter->merged(merged);
  }
  Tensor written = merged.to(item.dtype);
  GRAFT_CHECK(at::isfinite(written).all().item<bool>(), ExitCode::kNumerics, "merge: ", item.name,
              " holds numbers that ", dtype_name(item.dtype),
              " cannot; use --dtype float32 or bfloat16");
  const Tensor change = merged - base;
  const Tensor kept = written.to(at::kFloat) - base.to(item.dtype).to(at::kFloat);
  report.tensors.push_back({item.name, energy(change), energy(kept - change)});
  return written;
}

/// Cuts the tensors, in order, into files of at most `limit` bytes (a larger tensor has one of its
/// own).
std::vector<std::vector<Planned>> cut(const std::vector<Planned>& planned, int64_t limit) {
  std::vector<std::vector<Planned>> files(1);
  int64_t size = 0;
  for (const Planned& item : planned) {
    if (!files.back().empty() && size + item.bytes() > limit) files.emplace_back(), size = 0;
    files.back().push_back(item);
    size += item.bytes();
  }
  return files;
}

std::string file_name(size_t index, size_t count) {
  if (count == 1) return "model.safetensors";
  char name[48];
  std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", index + 1, count);
  return name;
}

/// The base's config.json for the merged weights.
Json merged_config(const std::string& model, const models::ModelInfo& info,
                   const std::vector<Planned>& planned) {
  Json config = models::read_base_config(model);
  config.erase("quantization_config");
  std::map<at::ScalarType, int64_t> bytes;
  for (const Planned& item : planned) bytes[item.dtype] += item.bytes();
  const auto most = std::max_element(bytes.begin(), bytes.end(),
                                     [](auto& a, auto& b) { return a.second < b.second; });
  const char* dtype = most->first == at::kBFloat16 ? "bfloat16"
                      : most->first == at::kHalf   ? "float16"
                                                   : "float32";
  config[config.contains("dtype") ? "dtype" : "torch_dtype"] = dtype;  // transformers 5 and 4
  const std::string head = "lm_head.weight";
  if (std::any_of(planned.begin(), planned.end(),
                  [&](const Planned& item) { return item.name == head; })) {
    config["tie_word_embeddings"] = false;
  }
  if (!fs::is_directory(model)) {
    config["architectures"] = {info.hf_class};
    const models::io::GgufSource source(model);
    for (const char* token : {"bos", "eos"}) {
      const std::string key = std::string("tokenizer.ggml.") + token + "_token_id";
      if (source.metadata().has(key))
        config[std::string(token) + "_token_id"] = source.metadata().get_int(key);
    }
  }
  return config;
}

/// Writes the tokenizer and its companions: a folder's are copied, a GGUF file's made from its
/// vocabulary. @return why there is none; empty: there is one
std::string write_tokenizer(const std::string& model, const fs::path& output) {
  if (fs::is_directory(model)) {
    for (const char* name : kCompanions) {
      if (fs::exists(fs::path(model) / name)) fs::copy_file(fs::path(model) / name, output / name);
    }
    const bool found =
        fs::exists(output / kTokenizerFile) || fs::exists(output / "tokenizer.model");
    return found ? "" : model + " has none to copy";
  }
  const models::io::GgufSource source(model);
  if (source.metadata().has("tokenizer.huggingface.json")) {
    write_text(output / kTokenizerFile, source.metadata().get_string("tokenizer.huggingface.json"));
    return "";
  }
  if (!source.metadata().has("tokenizer.ggml.model")) return model + " has none";
  try {
    for (const auto& [name, content] : TokenizerPipe(model).files())
      write_text(output / name, content);
    return "";
  } catch (const Error& error) {  // the weights are worth having without it
    return error.what();
  }
}

/// OUT.partial, which becomes OUT or goes.
class PartialFolder {
 public:
  explicit PartialFolder(const std::string& output) : final_(fs::path(output).lexically_normal()) {
    if (final_.filename().empty()) final_ = final_.parent_path();  // "out/"
    path_ = final_.string() + ".partial";
    GRAFT_CHECK(!fs::exists(final_) || (fs::is_directory(final_) && fs::is_empty(final_)),
                "merge: ", output, " exists and is not an empty folder; nothing is overwritten");
    GRAFT_CHECK(!fs::exists(path_), "merge: ", path_,
                " is left from a merge that was cut off; remove it");
    std::error_code error;
    fs::create_directories(path_, error);
    GRAFT_CHECK(!error, "merge: ", path_, " cannot be made: ", error.message());
  }
  ~PartialFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  PartialFolder(const PartialFolder&) = delete;
  PartialFolder& operator=(const PartialFolder&) = delete;
  void commit() {
    sync_directory(path_);
    fs::rename(path_, final_);
  }
  const std::string& path() const { return path_; }

 private:
  fs::path final_;
  std::string path_;
};

/// Writes one safetensors file, a tensor at a time.
void write_file(const std::string& path, const std::vector<Planned>& items,
                const std::function<Tensor(const Planned&)>& read) {
  std::vector<models::io::SafetensorsEntry> entries;
  std::map<std::string, const Planned*> by_name;
  for (const Planned& item : items) {
    entries.push_back({item.name, dtype_name(item.dtype), item.from->weight->shape()});
    by_name[item.name] = &item;
  }
  const std::string head = models::io::layout_safetensors(entries, {{"format", "pt"}});
  models::io::write_file(path, [&](const models::io::ByteSink& sink) {
    sink(std::as_bytes(std::span(head)));
    for (const auto& entry : entries) {
      const Tensor t = read(*by_name.at(entry.name)).contiguous();
      sink({static_cast<const std::byte*>(t.const_data_ptr()), t.nbytes()});
    }
  });
}

}  // namespace

double Survival::share() const { return change == 0 ? 1.0 : std::max(0.0, 1.0 - lost / change); }

MergeReport merge(const MergeOptions& options) {
  const at::NoGradGuard no_grad;
  const auto model = models::make_model(models::read_base_config(options.model));
  peft::Peft adapters(*model, at::kCPU, 0);
  for (const std::string& directory : options.adapters) {
    for (const std::string& part : adapter_parts(directory)) adapters.attach_frozen(part);
  }
  const auto source = models::io::open_source(options.model);
  const auto weights = models::match_weights(*model, *source);
  SourceWeights base(weights, *source);
  adapters.check_base_copies(base);
  const auto planned = plan(weights, adapters, model->info(), options.dtype);

  PartialFolder folder(options.output);
  MergeReport report;
  int64_t total = 0;
  for (const Planned& item : planned) total += item.bytes();
  Progress progress("merging into " + source->describe());
  const auto read = [&](const Planned& item) {
    Tensor t = merged_tensor(item, *source, model->info().head_dim, report);
    progress.update(report.bytes += item.bytes(), total);
    return t;
  };
  Json weight_map = Json::object();
  const auto files = cut(planned, options.max_file_bytes);
  for (size_t i = 0; i < files.size(); ++i) {
    const std::string name = file_name(i, files.size());
    write_file(folder.path() + "/" + name, files[i], read);
    for (const Planned& item : files[i]) weight_map[item.name] = name;
  }
  progress.finish();
  if (files.size() > 1) {
    write_text(
        folder.path() + "/model.safetensors.index.json",
        Json{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}}.dump(2) + "\n");
  }
  write_text(folder.path() + "/config.json",
             merged_config(options.model, model->info(), planned).dump(2) + "\n");
  report.without_tokenizer = write_tokenizer(options.model, folder.path());
  report.num_files = static_cast<int64_t>(files.size());
  report.total.name = "all";
  for (const Survival& s : report.tensors)
    report.total.change += s.change, report.total.lost += s.lost;
  folder.commit();
  return report;
}

}  // namespace graft::launcher
