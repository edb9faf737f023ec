// TensorSource over a GGUF file. Names are llama.cpp's; q and k rows of llama-architecture files
// are in its rotated order, which the name table of the model undoes.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "models/io/gguf_header.h"
#include "models/io/mapped_file.h"
#include "models/io/source.h"

namespace graft::models::io {

class GgufSource : public TensorSource {
 public:
  /// @throws graft::Error (kData): see parse_gguf_header
  explicit GgufSource(const std::string& path);

  const std::vector<SourceTensor>& tensors() const override { return tensors_; }
  /// F32, F16 and BF16 as stored; all others dequantised to float32.
  at::Tensor read(const std::string& name) override;
  std::string describe() const override;
  /// Hyperparameters and tokenizer.
  const GgufMetadata& metadata() const { return header_.metadata; }

 private:
  MappedFile file_;
  GgufHeader header_;
  std::map<std::string, const GgufTensor*> by_name_;
  std::vector<SourceTensor> tensors_;
};

}  // namespace graft::models::io
