// bitsandbytes' 4-bit matrices as safetensors files hold them: X.weight with the codes, beside it
// X.weight.absmax, .quant_map, .nested_absmax, .nested_quant_map and a JSON text in
// .quant_state.bitsandbytes__nf4 (or fp4). Source: bitsandbytes 0.50.2,
// functional.QuantState.as_dict and from_dict.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/nf4/nf4.h"
#include "models/io/source.h"

namespace graft::models::io {

/// What the JSON text of a matrix says.
struct QuantState {
  std::string quant_type;                        ///< "nf4" or "fp4"
  std::vector<int64_t> shape;                    ///< [out, in]
  at::ScalarType dtype = at::ScalarType::Float;  ///< of the matrix before it was quantised
  bool nested = false;
  float nested_offset = 0;
};

/// @param part   the tensor's name, which ends in the quantisation type
/// @param where  file and tensor, for messages
/// @throws graft::Error (kData) on unknown keys, other block sizes than 64 (256 nested), other
/// types, odd shapes
QuantState parse_quant_state(std::string_view text, std::string_view part,
                             const std::string& where);

/// "X.weight" if the name is that of X.weight's quant state, else empty.
std::string_view quant_state_owner(std::string_view part);
/// The names of all tensors of a matrix but the state: the matrix's own first.
std::vector<std::string> four_bit_parts(const std::string& name, const QuantState& state);

/// Reads the parts and holds their dtypes and sizes against the state. `quant_storage` of any dtype
/// is accepted: the bytes are the same. @throws graft::Error (kData): a part that does not fit, or
/// a code book that is not the type's
FourBit read_four_bit_matrix(const std::string& name, const QuantState& state,
                             const std::string& where,
                             const std::function<at::Tensor(const std::string&)>& read_part);

/// A matrix as the tensors of a file, in the form that transformers reads.
/// @param shape  [out, in]
/// @param dtype  of the matrix before it was quantised
std::vector<std::pair<std::string, at::Tensor>> four_bit_tensors(const std::string& name,
                                                                 const kernels::FourBitCodes& codes,
                                                                 at::IntArrayRef shape,
                                                                 at::ScalarType dtype);

/// The dense matrix, computed in float32. @return [out, in] in `dtype`
at::Tensor dequantize(const FourBit& matrix, at::ScalarType dtype);

}  // namespace graft::models::io
