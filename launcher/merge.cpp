#include "launcher/merge.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <span>

#include "configs/check.h"
#include "kernels/nf4/code_books.h"
#include "kernels/nf4/nf4.h"
#include "launcher/adapter_folder.h"
#include "launcher/as_lora.h"
#include "launcher/checkpoint/folder.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/progress.h"
#include "launcher/source_weights.h"
#include "launcher/tokenizer_pipe.h"
#include "models/base.h"
#include "models/io/bitsandbytes.h"
#include "models/io/gguf_source.h"
#include "models/io/safetensors.h"
#include "peft/peft.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using Json = nlohmann::json;
using AdapterSlot = models::Slot<models::LinearAdapter>;

constexpr const char* kBias = ".bias";
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
  const AdapterSlot* slot;  ///< with adapters, or null
  bool four_bit;
  std::function<Tensor()> replacement = {};  ///< gives the tensor that takes the base's place

  int64_t bytes() const {
    const int64_t n = from->weight->numel();
    return four_bit ? n / 2 + n / kernels::kBlockElems * int64_t{sizeof(float)}
                    : n * static_cast<int64_t>(c10::elementSize(dtype));
  }
};

/// A tensor as it is written, and what a reader rebuilds from it.
struct Stored {
  models::io::NamedTensors tensors;
  Tensor value;
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

/// Adapters that only add a vector where the base has one, behind all others of their slot.
std::set<const models::LinearAdapter*> changes_of_biases(const peft::SlotMap& slots) {
  std::set<const models::LinearAdapter*> found;
  for (const peft::LinearSite& site : slots.linears) {
    const auto& adapters = site.slot->adapters();
    for (auto a = adapters.rbegin(); a != adapters.rend() && site.info.has_bias; ++a) {
      if (!(*a)->merged_bias(at::zeros({site.info.out})).defined()) break;
      found.insert(a->get());
    }
  }
  return found;
}

/// The tensors to write, in the model's order.
std::vector<Planned> plan(const std::vector<models::MatchedWeight>& weights,
                          const peft::Peft& adapters, const models::ModelInfo& info,
                          const MergeOptions& options) {
  const peft::SlotMap& slots = adapters.slots();
  auto replaced = adapters.replaced_weights();
  std::map<std::string, const AdapterSlot*> adapted;
  const auto of_biases = changes_of_biases(slots);
  for (const peft::LinearSite* site : changed_matrices(slots, "merge", of_biases))
    adapted[site->name + ".weight"] = site->slot;
  for (const peft::LinearSite& site : slots.linears) {
    if (!site.slot->empty() && of_biases.contains(site.slot->adapters().back().get()))
      adapted[site.name + kBias] = site.slot;
  }
  GRAFT_CHECK(!adapted.empty() || !replaced.empty(), ExitCode::kData,
              "merge: the adapters change no matrix");
  const bool untie =
      info.tied_head && (adapted.contains("embed.weight") || adapted.contains("head.weight"));
  const auto slot_of = [&](const std::string& name) {
    return adapted.contains(name) ? adapted[name] : nullptr;
  };
  std::vector<Planned> planned;
  for (const models::MatchedWeight& w : weights) {
    const at::ScalarType type = output_dtype(options.dtype, w.source->dtype);
    const bool four_bit =
        options.quantization != "none" && w.weight->use() == models::WeightUse::kMatrix;
    planned.push_back(
        {slots.names->to_hf(w.name)->name, type, &w, slot_of(w.name), four_bit, replaced[w.name]});
    // The head reads the untouched table: once the embedding differs from it, or the head does,
    // there are two.
    if (untie && w.name == "embed.weight") {
      planned.push_back({slots.names->to_hf("head.weight")->name, type, &w, slot_of("head.weight"),
                         false, replaced[w.name]});
    }
  }
  return planned;
}

double energy(const Tensor& t) { return t.to(at::kDouble).square().sum().item<double>(); }

Stored store(const Planned& item, const Tensor& dense, const MergeOptions& options) {
  const Tensor rounded = dense.to(item.dtype);
  GRAFT_CHECK(at::isfinite(rounded).all().item<bool>(), ExitCode::kNumerics, "merge: ", item.name,
              " holds numbers that ", dtype_name(item.dtype),
              " cannot; use --dtype float32 or bfloat16");
  if (!item.four_bit) return {{{item.name, rounded}}, rounded.to(at::kFloat)};
  const auto codes = kernels::quantize(
      item.dtype == at::kHalf ? rounded.to(at::kFloat) : rounded,
      options.quantization == "nf4" ? kernels::FourBitType::kNf4 : kernels::FourBitType::kFp4,
      options.double_quantization ? kernels::Scales::kNested : kernels::Scales::kPlain);
  Tensor value = at::empty(dense.sizes(), at::kFloat);
  kernels::dequantize(codes, value);
  return {models::io::four_bit_tensors(item.name, codes, dense.sizes(), item.dtype), value};
}

/// Reads, merges and rounds one tensor.
Stored merged_tensor(const Planned& item, SourceWeights& source, const MergeOptions& options,
                     MergeReport& report) {
  const Tensor stored = source.read(*item.from);
  if (item.slot == nullptr && !item.replacement) return store(item, stored, options);
  const Tensor base = stored.to(at::kFloat);
  Tensor merged = item.replacement ? item.replacement().to(at::kFloat) : base;
  if (item.slot != nullptr) {
    const bool is_bias = item.from->name.ends_with(kBias);
    for (const auto& adapter : item.slot->adapters()) {
      if (is_bias) {
        if (const Tensor b = adapter->merged_bias(merged); b.defined()) merged = b;
      } else if (adapter->mergeable()) {
        merged = adapter->merged(merged);
      }
    }
  }
  Stored written = store(item, merged, options);
  const Tensor change = merged - base;
  const Tensor kept = written.value - store(item, base, options).value;
  report.tensors.push_back({item.name, energy(change),
                            (kept.to(at::kDouble) * change).sum().item<double>(),
                            energy(kept - change)});
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

/// As transformers writes it for what bitsandbytes has quantised; the head and the embedding are
/// not.
Json four_bit_config(const MergeOptions& options, const char* dtype) {
  return {{"quant_method", "bitsandbytes"},
          {"load_in_4bit", true},
          {"load_in_8bit", false},
          {"bnb_4bit_quant_type", options.quantization},
          {"bnb_4bit_use_double_quant", options.double_quantization},
          {"bnb_4bit_compute_dtype", dtype},
          {"bnb_4bit_quant_storage", "uint8"},
          {"llm_int8_skip_modules", {"lm_head"}}};
}

/// The base's config.json for the merged weights.
Json merged_config(const MergeOptions& options, const models::ModelInfo& info,
                   const std::vector<Planned>& planned) {
  const std::string& model = options.model;
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
  if (options.quantization != "none")
    config["quantization_config"] = four_bit_config(options, dtype);
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

/// Writes one safetensors file, a tensor at a time.
void write_file(const std::string& path, const std::vector<Planned>& items,
                const std::function<Stored(const Planned&)>& read) {
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
      const Tensor t = read(*by_name.at(entry.name)).tensors.front().second.contiguous();
      sink({static_cast<const std::byte*>(t.const_data_ptr()), t.nbytes()});
    }
  });
}

/// The same with 4-bit matrices, whose tensors lie apart in a file: they are made before it is
/// written. @return the names of all tensors
std::vector<std::string> write_four_bit_file(const std::string& path,
                                             const std::vector<Planned>& items,
                                             const std::function<Stored(const Planned&)>& read) {
  models::io::NamedTensors tensors;
  std::vector<std::string> names;
  for (const Planned& item : items) {
    for (auto& named : read(item).tensors) {
      names.push_back(named.first);
      tensors.push_back(std::move(named));
    }
  }
  models::io::write_safetensors(path, tensors, {{"format", "pt"}});
  return names;
}

}  // namespace

MergeReport merge(const MergeOptions& options) {
  const at::NoGradGuard no_grad;
  UnloadedBase unloaded(options.model);
  const auto model = unloaded.make_model();
  peft::Peft adapters(*model, at::kCPU, 0);
  attach_all(adapters, options.adapters);
  SourceWeights& base = unloaded.open(*model);
  if (!options.any_base) adapters.check_fingerprints([&] { return unloaded.fingerprint(); });
  adapters.initialize(base);
  const auto planned = plan(unloaded.matched(), adapters, model->info(), options);

  GRAFT_CHECK(!fs::exists(options.output) || fs::is_empty(options.output),
              "merge: ", options.output,
              " exists and is not an empty folder; nothing is overwritten");
  FolderReplacement output(options.output);
  const std::string folder = output.partial_path();
  MergeReport report;
  int64_t total = 0;
  for (const Planned& item : planned) total += item.bytes();
  Progress progress("merging into " + unloaded.source().describe());
  const auto read = [&](const Planned& item) {
    Stored t = merged_tensor(item, base, options, report);
    progress.update(report.bytes += item.bytes(), total);
    return t;
  };
  Json weight_map = Json::object();
  const auto files = cut(planned, options.max_file_bytes);
  for (size_t i = 0; i < files.size(); ++i) {
    const std::string name = file_name(i, files.size());
    const std::string path = folder + "/" + name;
    std::vector<std::string> names;
    if (options.quantization == "none") {
      write_file(path, files[i], read);
      for (const Planned& item : files[i]) names.push_back(item.name);
    } else {
      names = write_four_bit_file(path, files[i], read);
    }
    for (const std::string& tensor : names) weight_map[tensor] = name;
  }
  progress.finish();
  if (files.size() > 1) {
    write_text(
        folder + "/model.safetensors.index.json",
        Json{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}}.dump(2) + "\n");
  }
  write_text(folder + "/config.json",
             merged_config(options, model->info(), planned).dump(2) + "\n");
  report.without_tokenizer = write_tokenizer(options.model, folder);
  report.num_files = static_cast<int64_t>(files.size());
  report.total.name = "all";
  for (const Survival& s : report.tensors)
    report.total.change += s.change, report.total.kept += s.kept, report.total.noise += s.noise;
  output.commit();
  return report;
}

}  // namespace graft::launcher
