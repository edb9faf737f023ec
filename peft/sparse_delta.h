// SparseDelta: a matrix of zeros but for some values at fixed places, as sparse methods add it to
// the frozen one. It is built in every pass: scattered products are no faster than the matrix
// product at the shares of values that these methods train.
#pragma once

#include <cstdint>
#include <string>

#include "models/slots.h"

namespace graft::peft {

using at::Tensor;

class SparseDelta {
 public:
  SparseDelta(std::string slot, std::string tensor, int64_t out, int64_t in)
      : slot_(std::move(slot)), tensor_(std::move(tensor)), out_(out), in_(in) {}

  /// [out, in], differentiable in `values`.
  /// @param places  [2, n] int32: rows, then columns
  /// @throws graft::Error (kData) for a place outside of the matrix
  Tensor dense(const Tensor& values, const Tensor& places) const;

 private:
  const Tensor& flat(const Tensor& places) const;

  std::string slot_, tensor_;
  int64_t out_, in_;
  mutable Tensor flat_;  // of the places as they were at version_
  mutable uint32_t version_ = 0;
};

/// y = (W + S) x: what methods that train values of a SparseDelta share.
class SparseLinear : public models::LinearAdapter {
 public:
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override;
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override;

 protected:
  /// The derived class registers places_ and values_.
  SparseLinear(std::string slot, std::string tensor, int64_t out, int64_t in)
      : in_(in), out_(out), delta_(std::move(slot), std::move(tensor), out, in) {}

  int64_t in_, out_;
  Tensor places_, values_;

 private:
  SparseDelta delta_;
};

/// Row-major numbers of elements as places, on `device`.
Tensor places_of(const Tensor& numbers, int64_t in, at::Device device);

}  // namespace graft::peft
