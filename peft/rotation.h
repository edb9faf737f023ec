// Orthogonal matrices in blocks: what OFT, BOFT and PSOFT turn vectors with. Matrices are handed
// on as R - I, which stays exact in bfloat16 where the angles are small.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace graft::peft {

using at::Tensor;

/// Skew-symmetric matrices from the entries above their diagonals, row by row.
/// @param above  [n, b (b - 1) / 2]
/// @return       [n, b, b]
Tensor skew_matrices(const Tensor& above, int64_t b);

/// Cayley's (I - Q)(I + Q)^-1 - I, orthogonal for a skew Q.
Tensor cayley_change(const Tensor& q_NBB);

/// 2 Q + 2 Q^2 + ... + Q^(terms - 1): the Neumann series of (I + Q)(I - Q)^-1 - I as HF PEFT cuts
/// it off; the transpose of Cayley's. With 3 terms as with 4: 2 Q + 2 Q^2 + Q^3.
Tensor neumann_change(const Tensor& q_NBB, int terms);

/// x blockdiag(R): each piece of b elements in the last dimension times its own matrix.
/// @param change_NBB  R - I in any floating dtype, or one for all pieces [1, b, b]
Tensor rotate_blocks(const Tensor& x, const Tensor& change_NBB);

}  // namespace graft::peft
