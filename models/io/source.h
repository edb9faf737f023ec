// TensorSource: where the weights of a base come from. One implementation a file format; all of
// them treat the file as hostile. Names are the format's own; models/<family>/names.cpp maps them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace graft::models::io {

/// A tensor as the source lists it, before it is read.
struct SourceTensor {
  std::string name;
  std::vector<int64_t>
      shape;          ///< torch order, [out, in] for a linear, also where the file stores codes
  std::string dtype;  ///< as the file says: "F32", "BF16", "Q4_1", "nf4" ...
  int64_t file_bytes = 0;  ///< what reading it costs; 0: it is in no file
};

/// The 4-bit form of one matrix, as bitsandbytes defines it (blocks of 64 over the flattened
/// matrix).
struct FourBit {
  std::string quant_type;      ///< "nf4" or "fp4"
  std::vector<int64_t> shape;  ///< [out, in]
  at::Tensor codes;            ///< uint8 [ceil(n/2)], first element in the high nibble
  at::Tensor absmax;           ///< float32 [blocks], or uint8 [blocks] when nested
  at::Tensor nested_absmax;    ///< float32 [ceil(blocks/256)]; undefined unless nested
  at::Tensor nested_code;      ///< float32 [256]; undefined unless nested
  float nested_offset = 0;
  bool nested() const { return nested_absmax.defined(); }
};

class TensorSource {
 public:
  virtual ~TensorSource() = default;
  /// Sorted by name.
  virtual const std::vector<SourceTensor>& tensors() const = 0;
  /// nullptr if the source has no such tensor.
  const SourceTensor* find(std::string_view name) const;
  /// The dense tensor on the CPU: float32, bfloat16 or float16 as stored; quantised formats give
  /// float32.
  /// @throws graft::Error (kData) naming file and tensor
  virtual at::Tensor read(const std::string& name) = 0;
  /// The tensor's 4-bit codes where the file holds them (bitsandbytes), else nothing.
  virtual std::optional<FourBit> read_four_bit(const std::string& name);
  /// One line for messages: the path and format.
  virtual std::string describe() const = 0;
};

}  // namespace graft::models::io
