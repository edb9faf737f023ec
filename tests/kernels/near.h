// What the kernel tests share: the table of tolerances, and a run at a given number of threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <vector>

namespace graft::kernels {

/// Largest error allowed, as a fraction of the largest expected magnitude: a few roundings of the
/// dtype.
inline double tolerance(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16:
      return 1.0 / 128;
    case at::kFloat:
      return 2e-6;
    default:
      return 1e-13;
  }
}

/// Compares with an expectation computed in float64, at the tolerance of the dtype of `actual`.
inline void expect_near(const at::Tensor& actual, const at::Tensor& expected) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  if (actual.numel() == 0) return;
  const at::Tensor wanted = expected.to(at::kDouble);
  const double largest = wanted.abs().max().item<double>();
  const double error = (actual.to(at::kDouble) - wanted).abs().max().item<double>();
  EXPECT_LE(error, tolerance(actual.scalar_type()) * largest) << "largest value " << largest;
}

/// The result of f at several thread counts; EXPECTs that all are the same bits.
template <class F>
void expect_same_bits_at_any_thread_count(const F& f) {
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const std::vector<at::Tensor> one = f();
  for (int threads : {2, 3}) {
    at::set_num_threads(threads);
    const std::vector<at::Tensor> many = f();
    for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(at::equal(many[i], one[i])) << threads;
  }
  at::set_num_threads(before);
}

/// A detached copy that collects a gradient.
inline at::Tensor leaf(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.detach().to(type).clone().set_requires_grad(true);
}

}  // namespace graft::kernels
