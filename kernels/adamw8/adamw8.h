// AdamW with both moments in 8 bits: blocks of 256 elements, each a code of bitsandbytes' dynamic
// map (signed for m, unsigned for v) times the block's largest magnitude. A block is decoded, moved
// and encoded again while it is in the cache. Gain over decoding, adamw() and encoding by
// LibTorch's calls (ops_bench, one thread): 4.9 million elements 598 to 23 ms, with the same bits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "kernels/adamw/adamw.h"

namespace graft::kernels {

constexpr int64_t kAdamW8Block = 256;

/// One moment of a parameter of n elements.
struct EightBitMoment {
  at::Tensor codes;   ///< [n] uint8
  at::Tensor absmax;  ///< [ceil(n / 256)] float32; of zeros: the moment is zero
};

/// What adamw() does, with moments that are 8 bits between the steps. The parameter moves by the
/// moments before they are rounded. Encoding takes the nearest value of the map, as bitsandbytes'
/// quantize_blockwise; its fused CUDA optimiser also moves a rounded m to its old sign, which we
/// do not: it would turn every negative m below the map's resolution away from zero, and no
/// positive one.
/// Elementwise in blocks that begin at a parameter's first element, so the bits depend neither on
/// the thread count nor on how parameters are grouped.
/// All lists have the same length; parameters and gradients float32, contiguous, on one device with
/// the moments.
/// @param step  number of this step, from 1
/// @throws graft::Error if lists, shapes, dtypes or the step do not fit
/// Source: Dettmers et al. 2022, arXiv:2110.02861, sec. 2.
void adamw_8bit(at::TensorList parameters, at::TensorList gradients,
                const std::vector<EightBitMoment>& first_moments,
                const std::vector<EightBitMoment>& second_moments, int64_t step,
                const AdamWConfig& config);

}  // namespace graft::kernels
