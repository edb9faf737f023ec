// A and B of a LoRA that are taken out of a matrix: the base's own, what passes it, or its
// gradient. W is [out, in], s the scale of the adapter: y = (W - s B_0 A_0) x + s B A x, where A_0
// and B_0 are what the base gives up so that the model stays what it was. All float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>

#include "kernels/random/key.h"

namespace graft::peft {

using at::Tensor;

struct FirstFactors {
  Tensor a, b;              ///< [r, in], [out, r]
  Tensor taken_a, taken_b;  ///< A_0, B_0; undefined: the base stays as it is
};

/// The base after it gave them up: w - s b a.
Tensor residual(const Tensor& w, const Tensor& a, const Tensor& b, double s);

/// The `rank` largest singular triplets, U [m, rank], S [rank], V^T [rank, n]; by random projection
/// with `iterations` rounds of subspace iteration (torch.svd_lowrank), or exactly if that is 0.
struct Svd {
  Tensor u, s, vt;
};
Svd largest_triplets(const Tensor& w, int64_t rank, int iterations, kernels::Key key);

/// PiSSA: the r largest triplets, sqrt(S / s) on each side.
///   Meng, Wang and Zhang 2024, arXiv:2404.02948, eq. 2-4; with iterations: sec. 4, "fast SVD"
FirstFactors pissa(const Tensor& w, int64_t r, double s, int iterations, kernels::Key key);

/// OLoRA: W = Q R, B the first r columns of Q, A the first r rows of R. The base gives up s B A.
///   Buyukakyuz 2024, arXiv:2406.01775, alg. 1
FirstFactors olora(const Tensor& w, int64_t r);

/// MiCA: B the left vectors of the r smallest singular values, which stay; A zero. arXiv:2604.01694
FirstFactors mica(const Tensor& w, int64_t r);

/// LoftQ: `iterations` times Q = stored(W - s B A), then s B A = the r largest triplets of W - Q.
/// The base gives up the last but one s B A, so that it becomes the last Q.
///   Li et al. 2023, arXiv:2310.08659, alg. 1. There and in HF PEFT s is 1; here any.
FirstFactors loftq(const Tensor& w, int64_t r, double s, int iterations,
                   const std::function<Tensor(const Tensor&)>& stored);

/// CorDA: triplets of W C, V^T taken back by C^-1; C [in, in] is the mean of x^T x, with a
/// hundredth (or the next power of two of it that can be inverted) of its mean diagonal added.
///   Yang et al. 2024, arXiv:2406.05223, eq. 2-4
enum class CordaTriplets { kLargest, kSmallest };
FirstFactors corda(const Tensor& w, const Tensor& covariance, int64_t r, double s,
                   CordaTriplets triplets);

/// LoRA-GA: vectors of the gradient's 2 r largest triplets, those of A and of B different.
///   Wang, Yu and Li 2024, arXiv:2407.05000, sec. 3.2 and 3.3; fields as HF PEFT's LoraGAConfig
struct GradientFactors {
  std::string direction = "ArB2r";  ///< which go to A and to B: ArBr (alternating), A2rBr, ArB2r,
                                    ///< random
  std::string scale = "stable";     ///< of B: stable, weight_svd, gd_scale, unit
  double stable_gamma = 16;
};
FirstFactors lora_ga(const Tensor& w, const Tensor& gradient, int64_t r, double s,
                     const GradientFactors& options, kernels::Key key);

}  // namespace graft::peft
