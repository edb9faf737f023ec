// 8-bit storage of frozen matrices, one absmax a row: the layout of LLM.int8 checkpoints (`weight`
// int8, `SCB`). Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.1 (row-wise, without
// outlier columns); bitsandbytes 0.50.2.
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::kernels {

struct Int8Codes {
  at::Tensor codes;   ///< [out, in] int8, -127 ... 127
  at::Tensor absmax;  ///< [out] float32, or [4 out] uint8 bytes of it at an offset divisible by 4:
                      ///< the file's SCB
};

/// Encodes code = round(w * (127 / absmax of its row)), ties to even; a row of zeros encodes zeros.
/// The same bits on CPU and CUDA and for any number of threads.
/// @param w  [out, in] float32 or bfloat16, finite
/// @throws graft::Error on other shapes and types and on non-finite values
Int8Codes quantize_int8(const at::Tensor& w);

/// Rebuilds w = (code * absmax) * (1 / 127) in float32, in this order, then rounded to the type of
/// `out`.
/// @param out  [out, in] float32 or bfloat16, contiguous, on the device of `q`
/// @throws graft::Error (kData) if sizes or types do not fit together
void dequantize_int8(const Int8Codes& q, const at::Tensor& out);

}  // namespace graft::kernels
