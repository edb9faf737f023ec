// From an at::Tensor to a typed raw pointer: what the x.cpp files of the kernels share.
#pragma once

#include <ATen/ATen.h>

#include "configs/check.h"
#include "kernels/bfloat16.h"

namespace graft::kernels {

/// Calls f with a float or a Bfloat16 as its only argument: the element type of `tensor`, to be
/// taken by decltype.
/// @throws graft::Error for every other dtype; `kernel` names the caller in the message
template <class F>
void with_element(const at::Tensor& tensor, const char* kernel, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return f(float{});
    case at::kBFloat16:
      return f(Bfloat16{});
    default:
      GRAFT_CHECK(false, kernel, " has no kernel for ", tensor.scalar_type(),
                  "; cast to float32 or bfloat16");
  }
}

/// The elements of a tensor whose dtype with_element() has seen.
template <class T>
const T* elements(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_elements(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace graft::kernels
