// Every mergeable method's change of its matrices as a LoRA of the change's own rank.
#include "launcher/as_lora.h"

#include <gtest/gtest.h>

#include "tests/peft/all_methods.h"
#include "tests/peft/tiny.h"

namespace graft::launcher {
namespace {

using at::Tensor;

/// The matrices as the golden rule fills them.
class GoldenWeights : public peft::BaseWeights {
 public:
  explicit GoldenWeights(models::Model& model) : source_(model, {}) {}
  Tensor weight(const peft::LinearSite& site) override {
    return source_.read(site.hf_path + ".weight");
  }
  Tensor bias(const peft::LinearSite& site) override {
    return source_.read(site.hf_path + ".bias");
  }

 private:
  peft::GoldenSource source_;
};

TEST(LowRank, OfAProductIsItsRankAndLosesNothing) {
  const Tensor d =
      peft::fill("b", {40, 3}, 1).to(at::kDouble).mm(peft::fill("a", {3, 30}, 1).to(at::kDouble));
  const LowRank exact = factorised(d, 0);
  EXPECT_EQ(exact.exact, 3);
  EXPECT_LT((exact.b.mm(exact.a) - d).abs().max().item<double>(), 1e-12);
  EXPECT_LT(exact.lost, 1e-25);
}

// Wide enough for the columns to be found from random mixtures, not from a decomposition of all.
TEST(LowRank, FindsTheColumnsOfALargeMatrix) {
  const Tensor d = peft::fill("b", {400, 70}, 1)
                       .to(at::kDouble)
                       .mm(peft::fill("a", {70, 300}, 1).to(at::kDouble));
  const LowRank exact = factorised(d, 0);
  EXPECT_EQ(exact.exact, 70);
  EXPECT_LT((exact.b.mm(exact.a) - d).norm().item<double>(), 1e-10 * d.norm().item<double>());
}

TEST(LowRank, ASmallerRankLosesTheTailOfTheSingularValues) {
  const Tensor d = peft::fill("d", {20, 30}, 1).to(at::kDouble);
  const Tensor s = at::linalg_svdvals(d);
  const LowRank low = factorised(d, 5);
  const double tail = s.slice(0, 5).square().sum().item<double>();
  EXPECT_NEAR(low.lost, tail / s.square().sum().item<double>(), 1e-12);
  EXPECT_NEAR((d - low.b.mm(low.a)).square().sum().item<double>(), tail, 1e-9);
}

TEST(LowRank, OfZerosIsOneOfZeros) {
  const LowRank low = factorised(at::zeros({6, 5}, at::kDouble), 0);
  EXPECT_EQ(low.a.size(0), 1);
  EXPECT_EQ(low.lost, 0);
  EXPECT_EQ(low.b.mm(low.a).abs().max().item<double>(), 0);
}

class AsLora : public testing::TestWithParam<std::string> {};

TEST_P(AsLora, AddsToTheMatricesWhatTheMethodDoes) {
  peft::Tiny tiny("llama");
  const std::shared_ptr<peft::Method> method = peft::methods().make(GetParam());
  if (method->acts_on_others()) GTEST_SKIP() << "changes no matrix";
  peft::read_fields(*method, peft::defaults(GetParam()));
  tiny.attach(GetParam(), method);
  tiny.load();
  tiny.jitter();
  GoldenWeights base(*tiny.model);
  const at::NoGradGuard no_grad;
  std::map<std::string, Tensor> expected;
  try {
    for (const auto* site : changed_matrices(tiny.adapters.slots(), "test")) {
      if (site->info.kind == models::LinearKind::kGain) GTEST_SKIP() << "changes vectors";
      const Tensor w = base.weight(*site);
      expected[site->name] = site->slot->adapters().front()->merged(w) - w;
    }
  } catch (const Error& error) {
    GTEST_SKIP() << error.what();
  }
  if (expected.empty()) GTEST_SKIP() << "changes no matrix by an adapter";
  constexpr int64_t kWhole = 4096;  // at most: where the change has full rank, all of it
  const auto converted =
      as_lora(tiny.adapters, base, models::make_model(peft::tiny_config("llama")), kWhole);
  EXPECT_LT(converted.report.lost, 1e-12);
  for (const peft::LinearSite& site : converted.adapters->slots().linears) {
    if (site.slot->empty()) continue;
    ASSERT_TRUE(expected.contains(site.name)) << site.name;
    const Tensor w = at::zeros(expected[site.name].sizes());
    const Tensor found = site.slot->adapters().front()->merged(w);
    const double size = expected[site.name].abs().max().item<double>();
    EXPECT_LT((found - expected[site.name]).abs().max().item<double>(), 1e-5 * size + 1e-6);
    expected.erase(site.name);
  }
  EXPECT_TRUE(expected.empty()) << expected.begin()->first;
}

INSTANTIATE_TEST_SUITE_P(Every, AsLora, testing::ValuesIn(peft::methods().names()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace graft::launcher
