// safetensors files as tensors: one file to read, and the writer of everything this project saves.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/io/byte_sink.h"
#include "models/io/mapped_file.h"
#include "models/io/safetensors_header.h"

namespace graft::models::io {

class SafetensorsFile {
 public:
  /// @throws graft::Error (kData) naming the path: see parse_safetensors_header
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const std::vector<SafetensorsEntry>& entries() const { return header_.entries; }
  const SafetensorsMetadata& metadata() const { return header_.metadata; }
  /// nullptr if the file has no such tensor.
  const SafetensorsEntry* find(std::string_view name) const;
  /// A copy of the tensor, on the CPU, in its own dtype.
  /// @throws graft::Error (kData) if there is none of that name, or if a BOOL holds something else
  /// than 0 and 1
  at::Tensor read(std::string_view name) const;

 private:
  MappedFile file_;
  SafetensorsHeader header_;
  std::map<std::string_view, const SafetensorsEntry*> by_name_;
};

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// A tensor that is made when its turn to be written comes. Undefined: this rank has no part in it.
struct ComingTensor {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  std::function<at::Tensor()> make;
};
void write_safetensors(const ByteSink& sink, const std::vector<ComingTensor>& tensors,
                       const SafetensorsMetadata& metadata);

/// Writes the tensors, from any device, as the reference library would: the order of the list does
/// not matter, the bytes are the same (see layout_safetensors).
/// @throws graft::Error for a name given twice or a dtype the format lacks
void write_safetensors(const ByteSink& sink, const NamedTensors& tensors,
                       const SafetensorsMetadata& metadata);
/// The same into a file, whole or not at all (see write_file).
void write_safetensors(const std::string& path, const NamedTensors& tensors,
                       const SafetensorsMetadata& metadata);

}  // namespace graft::models::io
