// Token shards: HDF5 files in the format of data/FORMAT.md, read and written through the C API of
// libhdf5. A shard is treated as damaged until shown otherwise: structure is checked when it opens,
// values when they are read, and every refusal is an Error (kData) that names the file and, where
// there is one, the row.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/column.h"
#include "data/hdf5.h"

namespace graft::data {

/// Labels of a shard: of its samples, or of its tokens.
struct ShardLabels {
  std::vector<int32_t> of_sample = {};  ///< [n], indexes into names; empty: tokens have labels
  std::vector<std::string> names = {};
  /// The tokens by which a sample's label is ranked: of all names, one after the other, each with
  /// its end token; and where those of each name begin, [names + 1]. Both may be empty.
  std::vector<uint32_t> tokens = {};
  std::vector<uint64_t> offsets = {};
  std::vector<uint32_t> of_token = {};  ///< [N] in a shard to be written; read by read_token_labels

  std::span<const uint32_t> tokens_of(int32_t label) const;
};

/// A whole shard in memory, to be written.
struct TokenShardContent {
  std::string created_by;
  std::string tokenizer_sha256;  ///< of the tokenizer's file, in hexadecimal
  int64_t vocab_size = 0;
  std::vector<uint32_t> tokens;
  std::vector<uint8_t> loss_mask;       ///< one a token; 1: predicted from the tokens before it
  std::vector<uint64_t> offsets = {0};  ///< [n + 1]
  std::optional<ShardLabels> labels;

  void add(std::span<const uint32_t> sample, std::span<const uint8_t> mask);
};

/// Writes a shard: HDF5 1.10 format (its metadata is checksummed), chunked, fletcher32 on all data;
/// to a temporary name, synced, then renamed, so that a file with the final name is whole.
/// @throws graft::Error (kData) if the disk refuses
void write_token_shard(const std::string& path, const TokenShardContent& content);

/// A shard of kind `tokens`, open for reading. Offsets, labels and attributes are in memory after
/// opening. Any thread may call it; libhdf5 is entered by one thread of the process at a time.
class TokenShard {
 public:
  /// @throws graft::Error (kData) if the file is missing, damaged, of another schema or kind, or
  /// uses what the
  ///         format does not allow (links, external or virtual storage, filters that need plugins)
  explicit TokenShard(const std::string& path);

  int64_t num_samples() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t num_tokens() const { return static_cast<int64_t>(offsets_.back()); }
  /// Position of the sample's first token; begin(num_samples()) is num_tokens().
  int64_t begin(int64_t sample) const { return static_cast<int64_t>(offsets_[sample]); }
  int64_t length(int64_t sample) const { return begin(sample + 1) - begin(sample); }

  /// Tokens [begin, begin + length) of the shard.
  struct Run {
    int64_t begin = 0, length = 0;
  };

  /// Reads the tokens and the loss mask of some runs, one after the other, into spans that hold as
  /// many; one call for many runs is cheapest.
  /// @throws graft::Error (kData) naming file and row if a checksum fails, a token is not below
  /// vocab_size, a mask value is not 0 or 1, or the file was changed
  void read(std::span<const Run> runs, std::span<uint32_t> tokens,
            std::span<uint8_t> loss_mask) const;
  /// The same for one run, from position `begin` on.
  void read(int64_t begin, std::span<uint32_t> tokens, std::span<uint8_t> loss_mask) const;

  /// The labels of the tokens of some runs, indexes into labels()->names; those of tokens that are
  /// no target mean nothing.
  /// @throws graft::Error (kData) as read()
  void read_token_labels(std::span<const Run> runs, std::span<uint32_t> labels) const;

  const std::string& path() const { return path_; }
  const std::string& created_by() const { return created_by_; }
  const std::string& tokenizer_sha256() const { return tokenizer_sha256_; }
  int64_t vocab_size() const { return vocab_size_; }
  const std::optional<ShardLabels>& labels() const { return labels_; }

 private:
  int64_t row_of(int64_t position) const;
  void check_values(int64_t begin, std::span<const uint32_t> tokens,
                    std::span<const uint8_t> loss_mask) const;
  void read_label_names();
  void read_sample_labels();
  template <class Of>
  void for_each_run(std::span<const Run> runs, size_t size, Of of) const;
  void check_unchanged(std::span<const Run> runs) const;

  std::string path_;
  std::string created_by_;
  std::string tokenizer_sha256_;
  int64_t vocab_size_ = 0;
  std::vector<uint64_t> offsets_;
  std::optional<ShardLabels> labels_;
  Hdf5Handle file_;
  int descriptor_ = -1;                       // libhdf5's own
  int64_t file_bytes_ = 0, modified_ns_ = 0;  // when opened
  mutable Column<uint32_t> tokens_;           // columns learn where chunks lie
  mutable Column<uint8_t> loss_mask_;
  mutable Column<uint32_t> token_labels_;  // empty: tokens have none
};

}  // namespace graft::data
