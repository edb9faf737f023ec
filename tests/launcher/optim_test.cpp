// The optimisers against torch and bitsandbytes (tests/oracle/optimisers.py), and what all of them
// share: groups of a learning rate, and state that any number of ranks writes and reads.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <memory>

#include "configs/check.h"
#include "launcher/checkpoint/moments.h"
#include "launcher/optim/rules.h"
#include "models/io/safetensors.h"
#include "tests/models/io_testing.h"

namespace graft::launcher {
namespace {

using models::io::TestFolder;

constexpr const char* kTensors[] = {"large", "small"};
constexpr int kSteps = 6;

peft::ParamSet params_of(const std::vector<Tensor>& values) {
  peft::ParamSet params;
  for (size_t i = 0; i < values.size(); ++i) {
    peft::Param param;
    param.name = param.hf_key = "p/" + std::to_string(i);
    param.value = values[i].detach().clone();
    params.add(param);
  }
  return params;
}

// --- numbers of other libraries

class OptimOracle : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const char* root = std::getenv("GRAFT_ORACLE_DIR");
    if (root == nullptr) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
    file_ = std::make_unique<models::io::SafetensorsFile>(std::string(root) +
                                                          "/optimisers.safetensors");
  }
  std::vector<Tensor> read(const std::string& prefix) const {
    return {file_->read(prefix + kTensors[0]), file_->read(prefix + kTensors[1])};
  }
  std::unique_ptr<models::io::SafetensorsFile> file_;
};

double relative_error(const Tensor& actual, const Tensor& expected) {
  return ((actual - expected).norm() / expected.norm()).item<double>();
}

TEST_P(OptimOracle, ValuesAndStateAfterSixSteps) {
  const std::string optim = GetParam();
  const peft::ParamSet params = params_of(read("start."));
  const auto rule = make_step_rule(optim, params, {.weight_decay = 0.1, .beta2 = 0.99});
  for (int step = 0; step < kSteps; ++step)
    rule->step(read("gradient." + std::to_string(step) + "."), 1e-2);
  std::string oracle = optim;
  if (oracle.starts_with("paged_")) oracle = oracle.ends_with("8bit") ? "adamw_8bit" : "adamw";
  for (size_t i = 0; i < 2; ++i) {
    const Tensor expected = file_->read(oracle + "." + kTensors[i] + ".value");
    // Codes that a rounding of ours moves by one move a few parameters after them.
    EXPECT_LT(relative_error(params.all()[i].value, expected), 1e-5) << kTensors[i];
  }
  size_t compared = 0;
  for (const StepRule::State& state : rule->states()) {
    const Tensor expected = file_->read(oracle + "." + kTensors[state.param] + "." + state.name);
    ++compared;
    if (expected.scalar_type() != at::kByte) {
      EXPECT_LT(relative_error(state.value, expected), 1e-5) << state.name;
      continue;
    }
    const Tensor apart = (state.value.to(at::kInt) - expected.to(at::kInt)).abs();
    EXPECT_LE(apart.max().item<int>(), 1) << state.name;
    EXPECT_LE(apart.sum().item<int64_t>(), expected.numel() / 1000) << state.name;
  }
  EXPECT_EQ(compared, optim == "sgd" ? 0U : optim == "lion" ? 2U : oracle == "adamw" ? 4U : 6U);
}

INSTANTIATE_TEST_SUITE_P(Rules, OptimOracle, ::testing::ValuesIn(step_rule_names()),
                         [](const auto& info) { return info.param; });

// --- what all share

std::vector<Tensor> gradients(int step) {
  at::manual_seed(step);
  return {at::randn({70, 100}), at::randn({40}), at::randn({5000})};
}

class OptimRule : public ::testing::TestWithParam<std::string> {
 protected:
  std::unique_ptr<StepRule> make(const peft::ParamSet& params) const {
    return make_step_rule(GetParam(), params, {.weight_decay = 0.1});
  }
};

TEST_P(OptimRule, GoesOnFromTheStateOfAnotherNumberOfRanks) {
  const peft::ParamSet params = params_of(gradients(0));
  const auto rule = make(params);
  for (int step = 1; step < 3; ++step) rule->step(gradients(step), 1e-2);
  for (const int world : {1, 2, 3, 7}) {
    const TestFolder folder;
    for (int rank = 0; rank < world; ++rank)
      save_moments(folder.path(), rank, world, params, *rule);
    const peft::ParamSet again =
        params_of({params.all()[0].value, params.all()[1].value, params.all()[2].value});
    const auto resumed = make(again);
    load_moments(folder.path(), world, again, *resumed);
    resumed->set_num_steps(rule->num_steps());
    const peft::ParamSet on =
        params_of({params.all()[0].value, params.all()[1].value, params.all()[2].value});
    const auto uninterrupted = make(on);
    for (size_t s = 0; s < rule->states().size(); ++s)
      Tensor(uninterrupted->states()[s].value).copy_(rule->states()[s].value);
    uninterrupted->set_num_steps(rule->num_steps());
    resumed->step(gradients(3), 1e-2), uninterrupted->step(gradients(3), 1e-2);
    for (size_t i = 0; i < 3; ++i)
      EXPECT_TRUE(at::equal(again.all()[i].value, on.all()[i].value)) << world << " ranks";
  }
}

TEST_P(OptimRule, AParameterMovesByItsOwnLearningRate) {
  const auto moved = [&](double factor, double learning_rate) {
    peft::ParamSet params;
    for (int i = 0; i < 2; ++i) {
      peft::Param param;
      param.name = param.hf_key = std::to_string(i);
      param.value = at::ones({5000});
      param.learning_rate_factor = i == 0 ? 1 : factor;
      params.add(param);
    }
    const auto rule = make(params);
    rule->step({gradients(1)[2], gradients(2)[2]}, learning_rate);
    return params.all()[1].value;
  };
  EXPECT_TRUE(at::equal(moved(4, 1e-2), moved(1, 4e-2)));
  EXPECT_FALSE(at::equal(moved(4, 1e-2), moved(1, 1e-2)));
}

INSTANTIATE_TEST_SUITE_P(Rules, OptimRule, ::testing::ValuesIn(step_rule_names()),
                         [](const auto& info) { return info.param; });

TEST(OptimState, TakesTheBytesItSays) {
  const peft::ParamSet params = params_of({at::zeros({70, 100}), at::zeros({40})});
  EXPECT_EQ(AdamW(params).state_bytes(), 2 * 4 * 7040);
  EXPECT_EQ(AdamW8bit(params).state_bytes(), 2 * (7000 + 28 * 4) + 2 * 4 * 40);
  EXPECT_EQ(Lion(params).state_bytes(), 4 * 7040);
  EXPECT_EQ(Sgd(params).state_bytes(), 0);
}

TEST(OptimState, OfAnotherRuleIsRefused) {
  const peft::ParamSet params = params_of({at::zeros({70, 100})});
  const TestFolder folder;
  save_moments(folder.path(), 0, 1, params, AdamW8bit(params));
  EXPECT_THROW(load_moments(folder.path(), 1, params, AdamW(params)), Error);
  save_moments(folder.path(), 0, 1, params, Lion(params));
  EXPECT_THROW(load_moments(folder.path(), 1, params, AdamW(params)), Error);
}

}  // namespace
}  // namespace graft::launcher
