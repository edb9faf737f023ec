#include "launcher/inspect.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "configs/check.h"
#include "data/shard_file.h"
#include "launcher/adapter_folder.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/inspect_adapter.h"
#include "models/base.h"
#include "models/io/gguf_source.h"
#include "models/io/json_file.h"
#include "models/io/open_source.h"
#include "models/io/safetensors.h"
#include "models/match.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using models::io::SafetensorsFile;

/// Copies the entries that are there and say something.
void copy_facts(const nlohmann::json& from, std::initializer_list<const char*> keys, Facts& to) {
  for (const char* key : keys) {
    const auto it = from.find(key);
    if (it != from.end() && !it->is_null()) to[key] = *it;
  }
}

// --- adapters
// ---------------------------------------------------------------------------------------------------

Inspection inspect_adapters(const std::string& directory) {
  const auto parts = adapter_parts(directory);
  if (parts.front() == directory) return inspect_adapter(directory);
  Inspection result;
  result.facts["kind"] = "adapters in order";
  for (const std::string& part : parts) {
    const Inspection one = inspect_adapter(part);
    result.facts[fs::path(part).filename()] = one.facts;
    result.sound = result.sound && one.sound;
  }
  return result;
}

Inspection inspect_checkpoint(const std::string& directory) {
  Inspection result;
  result.facts["kind"] = "checkpoint";
  const std::string problem = verify(directory);
  result.facts["manifest"] = problem.empty() ? "every file is there and has its hash" : problem;
  result.sound = problem.empty();
  if (!result.sound) return result;
  copy_facts(models::io::read_json_file(directory + "/trainer.json"),
             {"step", "max_steps", "world", "lanes_per_step", "epoch", "position", "tokens",
              "best_step", "best_eval_loss", "base_fingerprint"},
             result.facts);
  result.facts["config"] = directory + "/config.yaml";
  const Inspection adapter = inspect_adapters(directory);
  result.facts["adapter"] = adapter.facts;
  result.sound = adapter.sound;
  return result;
}

// --- data
// -------------------------------------------------------------------------------------------------------

/// Reads every token, so that every chunk's checksum is tried.
Inspection inspect_shard(const std::string& path) {
  constexpr int64_t kChunk = 1 << 20;
  const data::TokenShard shard(path);
  std::vector<uint32_t> tokens(kChunk);
  std::vector<uint8_t> mask(kChunk);
  int64_t targets = 0;
  for (int64_t begin = 0; begin < shard.num_tokens(); begin += kChunk) {
    const auto count = static_cast<size_t>(std::min(kChunk, shard.num_tokens() - begin));
    shard.read(begin, std::span(tokens).first(count), std::span(mask).first(count));
    if (shard.labels() && shard.labels()->of_sample.empty()) {
      const data::TokenShard::Run run{begin, static_cast<int64_t>(count)};
      shard.read_token_labels({&run, 1}, std::span(tokens).first(count));
    }
    targets +=
        std::count(mask.begin(), mask.begin() + static_cast<std::ptrdiff_t>(count), uint8_t{1});
  }
  int64_t longest = 0;
  for (int64_t i = 0; i < shard.num_samples(); ++i) longest = std::max(longest, shard.length(i));
  Facts facts{{"kind", "token shard"},
              {"graft_schema", 1},
              {"samples", shard.num_samples()},
              {"tokens", shard.num_tokens()},
              {"longest_sample", longest},
              {"target_tokens", targets},
              {"target_share",
               shard.num_tokens() == 0
                   ? 0.0
                   : static_cast<double>(targets) / static_cast<double>(shard.num_tokens())},
              {"vocab_size", shard.vocab_size()},
              {"tokenizer_sha256", shard.tokenizer_sha256()},
              {"created_by", shard.created_by()}};
  if (shard.labels()) facts["labels"] = shard.labels()->names;
  facts["xxh3_128"] = facts_of(path).hash;
  facts["health"] = "every token was read and is good";
  return {facts};
}

// --- models
// -----------------------------------------------------------------------------------------------------

bool is_supported(const std::string& model_type) {
  for (const auto& family : models::families()) {
    if (std::find(family.model_types.begin(), family.model_types.end(), model_type) !=
        family.model_types.end())
      return true;
  }
  return false;
}

/// A model's shape, and whether its tensors are those of the shape (a kData error if not).
void add_model_facts(const nlohmann::json& config, const models::io::TensorSource& source,
                     Facts& facts) {
  const std::string type = models::model_type_of(config);
  copy_facts(config,
             {"model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
              "max_position_embeddings", "tie_word_embeddings"},
             facts);
  add_tensor_facts(source.tensors(), facts);
  if (is_supported(type)) {
    models::match_weights(*models::make_model(config), source);
    facts["health"] = "tensors and config agree";
  } else {
    facts["health"] = "not a family that Graft trains: only listed";
  }
}

Inspection inspect_model_folder(const std::string& directory) {
  const auto source = models::io::open_source(directory);
  Facts facts{{"kind", "model folder"}, {"files", source->describe()}};
  add_model_facts(models::read_base_config(directory), *source, facts);
  facts["tokenizer"] =
      fs::exists(directory + "/tokenizer.json") || fs::exists(directory + "/tokenizer.model");
  return {facts};
}

Inspection inspect_gguf(const std::string& path) {
  const models::io::GgufSource source(path);
  const auto& metadata = source.metadata();
  const std::string& arch = metadata.get_string("general.architecture");
  if (metadata.has("general.type") && metadata.get_string("general.type") == "adapter") {
    Facts facts{{"kind", "GGUF adapter"},
                {"adapter_type", metadata.get_string("adapter.type")},
                {"architecture", arch},
                {"alpha", metadata.get_float("adapter.lora.alpha")}};
    add_tensor_facts(source.tensors(), facts);
    return {facts};
  }
  Facts facts{{"kind", "GGUF model"}, {"files", source.describe()}};
  add_model_facts(
      is_supported(arch) ? models::read_base_config(path) : nlohmann::json{{"model_type", arch}},
      source, facts);
  facts["tokenizer"] = metadata.has("tokenizer.ggml.tokens");
  return {facts};
}

Inspection inspect_safetensors(const std::string& path) {
  const SafetensorsFile file(path);
  Facts facts{{"kind", "safetensors file"}};
  add_tensor_facts(file.entries(), facts);
  facts["metadata"] = file.metadata();
  return {facts};
}

std::string first_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::string bytes(8, '\0');
  in.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

Inspection inspect_any(const std::string& path) {
  constexpr const char* kExpected =
      "expected an adapter, checkpoint or model folder, a token shard (.h5), a .gguf or a "
      ".safetensors file";
  GRAFT_CHECK(fs::exists(path), ExitCode::kData, path, ": does not exist; ", kExpected);
  if (fs::is_directory(path)) {
    const auto has = [&](const char* name) { return fs::exists(fs::path(path) / name); };
    if (has(kManifestFile) || has("trainer.json")) return inspect_checkpoint(path);
    if (has("adapter_config.json") || has("0/adapter_config.json")) return inspect_adapters(path);
    if (has("config.json")) return inspect_model_folder(path);
    throw Error(
        ExitCode::kData,
        path + ": a folder of no known kind" +
            (has("checkpoints") ? " (a run: name its adapter or one of its checkpoints)" : "") +
            "; " + kExpected);
  }
  // Opening a pipe would wait for its writer.
  GRAFT_CHECK(fs::is_regular_file(path), ExitCode::kData, path, ": not a regular file; ",
              kExpected);
  const std::string extension = fs::path(path).extension(), magic = first_bytes(path);
  if (magic == "\x89HDF\r\n\x1a\n" || extension == ".h5" || extension == ".hdf5")
    return inspect_shard(path);
  if (magic.starts_with("GGUF") || extension == ".gguf") return inspect_gguf(path);
  if (extension == ".safetensors") return inspect_safetensors(path);
  throw Error(ExitCode::kData, path + ": a file of no known kind; " + kExpected);
}

}  // namespace

Inspection inspect(const std::string& path, const std::string& model) {
  Inspection result = inspect_any(path);
  Facts facts{{"path", path}};
  if (!model.empty()) {
    GRAFT_CHECK(fs::is_directory(path) && !fs::exists(fs::path(path) / "config.json"),
                "inspect: --model is for adapters, and ", path, " is none");
    inspect_on_model(adapter_parts(path), model, result);
  }
  facts.update(result.facts);
  return {facts, result.sound};
}

}  // namespace graft::launcher
