// Shards for tests: made-up documents whose every token tells where it belongs, in a folder that
// goes with the test.
#pragma once

#include <stdlib.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "data/shard_file.h"

namespace graft::data {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "graft-data-XXXXXX").string();
    path_ = ::mkdtemp(name.data());
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline constexpr int64_t kTestVocabulary = 1 << 24;

/// Token t of a document: 4096 * document + t % 4096, so a token names its document.
inline std::vector<uint32_t> test_tokens(int64_t document, int64_t length) {
  std::vector<uint32_t> tokens(length);
  for (int64_t t = 0; t < length; ++t)
    tokens[t] = static_cast<uint32_t>(4096 * document + t % 4096);
  return tokens;
}

/// A shard of documents first_document, first_document + 1, ...; the first third of each is not a
/// target.
inline TokenShardContent test_content(const std::vector<int64_t>& lengths,
                                      int64_t first_document = 0) {
  TokenShardContent content;
  content.created_by = "graft tests";
  content.tokenizer_sha256 = std::string(64, 'a');
  content.vocab_size = kTestVocabulary;
  for (size_t i = 0; i < lengths.size(); ++i) {
    std::vector<uint8_t> mask(lengths[i], 1);
    std::fill_n(mask.begin(), lengths[i] / 3, 0);
    content.add(test_tokens(first_document + static_cast<int64_t>(i), lengths[i]), mask);
  }
  return content;
}

/// Lengths like those of real instruction data: log-normal, median about 150, a long tail.
inline std::vector<int64_t> realistic_lengths(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(5.0, 0.9);
  std::vector<int64_t> lengths(count);
  for (int64_t& length : lengths) length = 2 + static_cast<int64_t>(std::exp(normal(random)));
  return lengths;
}

inline std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// A new file of this name, as a rename would put it there.
inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::filesystem::remove(path);
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(bytes.data(), bytes.size());
}

/// Where a run of tokens lies in a file, in bytes: to damage exactly that.
inline size_t find_tokens(const std::string& bytes, const std::vector<uint32_t>& tokens) {
  const std::string_view pattern(reinterpret_cast<const char*>(tokens.data()), 4 * tokens.size());
  return bytes.find(pattern);
}

}  // namespace graft::data
