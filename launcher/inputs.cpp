#include "launcher/inputs.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "configs/check.h"
#include "configs/schema.h"
#include "dist/comm.h"
#include "launcher/checkpoint/manifest.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

/// Hash of the files' sizes and of pieces of their bytes, evenly spread: a small file is read
/// whole, many terabytes in a second.
std::string sampled(const std::vector<std::string>& paths) {
  constexpr int64_t kPiece = int64_t{64} << 10, kMostPieces = 512;
  const int64_t pieces =
      std::clamp<int64_t>(kMostPieces / std::max<int64_t>(1, std::ssize(paths)), 2, 16);
  Digest digest;
  std::string bytes(kPiece, '\0');
  for (const std::string& path : paths) {
    std::ifstream in(path, std::ios::binary);
    const auto size = static_cast<int64_t>(fs::file_size(path));
    digest.update(&size, sizeof size);
    const int64_t last = std::max<int64_t>(0, size - kPiece);
    const int64_t count = std::min(pieces, size / kPiece + 1);
    for (int64_t i = 0; i < count; ++i) {
      in.seekg(count == 1 ? 0 : last * i / (count - 1));
      in.read(bytes.data(), kPiece);
      digest.update(bytes.data(), static_cast<size_t>(in.gcount()));
      in.clear();
    }
  }
  return digest.hex();
}

/// A file, or the files of a folder by name.
std::vector<std::string> files_of(const std::string& path) {
  if (!fs::is_directory(path)) return {path};
  std::vector<std::string> files;
  for (const auto& entry : fs::directory_iterator(path)) {
    if (entry.is_regular_file()) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

Json data_facts(const data::Corpus& corpus) {
  Digest digest;
  int64_t tokens = 0;
  std::vector<std::string> paths;
  for (const data::TokenShard& shard : corpus.shards()) {
    digest.update(shard.tokenizer_sha256().data(), shard.tokenizer_sha256().size());
    for (int64_t row = 0; row < shard.num_samples(); ++row) {
      const int64_t length = shard.length(row);
      digest.update(&length, sizeof length);
    }
    tokens += shard.num_tokens();
    paths.push_back(shard.path());
  }
  return {{"documents", corpus.num_documents()},
          {"tokens", tokens},
          {"lengths", digest.hex()},
          {"content", sampled(paths)}};
}

std::string hash_of(const std::string& text) {
  Digest digest;
  digest.update(text.data(), text.size());
  return digest.hex();
}

}  // namespace

Json input_facts(const Run& run, const data::Corpus& train) {
  Json adapters = Json::array();
  for (const std::string& directory : run.model.adapters.values)
    adapters.push_back(sampled(files_of(directory)));
  Json experts = Json::array();
  for (const peft::MethodEntry& entry : run.peft) {
    for (const std::string& directory :
         entry.method ? entry.method->experts() : std::vector<std::string>())
      experts.push_back(sampled(files_of(directory)));
  }
  Json facts = {{"data.train", data_facts(train)}, {"model.adapters", adapters}};
  if (!experts.empty()) facts["peft.adapters"] = experts;
  return facts;
}

void check_same_inputs(const World& world, const Run& run, const data::Corpus& train) {
  if (world.size() == 1) return;
  Json mine = input_facts(run, train);
  mine["configuration"] = hash_of(configs::dump(run));
  if (!run.data.eval.values.empty())
    mine["data.eval"] = data_facts(data::Corpus(run.data.eval.values));
  if (run.model.weights != "random" && fs::exists(run.model.name_or_path))
    mine["model.name_or_path"] = sampled(files_of(run.model.name_or_path));
  const auto all = dist::gather_texts(*world.host, mine.dump());
  const Json first = Json::parse(all.front());
  for (size_t rank = 1; rank < all.size(); ++rank) {
    const Json other = Json::parse(all[rank]);
    for (const auto& [key, value] : first.items()) {
      GRAFT_CHECK(other.contains(key) && other[key] == value,
                  key == "configuration" ? ExitCode::kUsage : ExitCode::kData, key, ": rank ", rank,
                  " sees another than rank 0 (", other.value(key, Json()).dump(), " there, ",
                  value.dump(), " here): all ranks must read the same files");
    }
  }
}

}  // namespace graft::launcher
