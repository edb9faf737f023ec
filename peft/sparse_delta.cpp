#include "peft/sparse_delta.h"

#include <ATen/ATen.h>

#include "configs/check.h"

namespace graft::peft {

Tensor SparseDelta::dense(const Tensor& values, const Tensor& places) const {
  return at::zeros({out_ * in_}, values.options())
      .scatter_add(0, flat(places), values)
      .view({out_, in_});
}

/// Row-major numbers, made again when the places have been loaded.
const Tensor& SparseDelta::flat(const Tensor& places) const {
  const bool same = flat_.defined() && flat_.numel() == places.size(1);
  if (same && version_ == places._version()) return flat_;
  const Tensor rows = places[0].to(at::kLong), columns = places[1].to(at::kLong);
  const bool inside = at::logical_and(rows.ge(0), rows.lt(out_))
                          .logical_and(columns.ge(0))
                          .logical_and(columns.lt(in_))
                          .all()
                          .item<bool>();
  GRAFT_CHECK(inside, ExitCode::kData, "peft: ", slot_, ": ", tensor_, " hold a place outside of [",
              out_, ", ", in_, "]");
  flat_ = rows * in_ + columns;
  version_ = places._version();
  return flat_;
}

Tensor SparseLinear::forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) {
  const Tensor y = base(x);
  return y + at::linear(x, delta_.dense(values_, places_).to(x.scalar_type())).to(y.scalar_type());
}

Tensor SparseLinear::merged(const Tensor& w) const {
  return w + delta_.dense(values_, places_).to(w.scalar_type());
}

Tensor places_of(const Tensor& numbers, int64_t in, at::Device device) {
  return at::stack({numbers.div(in, "floor"), numbers.remainder(in)}).to(device, at::kInt);
}

}  // namespace graft::peft
