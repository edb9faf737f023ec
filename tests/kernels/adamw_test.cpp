// adamw against the formula in float64 and against LibTorch's own fused optimiser; the two sums
// over gradients.
#include "kernels/adamw/adamw.h"

#include <cmath>
#include <limits>

#include "configs/check.h"
#include "tests/kernels/near.h"

namespace graft::kernels {
namespace {

const AdamWConfig kConfig{
    .learning_rate = 3e-3, .beta1 = 0.85, .beta2 = 0.99, .epsilon = 1e-7, .weight_decay = 0.1};

struct State {
  std::vector<at::Tensor> parameters, first_moments, second_moments;
  explicit State(at::ScalarType type) {
    at::manual_seed(8);
    for (int64_t size : {1, 15, 33, 9000, 20000}) {
      parameters.push_back(at::randn({size}).to(type));
      first_moments.push_back(at::zeros({size}, type));
      second_moments.push_back(at::zeros({size}, type));
    }
  }
  std::vector<at::Tensor> gradients(int64_t step) const {
    at::manual_seed(100 + step);
    std::vector<at::Tensor> result;
    for (const at::Tensor& p : parameters) result.push_back(at::randn(p.sizes()));
    return result;
  }
  void expect_near(const State& expected) const {
    for (size_t i = 0; i < parameters.size(); ++i) {
      kernels::expect_near(parameters[i], expected.parameters[i]);
      kernels::expect_near(first_moments[i], expected.first_moments[i]);
      kernels::expect_near(second_moments[i], expected.second_moments[i]);
    }
  }
};

State after_steps(int64_t num_steps) {
  State state(at::kFloat);
  for (int64_t step = 1; step <= num_steps; ++step) {
    adamw(state.parameters, state.gradients(step), state.first_moments, state.second_moments, step,
          kConfig);
  }
  return state;
}

TEST(AdamW, FollowsThePaperInFloat64) {
  State exact(at::kDouble);
  for (int64_t step = 1; step <= 5; ++step) {
    const std::vector<at::Tensor> gradients = exact.gradients(step);
    for (size_t i = 0; i < gradients.size(); ++i) {
      const at::Tensor g = gradients[i].to(at::kDouble);
      at::Tensor &p = exact.parameters[i], &m = exact.first_moments[i];
      at::Tensor& v = exact.second_moments[i];
      m = 0.85 * m + 0.15 * g;
      v = 0.99 * v + 0.01 * g * g;
      const at::Tensor m_hat = m / (1 - std::pow(0.85, step)),
                       v_hat = v / (1 - std::pow(0.99, step));
      p = p - 3e-3 * 0.1 * p - 3e-3 * m_hat / (v_hat.sqrt() + 1e-7);
    }
  }
  after_steps(5).expect_near(exact);
}

TEST(AdamW, AgreesWithTheFusedOptimiserOfLibTorch) {
  State theirs(at::kFloat);
  for (int64_t step = 1; step <= 5; ++step) {
    const std::vector<at::Tensor> gradients = theirs.gradients(step);
    const std::vector<at::Tensor> steps(gradients.size(), at::tensor(static_cast<float>(step)));
    at::_fused_adamw_(theirs.parameters, gradients, theirs.first_moments, theirs.second_moments, {},
                      steps, kConfig.learning_rate, kConfig.beta1, kConfig.beta2,
                      kConfig.weight_decay, kConfig.epsilon, false, false);
  }
  after_steps(5).expect_near(theirs);
}

TEST(AdamW, HasTheSameBitsAtAnyThreadCount) {
  expect_same_bits_at_any_thread_count([] { return after_steps(2).parameters; });
}

TEST(AdamW, HasTheSameBitsForOneFlatBuffer) {
  State flat(at::kFloat);
  for (auto* list : {&flat.parameters, &flat.first_moments, &flat.second_moments}) {
    *list = {at::cat(*list)};
  }
  const State lists(at::kFloat);
  adamw(flat.parameters, at::cat(lists.gradients(1)), flat.first_moments, flat.second_moments, 1,
        kConfig);
  EXPECT_TRUE(at::equal(flat.parameters[0], at::cat(after_steps(1).parameters)));
}

TEST(AdamW, RefusesListsThatDoNotFit) {
  const at::Tensor one = at::zeros({4}), other = at::zeros({5});
  EXPECT_THROW(adamw(one, other, one, one, 1, kConfig), Error);
  EXPECT_THROW(adamw(one, one, one, at::TensorList(), 1, kConfig), Error);
  EXPECT_THROW(adamw(one, one, one, one, 0, kConfig), Error);
  EXPECT_THROW(adamw(one, one.to(at::kBFloat16), one, one, 1, kConfig), Error);
  adamw(at::TensorList(), at::TensorList(), at::TensorList(), at::TensorList(), 1, kConfig);
}

TEST(SumOfSquares, AgreesWithFloat64AndDoesNotOverflow) {
  for (int64_t size : {0, 1, 17, 8192, 100001}) {
    const at::Tensor values = at::randn({size});
    const double wanted = values.to(at::kDouble).square().sum().item<double>();
    EXPECT_NEAR(sum_of_squares(values), wanted, 1e-13 * wanted);
  }
  EXPECT_NEAR(sum_of_squares(at::full({1000}, 3e38F)) / 9e79, 1, 1e-6);
}

TEST(SumOfSquares, HasTheSameBitsAtAnyThreadCount) {
  const at::Tensor values = at::randn({1000003});
  expect_same_bits_at_any_thread_count(
      [&] { return std::vector{at::scalar_tensor(sum_of_squares(values), at::kDouble)}; });
}

TEST(FirstNonFinite, FindsTheFirstOrNone) {
  at::Tensor values = at::randn({40, 50});
  EXPECT_EQ(first_non_finite(values), -1);
  values[31][2] = std::numeric_limits<float>::quiet_NaN();
  values[30][7] = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(first_non_finite(values), 30 * 50 + 7);
  EXPECT_FALSE(std::isfinite(sum_of_squares(values)));
  EXPECT_EQ(first_non_finite(at::empty({0})), -1);
}

}  // namespace
}  // namespace graft::kernels
