// Places: numbers that a file may set (of an update's values, of a bank's entries), checked once
// before they are used as indices.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace graft::peft {

using at::Tensor;

class Places {
 public:
  Places() = default;
  /// @param numbers  integers of any dtype; the tensor may be written to later
  /// @param what     what they are called in messages
  Places(Tensor numbers, int64_t limit, std::string what)
      : numbers_(std::move(numbers)), limit_(limit), what_(std::move(what)) {}

  /// int64, as the numbers are now.
  /// @throws graft::Error (kData) for one that is not in [0, limit)
  const Tensor& checked() const;

 private:
  Tensor numbers_;
  int64_t limit_ = 0;
  std::string what_;
  mutable Tensor checked_;  // numbers_ as they were at version_
  mutable uint32_t version_ = 0;
};

}  // namespace graft::peft
