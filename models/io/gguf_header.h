// The GGUF format (versions 2 and 3, little-endian) without tensors: what comes before the data,
// read and written. Free of LibTorch, so that it can be fuzzed. Format: "GGUF", u32 version, u64
// tensor count, u64 metadata count, the metadata, one record a tensor, padding to
// `general.alignment`, data. Source: ggml's docs/gguf.md; where that is silent, what llama.cpp
// refuses is refused.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace graft::models::io {

/// Element types this project reads; the numbers are ggml's.
enum class GgmlType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ40 = 2,
  kQ41 = 3,
  kQ50 = 6,
  kQ51 = 7,
  kQ80 = 8,
  kQ4K = 12,
  kQ5K = 13,
  kQ6K = 14,
  kBF16 = 30,
};

struct GgmlTypeInfo {
  GgmlType type;
  std::string_view name;  ///< "Q4_1"
  int64_t block_elems;    ///< a row is cut into blocks of so many elements
  int64_t block_bytes;
};

/// nullptr if the number is none of GgmlType.
const GgmlTypeInfo* find_ggml_type(uint32_t type);
const GgmlTypeInfo& ggml_type_info(GgmlType type);

/// A metadata list. The index of the alternative is the format's element type; lists of lists are
/// refused.
using GgufArray =
    std::variant<std::vector<uint8_t>, std::vector<int8_t>, std::vector<uint16_t>,
                 std::vector<int16_t>, std::vector<uint32_t>, std::vector<int32_t>,
                 std::vector<float>, std::vector<bool>, std::vector<std::string>, std::monostate,
                 std::vector<uint64_t>, std::vector<int64_t>, std::vector<double>>;
/// A metadata value. The index of the alternative is the format's value type.
using GgufValue = std::variant<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, float, bool,
                               std::string, GgufArray, uint64_t, int64_t, double>;

/// The metadata, read by type. Files differ in integer widths, so any that holds the value is
/// accepted. The getters throw graft::Error (kData), naming file and key, if the key is absent or
/// of another kind.
class GgufMetadata {
 public:
  using Map = std::map<std::string, GgufValue, std::less<>>;
  GgufMetadata() = default;
  GgufMetadata(std::string path, Map values) : path_(std::move(path)), values_(std::move(values)) {}

  bool has(std::string_view key) const { return values_.contains(key); }
  int64_t get_int(std::string_view key) const;
  double get_float(std::string_view key) const;
  bool get_bool(std::string_view key) const;
  const std::string& get_string(std::string_view key) const;
  const std::vector<std::string>& get_strings(std::string_view key) const;
  std::vector<int64_t> get_ints(std::string_view key) const;
  std::vector<float> get_floats(std::string_view key) const;
  const Map& values() const { return values_; }

 private:
  const GgufValue& at(std::string_view key) const;
  template <class T>
  const T& as(std::string_view key, const char* kind) const;
  template <class T>
  const T& as_list(std::string_view key, const char* kind) const;

  std::string path_;
  Map values_;
};

struct GgufTensor {
  std::string name;
  std::vector<int64_t> shape;  ///< torch order: the file's dimensions reversed
  GgmlType type = GgmlType::kF32;
  uint64_t offset = 0;  ///< from the start of the file
  uint64_t bytes = 0;
  bool operator==(const GgufTensor&) const = default;
};

struct GgufHeader {
  uint32_t version = 0;
  GgufMetadata metadata;
  std::vector<GgufTensor> tensors;  ///< in file order, which is the order of their data
};

/// Parses and checks everything before the data of a whole file.
/// @param path  for messages
/// @throws graft::Error (kData): wrong magic or version; counts, lengths or dimensions that
/// overflow or pass the file's
///         end; duplicate names; unknown types; bools other than 0 and 1; nested lists; an
///         alignment that is not a u32 power of two from 8; data not exactly in the order of the
///         records, each padded to the alignment
GgufHeader parse_gguf_header(std::span<const std::byte> file, const std::string& path);

/// Fills the tensors' `bytes` and `offset` and returns everything that comes before the data,
/// version 3, alignment 32.
/// @param metadata  in the order to write; must not hold general.alignment
/// @throws graft::Error for a name that is too long or given twice, or a shape the format lacks
std::string layout_gguf(const std::vector<std::pair<std::string, GgufValue>>& metadata,
                        std::vector<GgufTensor>& tensors);

inline constexpr uint64_t kGgufAlignment =
    32;  ///< of the files we write, and of those that do not say

}  // namespace graft::models::io
