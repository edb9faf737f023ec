// Attention against its formula, softmax(q k^T / sqrt(K)) v, written out in float64.
#include "models/nn/attention.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include "tests/testing.h"

namespace graft::models {
namespace {

/// Queries, keys and values of 4 and 2 heads; the fourth tensor is the output's gradient.
struct Inputs {
  std::vector<Tensor> q_k_v;
  Tensor dy;

  Inputs(int64_t rows, int64_t length, at::ScalarType type, int64_t prefix = 0) {
    const auto make = [&](const char* name, int64_t heads, int64_t positions) {
      return testing::fill(name, {rows, heads, positions, 16}, 2.0).to(type);
    };
    q_k_v = {make("q", 4, length), make("k", 2, prefix + length), make("v", 2, prefix + length)};
    dy = make("dy", 4, length);
    for (Tensor& t : q_k_v) t.requires_grad_();
  }
};

/// The output and the gradients of queries, keys and values.
std::vector<Tensor> with_gradients(const Tensor& y, const Inputs& inputs) {
  auto results = torch::autograd::grad({y}, inputs.q_k_v, {inputs.dy.to(y.scalar_type())});
  results.insert(results.begin(), y.detach());
  return results;
}

std::vector<Tensor> formula(const Inputs& inputs, const Sequence& sequence, int64_t window) {
  const Tensor q = inputs.q_k_v[0].to(at::kDouble);
  const Tensor k = inputs.q_k_v[1].to(at::kDouble).repeat_interleave(2, 1);
  const Tensor v = inputs.q_k_v[2].to(at::kDouble).repeat_interleave(2, 1);
  std::vector<Tensor> rows;
  for (int64_t row = 0; row < q.size(0); ++row) rows.push_back(at::zeros_like(q[row]));
  for (const Document& d : sequence.documents) {
    const int64_t prefix = k.size(2) - q.size(2), size = d.end - d.begin;
    const auto part = [&](const Tensor& t) {
      const Tensor own = t[d.row].slice(1, t.size(2) - q.size(2)).slice(1, d.begin, d.end);
      return at::cat({t[d.row].slice(1, 0, t.size(2) - q.size(2)), own}, 1);
    };
    const Tensor distance =
        at::arange(prefix, prefix + size).unsqueeze(1) - at::arange(prefix + size);
    const Tensor hidden = distance.lt(0).logical_or(distance.ge(window > 0 ? window : 1 << 30));
    const Tensor scores = at::matmul(part(q), part(k).transpose(1, 2)) / std::sqrt(16.0);
    const Tensor y = at::matmul(
        scores.masked_fill(hidden, -std::numeric_limits<double>::infinity()).softmax(-1), part(v));
    const int64_t length = q.size(2);
    rows[d.row] = rows[d.row] + at::constant_pad_nd(y, {0, 0, d.begin, length - d.end});
  }
  return with_gradients(at::stack(rows), inputs);
}

struct Case {
  std::string name;
  at::ScalarType type;
  double tolerance;  // of the largest value; bfloat16 keeps 8 bits of each intermediate result
};

class Attention : public ::testing::TestWithParam<Case> {
 protected:
  void expect_formula(int64_t rows, int64_t length, const Sequence& sequence, int64_t window,
                      int64_t prefix = 0) {
    const Inputs inputs(rows, length, GetParam().type, prefix);
    const auto& [q, k, v] = std::tie(inputs.q_k_v[0], inputs.q_k_v[1], inputs.q_k_v[2]);
    const auto actual = with_gradients(causal_attention(q, k, v, sequence, window), inputs);
    const auto expected = formula(inputs, sequence, window);
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(actual[i].scalar_type(), GetParam().type);
      EXPECT_LT(testing::relative_error(actual[i], expected[i]), GetParam().tolerance) << i;
    }
  }
};

const Sequence kWhole{{{0, 0, 70}, {1, 0, 70}}, true, {}, {}, {}, {}};
const Sequence kPacked{{{0, 0, 30}, {0, 30, 31}, {0, 35, 70}, {1, 5, 60}}, false, {}, {}, {}, {}};

TEST_P(Attention, OfWholeRowsIsTheFormula) { expect_formula(2, 70, kWhole, 0); }
TEST_P(Attention, OfPackedDocumentsIsTheFormulaOfEach) { expect_formula(2, 70, kPacked, 0); }
TEST_P(Attention, SeesNoFartherThanItsWindow) {
  expect_formula(2, 70, kWhole, 9);
  expect_formula(2, 70, kPacked, 9);
}

TEST_P(Attention, APrefixStandsInFrontOfEveryDocument) {
  expect_formula(2, 70, kWhole, 0, 6);
  expect_formula(2, 70, kPacked, 0, 6);
  expect_formula(2, 70, kPacked, 9, 6);
}

TEST_P(Attention, OfTheLastPositionsEqualsThatOfAll) {
  const c10::InferenceMode no_gradients;
  const Inputs inputs(1, 70, GetParam().type);
  const auto& [q, k, v] = std::tie(inputs.q_k_v[0], inputs.q_k_v[1], inputs.q_k_v[2]);
  const Sequence one{{{0, 0, 70}}, true, {}, {}, {}, {}};
  const Tensor all = causal_attention(q, k, v, one, 0);
  for (const int64_t length : {1, 3}) {
    const Tensor last = causal_attention(q.slice(2, 70 - length), k, v, one, 0);
    EXPECT_LT(testing::relative_error(last, all.slice(2, 70 - length)), GetParam().tolerance);
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Attention,
                         ::testing::Values(Case{"Float32", at::kFloat, 1e-5},
                                           Case{"Bfloat16", at::kBFloat16, 2e-2}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace graft::models
