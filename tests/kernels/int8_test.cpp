// kernels/int8 against the formulas of bitsandbytes 0.50.2 in LibTorch calls
// (backends/default/ops.py, _ops.py).
#include "kernels/int8/int8.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>

#include "configs/check.h"
#include "kernels/random/random.h"

namespace graft::kernels {
namespace {

at::Tensor weights(int64_t rows, int64_t cols) {
  const at::Tensor w = at::empty({rows, cols});
  normal(w, {1, static_cast<uint64_t>(rows * cols)});
  return w;
}

at::Tensor dequantized(const Int8Codes& q, at::ScalarType type = at::kFloat) {
  const at::Tensor out = at::empty(q.codes.sizes(), type);
  dequantize_int8(q, out);
  return out;
}

TEST(Int8, QuantizesByTheFormulaOfBitsandbytes) {
  for (const auto& [rows, cols] : {std::pair{64, 96}, {3, 7}, {1, 1}, {1000, 513}}) {
    const at::Tensor w = weights(rows, cols);
    const at::Tensor absmax = w.abs().amax(1);
    const at::Tensor codes = at::round(w * (127.0 / absmax.unsqueeze(-1))).to(at::kChar);
    const Int8Codes q = quantize_int8(w);
    EXPECT_TRUE(q.absmax.equal(absmax));
    EXPECT_TRUE(q.codes.equal(codes));
  }
}

TEST(Int8, RoundsTiesToEven) {
  const at::Tensor w = at::tensor({127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -127.0f}).view({1, 7});
  const at::Tensor expected = at::tensor({127, 0, 2, 2, 0, -2, -127}, at::kChar).view({1, 7});
  EXPECT_TRUE(quantize_int8(w).codes.equal(expected));
}

TEST(Int8, DequantizesByTheFormulaOfBitsandbytes) {
  const Int8Codes q = quantize_int8(weights(130, 77));
  const at::Tensor expected = q.codes * q.absmax.view({-1, 1}) * 7.874015718698502e-3;
  EXPECT_TRUE(dequantized(q).equal(expected));
  EXPECT_TRUE(dequantized(q, at::kBFloat16).equal(expected.to(at::kBFloat16)));
}

TEST(Int8, StaysWithinHalfAStepOfTheWeight) {
  const at::Tensor w = weights(64, 128);
  const Int8Codes q = quantize_int8(w);
  const at::Tensor steps = (dequantized(q) - w).abs() / (q.absmax.view({-1, 1}) / 127);
  EXPECT_LE(steps.max().item<double>(), 0.5 + 1e-4);
}

TEST(Int8, QuantizesBfloat16LikeItsFloatValues) {
  const at::Tensor w = weights(16, 33).to(at::kBFloat16);
  EXPECT_TRUE(quantize_int8(w).codes.equal(quantize_int8(w.to(at::kFloat)).codes));
}

TEST(Int8, KeepsZeroRowsZeroAndTinyRowsFinite) {
  const at::Tensor w = weights(3, 40);
  w[1].zero_();
  w[2].mul_(1e-40f);
  const Int8Codes q = quantize_int8(w);
  EXPECT_TRUE((q.codes[1] == 0).all().item<bool>());
  EXPECT_TRUE((dequantized(q)[1] == 0).all().item<bool>());
  // Below 127 / FLT_MAX the codes lose steps, but they stay codes of that row.
  EXPECT_LE((dequantized(q)[2] - w[2]).abs().max().item<float>(), q.absmax[2].item<float>());
  w[2].copy_(weights(3, 40)[2] * 0x1p-119f);  // scaling by a power of two changes no code
  EXPECT_TRUE(quantize_int8(w).codes[2].equal(quantize_int8(weights(3, 40)).codes[2]));
}

TEST(Int8, DoesNotDependOnTheNumberOfThreads) {
  const at::Tensor w = weights(2048, 1024);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Int8Codes one = quantize_int8(w);
  const at::Tensor one_out = dequantized(one);
  at::set_num_threads(2);
  const Int8Codes two = quantize_int8(w);
  const at::Tensor two_out = dequantized(two);
  at::set_num_threads(threads);
  EXPECT_TRUE(one.codes.equal(two.codes));
  EXPECT_TRUE(one_out.equal(two_out));
}

TEST(Int8, ReadsAbsmaxAsBytesOfABuffer) {
  Int8Codes q = quantize_int8(weights(20, 30));
  const at::Tensor expected = dequantized(q);
  const at::Tensor buffer = at::zeros({100}, at::kByte);
  buffer.slice(0, 12, 92).copy_(q.absmax.view(at::kByte));
  q.absmax = buffer.slice(0, 12, 92);
  EXPECT_TRUE(dequantized(q).equal(expected));
  q.absmax = buffer.slice(0, 13, 93);
  EXPECT_THROW(dequantized(q), Error);
}

TEST(Int8, RefusesWhatItCannotUse) {
  EXPECT_THROW(quantize_int8(at::ones({4})), Error);
  EXPECT_THROW(quantize_int8(at::ones({4, 4}, at::kDouble)), Error);
  EXPECT_THROW(quantize_int8(at::full({4, 4}, std::nanf(""))), Error);
  const Int8Codes q = quantize_int8(at::ones({4, 4}));
  EXPECT_THROW(dequantize_int8(q, at::empty({4, 5})), Error);
  EXPECT_THROW(dequantize_int8(q, at::empty({4, 4}, at::kHalf)), Error);
  EXPECT_THROW(dequantize_int8({q.codes, q.absmax.slice(0, 0, 3)}, at::empty({4, 4})), Error);
}

}  // namespace
}  // namespace graft::kernels
