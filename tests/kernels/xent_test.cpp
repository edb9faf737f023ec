// Cross-entropy against LibTorch's log_softmax and nll_loss in float64.
#include "kernels/xent/xent.h"

#include "configs/check.h"
#include "tests/kernels/near.h"

namespace graft::kernels {
namespace {

constexpr int64_t kRows = 37, kWidth = 24, kVocabulary = 1003;

at::Tensor expected_loss(const at::Tensor& logits, const at::Tensor& labels) {
  return at::nll_loss(at::log_softmax(logits, 1), labels, {}, at::Reduction::Sum, kIgnoredLabel);
}

at::Tensor some_labels() {
  at::Tensor labels = at::randint(kVocabulary, {kRows}, at::kLong);
  labels.slice(0, 0, kRows, 3).fill_(kIgnoredLabel);
  return labels;
}

void expect_head_agreement(at::ScalarType type) {
  at::manual_seed(5);
  const at::Tensor hidden = leaf(at::randn({kRows, kWidth}) * 0.2, type);
  const at::Tensor weight = at::randn({kVocabulary, kWidth}).to(type), labels = some_labels();
  const at::Tensor loss = frozen_head_cross_entropy(hidden, weight, labels);
  (loss * 3).backward();
  const at::Tensor exact = leaf(hidden, at::kDouble);
  const at::Tensor expected = expected_loss(exact.mm(weight.to(at::kDouble).t()), labels);
  (expected * 3).backward();
  const double wanted = expected.item<double>();
  EXPECT_NEAR(loss.item<double>(), wanted, tolerance(type) * wanted);
  expect_near(hidden.grad(), exact.grad());
}

TEST(FrozenHead, AgreesWithFloat64InFloat32) { expect_head_agreement(at::kFloat); }
TEST(FrozenHead, AgreesWithFloat64InBfloat16) { expect_head_agreement(at::kBFloat16); }

TEST(FrozenHead, TakesAHiddenStateAndAWeightOfDifferentDtypes) {
  const at::Tensor hidden = at::randn({kRows, kWidth}).to(at::kBFloat16);
  const at::Tensor weight = at::randn({kVocabulary, kWidth}), labels = some_labels();
  const XentResult mixed = frozen_head_loss(hidden, weight, labels, Gradient::kCompute);
  const XentResult wide =
      frozen_head_loss(hidden.to(at::kFloat), weight, labels, Gradient::kCompute);
  EXPECT_TRUE(at::equal(mixed.loss_sum, wide.loss_sum));
  EXPECT_TRUE(at::equal(mixed.d_hidden, wide.d_hidden.to(at::kBFloat16)));
}

TEST(FrozenHead, GivesTheSameLossInChunksOfAnySize) {
  at::manual_seed(6);
  const at::Tensor hidden = at::randn({kRows, kWidth}), labels = some_labels();
  const at::Tensor weight = at::randn({kVocabulary, kWidth});
  const XentResult whole = frozen_head_loss(hidden, weight, labels, Gradient::kCompute);
  for (int64_t rows : {0, 1, 5}) {  // 0: a bound below one row
    const XentResult pieces = frozen_head_loss(hidden, weight, labels, Gradient::kCompute,
                                               1 + rows * kVocabulary * int64_t{sizeof(float)});
    EXPECT_NEAR(pieces.loss_sum.item<double>(), whole.loss_sum.item<double>(), 1e-3);
    expect_near(pieces.d_hidden, whole.d_hidden);
  }
}

TEST(FrozenHead, SkipsTheGradientThatNobodyAskedFor) {
  const at::Tensor hidden = at::randn({kRows, kWidth}), labels = some_labels();
  const at::Tensor weight = at::randn({kVocabulary, kWidth});
  const XentResult skipped = frozen_head_loss(hidden, weight, labels, Gradient::kSkip);
  const XentResult computed = frozen_head_loss(hidden, weight, labels, Gradient::kCompute);
  EXPECT_FALSE(skipped.d_hidden.defined());
  EXPECT_TRUE(at::equal(skipped.loss_sum, computed.loss_sum));
}

TEST(FrozenHead, GivesZeroWithoutLabelsOrRows) {
  const at::Tensor weight = at::randn({kVocabulary, kWidth});
  for (int64_t rows : {int64_t{0}, kRows}) {
    const XentResult none =
        frozen_head_loss(at::randn({rows, kWidth}), weight,
                         at::full({rows}, kIgnoredLabel, at::kLong), Gradient::kCompute);
    EXPECT_EQ(none.loss_sum.item<double>(), 0);
    EXPECT_TRUE(at::equal(none.d_hidden, at::zeros({rows, kWidth})));
  }
}

TEST(FrozenHead, NamesTheLabelThatIsOutOfRange) {
  at::Tensor labels = some_labels();
  labels[4] = kVocabulary;
  try {
    frozen_head_loss(at::randn({kRows, kWidth}), at::randn({kVocabulary, kWidth}), labels,
                     Gradient::kSkip);
    FAIL() << "label " << kVocabulary << " was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kData);
    EXPECT_NE(std::string(error.what()).find("label 1003 in row 4"), std::string::npos);
  }
}

void expect_logits_agreement(at::ScalarType type, double size, int64_t vocabulary) {
  at::manual_seed(7);
  const at::Tensor logits = leaf(at::randn({kRows, vocabulary}) * size, type);
  const at::Tensor labels =
      some_labels().remainder(vocabulary).masked_fill(at::arange(kRows) % 3 == 0, kIgnoredLabel);
  const at::Tensor loss = cross_entropy(logits, labels);
  (loss * 0.5).backward();
  const at::Tensor exact = leaf(logits, at::kDouble);
  const at::Tensor expected = expected_loss(exact, labels);
  (expected * 0.5).backward();
  EXPECT_NEAR(loss.item<double>(), expected.item<double>(), 2e-6 * expected.item<double>());
  expect_near(logits.grad(), exact.grad());
}

TEST(CrossEntropy, AgreesWithFloat64) {
  for (int64_t vocabulary : {1, 2, 17, 1003, 5000}) {
    expect_logits_agreement(at::kFloat, 3, vocabulary);
    expect_logits_agreement(at::kBFloat16, 3, vocabulary);
  }
}

TEST(CrossEntropy, StaysFiniteForHugeLogits) {
  expect_logits_agreement(at::kFloat, 1e4, 1003);
  expect_logits_agreement(at::kFloat, 1e30, 17);
}

TEST(CrossEntropy, KeepsSmallLossesOfALargeVocabularyExact) {
  const int64_t vocabulary = 200000;
  const at::Tensor logits = at::randn({2, vocabulary}), labels = at::tensor({7, 199999}, at::kLong);
  const double wanted = expected_loss(logits.to(at::kDouble), labels).item<double>();
  EXPECT_NEAR(cross_entropy(logits, labels).item<double>(), wanted, 2e-6 * wanted);
}

TEST(CrossEntropy, PassesANanOn) {
  at::Tensor logits = at::randn({2, 50});
  logits[1][33] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(cross_entropy(logits, at::tensor({1, 2}, at::kLong)).item<double>()));
}

TEST(CrossEntropy, HasTheSameBitsAtAnyThreadCount) {
  const at::Tensor input = at::randn({kRows, kVocabulary}), labels = some_labels();
  expect_same_bits_at_any_thread_count([&] {
    const at::Tensor logits = leaf(input, at::kFloat);
    const at::Tensor loss = cross_entropy(logits, labels);
    loss.backward();
    return std::vector<at::Tensor>{loss.detach(), logits.grad()};
  });
}

}  // namespace
}  // namespace graft::kernels
