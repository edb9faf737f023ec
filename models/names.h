// NameMap: one table a family that says what our weights are called elsewhere. It loads, exports,
// and gives adapters their Hugging Face keys; there is no name logic beside it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace graft::models {

/// What happens to a tensor between a file and us. A closed set, each invertible.
enum class Transform {
  kIdentity,
  kPermuteRopeQ,  ///< llama-arch GGUF keeps adjacent rotary pairs: rows are put back in halves, by
                  ///< query heads
  kPermuteRopeK,  ///< the same by key heads
};

/// `{i}` stands for the layer number.
struct NameRow {
  std::string_view ours;  ///< "block.{i}.attn.q.weight"
  std::string_view hf;    ///< "model.layers.{i}.self_attn.q_proj.weight"
  std::string_view gguf;  ///< "blk.{i}.attn_q.weight"
  Transform from_gguf = Transform::kIdentity;
};

class NameMap {
 public:
  /// @param rows   the table
  /// @param drops  Hugging Face names that are known and not needed, as suffixes
  /// (".rotary_emb.inv_freq")
  NameMap(std::vector<NameRow> rows, std::vector<std::string_view> drops)
      : rows_(std::move(rows)), drops_(std::move(drops)) {}

  struct Found {
    std::string name;
    Transform transform = Transform::kIdentity;
  };
  /// The name of our weight in a Hugging Face file, or in a GGUF file.
  std::optional<Found> to_hf(std::string_view ours) const;
  std::optional<Found> to_gguf(std::string_view ours) const;
  /// Our name of a Hugging Face weight.
  std::optional<std::string> from_hf(std::string_view hf) const;
  bool dropped(std::string_view hf) const;

  /// The module path behind a slot: "block.3.attn.q" -> "model.layers.3.self_attn.q_proj".
  std::string hf_module(std::string_view slot) const;
  std::optional<std::string> slot_of_hf_module(std::string_view module) const;
  /// Our role for a Hugging Face suffix, "q_proj" -> "attn.q", as far as the table knows it.
  std::optional<std::string> role_of_hf_suffix(std::string_view suffix) const;

 private:
  std::vector<NameRow> rows_;
  std::vector<std::string_view> drops_;
};

/// The tail of a slot name after its block: "block.3.attn.q" -> "attn.q"; "embed" stays.
std::string role_of(std::string_view slot);

}  // namespace graft::models
