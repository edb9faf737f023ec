// TensorSource over safetensors: one file, or a Hugging Face folder with one file or an index of
// shards. A matrix that bitsandbytes stored in 4 bits appears as one tensor of its true shape and
// dtype "nf4" or "fp4".
#pragma once

#include <map>
#include <string>
#include <vector>

#include "models/io/bitsandbytes.h"
#include "models/io/safetensors.h"
#include "models/io/source.h"

namespace graft::models::io {

class SafetensorsSource : public TensorSource {
 public:
  /// @param path  a .safetensors file, or a folder with
  /// {model,diffusion_pytorch_model}.safetensors[.index.json]
  /// @throws graft::Error (kData): see SafetensorsFile; also an index and shards that do not list
  /// the same tensors
  explicit SafetensorsSource(const std::string& path);

  const std::vector<SourceTensor>& tensors() const override { return tensors_; }
  /// As stored; a 4-bit matrix in the dtype it had before quantisation.
  at::Tensor read(const std::string& name) override;
  std::optional<FourBit> read_four_bit(const std::string& name) override;
  std::string describe() const override;

 private:
  void open_folder(const std::string& folder);
  void open_shards(const std::string& folder, const std::string& index_path);
  void add_file(const std::string& path);
  void find_four_bit();
  void list_tensors();
  at::Tensor read_stored(const std::string& name) const;
  FourBit read_matrix(const std::string& name, const QuantState& state) const;

  std::string path_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, size_t> file_of_;       ///< every stored tensor -> its place in files_
  std::map<std::string, QuantState> four_bit_;  ///< by the matrix's name
  std::vector<SourceTensor> tensors_;
};

}  // namespace graft::models::io
