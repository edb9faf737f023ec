// The safetensors format without tensors: header of a file, index of a sharded checkpoint, and the
// header to write. Free of LibTorch, so that it can be fuzzed. Format: u64 little-endian N; N bytes
// of JSON {name: {dtype, shape, data_offsets}}, optional "__metadata__" of strings; then the data,
// each byte of it part of exactly one tensor. Source: the format page and code of the safetensors
// library 0.8.0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace graft::models::io {

struct SafetensorsDtype {
  std::string_view name;  ///< "F32", "BF16" ...
  uint64_t bytes;         ///< per element
};

/// All known dtypes, in the order in which the reference library writes tensors. Its sub-byte types
/// are not known here.
std::span<const SafetensorsDtype> safetensors_dtypes();
/// nullptr if unknown.
const SafetensorsDtype* find_safetensors_dtype(std::string_view name);

struct SafetensorsEntry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  uint64_t offset = 0;  ///< from the start of the file
  uint64_t bytes = 0;
  bool operator==(const SafetensorsEntry&) const = default;
};

using SafetensorsMetadata = std::map<std::string, std::string>;

struct SafetensorsHeader {
  std::vector<SafetensorsEntry>
      entries;  ///< by offset; together they cover the file from data_begin to its end
  SafetensorsMetadata metadata;
  uint64_t data_begin = 0;  ///< bytes of length field and header
};

/// Parses and checks the header of a whole file.
/// @param path  for messages
/// @throws graft::Error (kData): header longer than the file or 100 MB, JSON that is not exactly of
/// the form above, more
///         than 100,000 tensors, an unknown dtype, shape and byte range that disagree or overflow,
///         overlaps, holes
SafetensorsHeader parse_safetensors_header(std::span<const std::byte> file,
                                           const std::string& path);

/// Puts the entries (name, dtype, shape) in the order in which the reference library writes them,
/// fills their `bytes` and `offset`, and returns everything that comes before the data, padded with
/// spaces to a multiple of 8. Byte-equal to the reference library (with several metadata keys up to
/// their order: there random, here sorted).
std::string layout_safetensors(std::vector<SafetensorsEntry>& entries,
                               const SafetensorsMetadata& metadata);

/// The index of a sharded checkpoint (`*.safetensors.index.json`): tensor name -> file name in the
/// same folder. Its `total_size` is not read: published files have wrong ones and nothing here
/// depends on it.
/// @throws graft::Error (kData) on other JSON and on file names that are not plain
/// (is_plain_file_name) *.safetensors
std::map<std::string, std::string> parse_safetensors_index(std::string_view text,
                                                           const std::string& path);

}  // namespace graft::models::io
