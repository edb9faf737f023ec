#include "models/io/safetensors_source.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "configs/check.h"

namespace graft::models::io {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxIndexBytes = 64u << 20;

}  // namespace

SafetensorsSource::SafetensorsSource(const std::string& path) : path_(path) {
  std::error_code unreadable;  // then the file's own opening says why
  if (fs::is_directory(path, unreadable)) {
    open_folder(path);
  } else {
    add_file(path);
  }
  find_four_bit();
  list_tensors();
}

void SafetensorsSource::open_folder(const std::string& folder) {
  // Where both exist the single file wins, as in transformers.
  for (const char* name : {"model.safetensors", "diffusion_pytorch_model.safetensors"}) {
    const std::string file = (fs::path(folder) / name).string();
    std::error_code unreadable;
    if (fs::exists(file, unreadable)) return add_file(file);
    if (fs::exists(file + ".index.json", unreadable))
      return open_shards(folder, file + ".index.json");
  }
  throw Error(ExitCode::kData, folder + ": no model.safetensors, no model.safetensors.index.json");
}

void SafetensorsSource::open_shards(const std::string& folder, const std::string& index_path) {
  const MappedFile index(index_path);
  GRAFT_CHECK(index.bytes().size() <= kMaxIndexBytes, ExitCode::kData, index_path, ": larger than ",
              kMaxIndexBytes, " bytes");
  const auto shard_of = parse_safetensors_index(index.text(), index_path);
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : shard_of) shards.insert(shard);
  for (const std::string& shard : shards) {
    add_file((fs::path(folder) / shard).string());
    for (const SafetensorsEntry& entry : files_.back().entries()) {
      const auto listed = shard_of.find(entry.name);
      GRAFT_CHECK(listed != shard_of.end() && listed->second == shard, ExitCode::kData,
                  files_.back().path(), ": holds tensor '", entry.name, "', which ", index_path,
                  listed == shard_of.end() ? " does not list" : " puts in " + listed->second);
    }
  }
  for (const auto& [tensor, shard] : shard_of) {
    GRAFT_CHECK(file_of_.contains(tensor), ExitCode::kData, index_path, ": tensor '", tensor,
                "' is not in ", shard, ", where the index puts it");
  }
}

void SafetensorsSource::add_file(const std::string& path) {
  files_.emplace_back(path);
  for (const SafetensorsEntry& entry : files_.back().entries())
    file_of_.emplace(entry.name, files_.size() - 1);
}

void SafetensorsSource::find_four_bit() {
  for (const auto& [part, file] : file_of_) {
    const std::string name(quant_state_owner(part));
    if (name.empty()) continue;
    const std::string where = files_[file].path() + ": tensor '" + part + "'";
    const at::Tensor state_bytes = files_[file].read(part);
    const std::string_view text(static_cast<const char*>(state_bytes.const_data_ptr()),
                                state_bytes.nbytes());
    const auto [state, fresh] = four_bit_.emplace(name, parse_quant_state(text, part, where));
    GRAFT_CHECK(fresh, ExitCode::kData, where, ": a second quantisation state of '", name, "'");
    for (const std::string& needed : four_bit_parts(name, state->second)) {
      GRAFT_CHECK(file_of_.contains(needed), ExitCode::kData, where, ": needs '", needed,
                  "', which is missing");
    }
  }
}

void SafetensorsSource::list_tensors() {
  std::set<std::string> hidden;
  std::map<std::string, int64_t> bytes;
  for (const auto& [name, state] : four_bit_) {
    for (const std::string& part : four_bit_parts(name, state)) {
      bytes[name] += static_cast<int64_t>(files_[file_of_.at(part)].find(part)->bytes);
      hidden.insert(part);
    }
    tensors_.push_back({name, state.shape, state.quant_type, bytes[name]});
  }
  for (const auto& [name, file] : file_of_) {
    if (hidden.contains(name) || !quant_state_owner(name).empty()) continue;
    const SafetensorsEntry& entry = *files_[file].find(name);
    tensors_.push_back({name, entry.shape, entry.dtype, static_cast<int64_t>(entry.bytes)});
  }
  std::sort(tensors_.begin(), tensors_.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
}

at::Tensor SafetensorsSource::read_stored(const std::string& name) const {
  return files_[file_of_.at(name)].read(name);
}

FourBit SafetensorsSource::read_matrix(const std::string& name, const QuantState& state) const {
  const std::string where = path_ + ": tensor '" + name + "'";
  return read_four_bit_matrix(name, state, where,
                              [&](const std::string& part) { return read_stored(part); });
}

at::Tensor SafetensorsSource::read(const std::string& name) {
  GRAFT_CHECK(find(name) != nullptr, ExitCode::kData, path_, ": no tensor '", name, "'");
  const auto state = four_bit_.find(name);
  if (state == four_bit_.end()) return read_stored(name);
  return dequantize(read_matrix(name, state->second), state->second.dtype);
}

std::optional<FourBit> SafetensorsSource::read_four_bit(const std::string& name) {
  const auto state = four_bit_.find(name);
  if (state == four_bit_.end()) return std::nullopt;
  return read_matrix(name, state->second);
}

std::string SafetensorsSource::describe() const {
  return path_ + " (safetensors, " + std::to_string(files_.size()) +
         (files_.size() == 1 ? " file" : " files") + (four_bit_.empty() ? ")" : ", 4-bit)");
}

}  // namespace graft::models::io
