#include "peft/places.h"

#include <ATen/ATen.h>

#include "configs/check.h"

namespace graft::peft {

const Tensor& Places::checked() const {
  if (checked_.defined() && version_ == numbers_._version()) return checked_;
  const bool inside = numbers_.ge(0).logical_and(numbers_.lt(limit_)).all().item<bool>();
  GRAFT_CHECK(inside, ExitCode::kData, "peft: ", what_, " hold a number outside of 0 to ",
              limit_ - 1);
  checked_ = numbers_.to(at::kLong);
  version_ = numbers_._version();
  return checked_;
}

}  // namespace graft::peft
