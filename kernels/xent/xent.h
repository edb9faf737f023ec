// Cross-entropy over a vocabulary: summed over the labelled rows, never averaged (the trainer
// divides by the global number of targets). The head of a frozen model never has all its logits at
// once. Gain over mm, log_softmax, nll_loss (forward and backward, 2-thread CPU, ops_bench):
//   512 x 576 x 49152      float32 507 to 415 ms, bfloat16 276 to 101 ms; 32 MiB of logits, not 288
//   512 x 49152 (logits)   float32 112 to 52 ms, bfloat16 171 to 40 ms
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace graft::kernels {

constexpr int64_t kIgnoredLabel = -100;  ///< rows with this label have no loss and no gradient

/// Memory for the logits of one chunk of rows, in bytes.
constexpr int64_t kLogitsBytesCpu = int64_t{32} << 20;
constexpr int64_t kLogitsBytesCuda = int64_t{512} << 20;

enum class Gradient { kCompute, kSkip };

struct XentResult {
  at::Tensor loss_sum;  ///< [] float64, sum of -log softmax(logits)[label] over the labelled rows
  at::Tensor d_hidden;  ///< [N, D] in the dtype of hidden: its gradient; undefined if skipped
};

/// Loss and gradient of a head whose weight is frozen: logits = hidden weight^T, chunk by chunk
/// over labelled rows only; the logits are overwritten by softmax - onehot while they are in cache.
/// Softmax in float32; the logits and their gradient are rounded to the dtype of the weight. On
/// CUDA it waits for the number of labelled rows.
/// @param hidden        [N, D] float32 or bfloat16
/// @param weight        [V, D] float32 or bfloat16, dense
/// @param labels        [N] int64 in [0, V), or kIgnoredLabel
/// @param logits_bytes  upper bound of a chunk's logits (one row at least); 0: the constants above.
///                      It sets the shapes of the products, so the bits depend on it
/// @throws graft::Error if a shape or dtype does not fit; kData if a label is out of range
///
/// Source: the chunking of Liger Kernel, Hsu et al. 2024, arXiv:2410.10989.
XentResult frozen_head_loss(const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& labels, Gradient gradient, int64_t logits_bytes = 0);

/// The same as one differentiable call: loss_sum [] float64. The gradient is computed with the
/// loss, if hidden needs one, and kept as [N, D]; backward scales it.
at::Tensor frozen_head_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                     const at::Tensor& labels);

/// The sum for logits that are there already (a head with an adapter, a short vocabulary).
/// Differentiable in logits; saves the logits and rebuilds the softmax in backward.
/// @param logits  [N, V] float32 or bfloat16
/// @param labels  [N] int64 in [0, V), or kIgnoredLabel
/// @return        [] float64
/// @throws graft::Error as above
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& labels);

}  // namespace graft::kernels
