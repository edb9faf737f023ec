// 4-bit storage of frozen matrices, NF4 and FP4, plain or double-quantised: the bytes of
// bitsandbytes, bit for bit. Blocks of 64 run over the flattened matrix (they may cross rows), each
// with an absmax; nested scales store the absmax as 8-bit codes in blocks of 256 around their mean.
// Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; bitsandbytes 0.50.2.
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::kernels {

enum class FourBitType { kNf4, kFp4 };
enum class Scales { kPlain, kNested };

/// A quantised matrix of n elements, b = ceil(n / 64) blocks. Every tensor may be a view into a
/// buffer of raw bytes: codes at any byte offset, float data as float32 or as uint8 bytes at an
/// offset divisible by 4.
struct FourBitCodes {
  FourBitType type = FourBitType::kNf4;
  at::Tensor codes;          ///< [ceil(n / 2)] uint8, two codes a byte, the high nibble first
  at::Tensor absmax;         ///< [b] float32, or [4 b] bytes of it; nested: [b] uint8 codes
  at::Tensor nested_absmax;  ///< [ceil(b / 256)] float32, or its bytes; undefined: absmax is plain
  float nested_offset = 0;   ///< added to every restored absmax
  at::Tensor nested_values;  ///< [256] float32 on the CPU, what nested codes stand for; undefined:
                             ///< dynamic_map()
};

/// Encodes a matrix; the same bits on CPU and CUDA and for any number of threads.
/// @param w  float32 or bfloat16, any shape, finite
/// @throws graft::Error on other types and on an empty matrix; (kData) on non-finite values and,
/// nested, on a sum of scales that float32 cannot hold
FourBitCodes quantize(const at::Tensor& w, FourBitType type, Scales scales);

/// Rebuilds a matrix: value[code] * absmax in float32, then rounded to the type of `out` (nearest
/// even). A nested absmax is restored on the way, as a product and a sum that are rounded
/// separately. The CPU back end scales the 16 values of a block once and permutes them by code:
/// 14336 x 4096, nested, to bfloat16 on 2 cores with AVX-512 takes 0.4 to 1.4 times as long as
/// storing as many bytes; the composed LibTorch calls take 75 to 600 times as long as it (five runs
/// on a shared machine, tests/bench/nf4_bench.cpp).
/// @param out  n elements, float32, bfloat16 or float16, contiguous, on the device of `q`
/// @throws graft::Error (kData) if sizes or types do not fit together
void dequantize(const FourBitCodes& q, const at::Tensor& out);

/// The type whose 16 values a checkpoint's `quant_map` [16] float32 holds.
/// @throws graft::Error (kData) if it is neither
FourBitType four_bit_type(const at::Tensor& quant_map);

/// bitsandbytes' signed dynamic 8-bit code book: [256] float32 on the CPU, sorted upwards.
const at::Tensor& dynamic_map();
/// The one without a sign, for numbers that are not negative.
const at::Tensor& unsigned_dynamic_map();

}  // namespace graft::kernels
