#include "peft/rotation.h"

#include <ATen/ATen.h>

namespace graft::peft {

Tensor skew_matrices(const Tensor& above, int64_t b) {
  const Tensor places = at::triu_indices(b, b, 1, above.options().dtype(at::kLong));
  const Tensor flat = at::zeros({above.size(0), b * b}, above.options());
  const Tensor upper = flat.index_copy(1, places[0] * b + places[1], above).view({-1, b, b});
  return upper - upper.transpose(1, 2);
}

Tensor cayley_change(const Tensor& q_NBB) {
  const Tensor identity = at::eye(q_NBB.size(-1), q_NBB.options());
  return at::linalg_solve(identity + q_NBB, -2 * q_NBB, /*left=*/false);
}

Tensor neumann_change(const Tensor& q_NBB, int terms) {
  if (terms < 2) return at::zeros_like(q_NBB);
  if (terms == 2) return 2 * q_NBB;
  Tensor power = q_NBB.bmm(q_NBB), sum = 2 * q_NBB + 2 * power;
  for (int k = 3; k < terms - 1; ++k) {
    power = power.bmm(q_NBB);
    sum = sum + 2 * power;
  }
  return sum + power.bmm(q_NBB);
}

Tensor rotate_blocks(const Tensor& x, const Tensor& change_NBB) {
  const int64_t b = change_NBB.size(-1), n = x.size(-1) / b;
  const Tensor pieces = x.reshape({-1, n, b}).transpose(0, 1);
  const Tensor moved = pieces.bmm(change_NBB.to(x.scalar_type()).expand({n, b, b}));
  return x + moved.transpose(0, 1).reshape(x.sizes());
}

}  // namespace graft::peft
