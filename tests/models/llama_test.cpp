// The Llama family against transformers: tests/golden/llama_tiny.json holds what it computes for
// ten variants of a tiny decoder whose weights follow from their names.
#include "models/llama/llama.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "configs/check.h"
#include "dist/comm_factory.h"
#include "models/nn/rope.h"
#include "tests/models/io_testing.h"
#include "tests/testing.h"

namespace graft::models {
namespace {

using testing::Base;
using testing::batch_of;
using testing::relative_error;

constexpr double kTolerance = 1e-4;  // float32 through two layers; measured about 1e-6

const nlohmann::json& golden() {
  static const nlohmann::json file = testing::golden("llama_tiny.json");
  return file;
}

std::vector<std::string> case_names() {
  std::vector<std::string> names;
  for (const auto& [name, expected] : golden()["cases"].items()) names.push_back(name);
  return names;
}

Tensor matrix(const nlohmann::json& rows) {
  const auto values = rows.get<std::vector<std::vector<int64_t>>>();
  std::vector<Tensor> tensors;
  for (const auto& row : values) tensors.push_back(at::tensor(row));
  return at::stack(tensors);
}

Tensor vector(const nlohmann::json& values) { return at::tensor(values.get<std::vector<float>>()); }

data::Batch golden_batch() {
  return batch_of(matrix(golden()["input_ids"]), matrix(golden()["labels"]));
}

void expect_logits(const Tensor& logits, const nlohmann::json& expected) {
  EXPECT_LT(relative_error(logits[0][-1], vector(expected["logits_row0_last"])), kTolerance);
  EXPECT_LT(
      relative_error(logits[1][3].slice(0, 0, 8), vector(expected["logits_row1_pos3_first8"])),
      kTolerance);
}

class LlamaGolden : public ::testing::TestWithParam<std::string> {
 protected:
  const nlohmann::json& expected = golden()["cases"][GetParam()];
  std::unique_ptr<dist::Comm> comm = dist::make_single_comm();
};

TEST_P(LlamaGolden, LogitsEqualTransformers) {
  const Base base(expected["config"], *comm);
  expect_logits(base.logits(golden_batch()), expected);
}

TEST_P(LlamaGolden, LossEqualsTransformers) {
  const Base base(expected["config"], *comm);
  const double loss = expected["loss"];
  EXPECT_NEAR(base.mean_loss(golden_batch()), loss, kTolerance * loss);
}

TEST_P(LlamaGolden, InverseFrequenciesEqualTransformers) {
  const LlamaConfig config = LlamaConfig::from_json(expected["config"]);
  const int64_t length = golden_batch().tokens_BL.size(1);
  const auto [frequencies, factor] =
      inverse_frequencies(config.rope, config.head_dim, config.max_position_embeddings, length);
  const Tensor ours = at::tensor(frequencies), theirs = vector(expected["inv_freq_after_forward"]);
  ASSERT_EQ(ours.sizes(), theirs.sizes());
  EXPECT_LT((ours / theirs - 1).abs().max().item<float>(), 1e-6F);
  EXPECT_NEAR(factor, expected["attention_scaling"].get<double>(), 1e-6);
}

INSTANTIATE_TEST_SUITE_P(Cases, LlamaGolden, ::testing::ValuesIn(case_names()),
                         [](const auto& info) { return info.param; });

TEST(Llama, GoldenFillIsOurs) {
  const auto& example = golden()["fill_example"];
  const Tensor first = testing::fill(example["name"].get<std::string>(), {4}, example["scale"]);
  EXPECT_LT(relative_error(first, vector(example["first4"])), 1e-6);
}

TEST(Llama, RightPaddingLeavesRealLogitsAlone) {
  const auto& expected = golden()["cases"]["llama_default"];
  const auto comm = dist::make_single_comm();
  data::Batch batch = golden_batch();
  const auto& padded = expected["right_padded"];
  batch.documents_BL[1].slice(0, padded["mask_row1_zeros_from"].get<int64_t>()).fill_(-1);
  expect_logits(Base(expected["config"], *comm).logits(batch), padded);
}

TEST(Llama, LeftPaddingIsNotSeen) {
  const auto& expected = golden()["cases"]["llama_default"];
  const auto comm = dist::make_single_comm();
  data::Batch batch = golden_batch();
  const auto& padded = expected["left_padded"];
  batch.documents_BL[0].slice(0, 0, padded["mask_row0_zeros_before"].get<int64_t>()).fill_(-1);
  expect_logits(Base(expected["config"], *comm).logits(batch), padded);
}

TEST(Llama, CachedKeysGiveTheLogitsOfTheWholeRow) {
  const auto comm = dist::make_single_comm();
  for (const char* name : {"llama_default", "mistral_window5"}) {
    const Base base(golden()["cases"][name]["config"], *comm);
    const data::Batch whole = batch_of(matrix(golden()["input_ids"]).slice(0, 0, 1));
    const Tensor expected = base.logits(whole);
    KvCache cache;
    Pass pass;
    pass.want = Want::kLastLogits;
    pass.cache = &cache;
    const int64_t length = whole.tokens_BL.size(1);
    for (int64_t begin = 0, end = 9; begin < length; begin = end, end = std::min(end + 1, length)) {
      data::Batch part = batch_of(whole.tokens_BL.slice(1, begin, end));
      part.positions_BL += begin;
      const std::vector<Lane> lanes = {{part}};
      const Tensor last = base.trunk->forward(lanes, pass).front();
      EXPECT_LT(relative_error(last[0][0], expected[0][end - 1]), 1e-5)
          << name << " at " << end - 1;
    }
  }
}

/// The second inverse frequency, which theta and linear scaling show in, and the attention factor.
std::pair<float, float> rope_of(const nlohmann::json& changes) {
  nlohmann::json json = testing::tiny_llama();
  json.update(changes);
  const LlamaConfig c = LlamaConfig::from_json(json);
  const auto [frequencies, factor] =
      inverse_frequencies(c.rope, c.head_dim, c.max_position_embeddings, 1);
  return {frequencies[1], factor};
}

// What transformers 5.17's LlamaRotaryEmbedding holds for these configs.
TEST(Llama, OfTwoRopeDictsTheOldOneWins) {
  const nlohmann::json both = {
      {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500000.0}}},
      {"rope_scaling", {{"rope_type", "linear"}, {"factor", 2.0}}}};
  EXPECT_FLOAT_EQ(rope_of(both).first, 0.15811388194561005F);
  nlohmann::json top = both;
  top["rope_theta"] = 1000.0;
  EXPECT_FLOAT_EQ(rope_of(top).first, 0.21084825694561005F);
  nlohmann::json empty = both;
  empty["rope_scaling"] = nlohmann::json::object();
  EXPECT_FLOAT_EQ(rope_of(empty).first, 0.193922758102417F);
}

TEST(Llama, LongRopeTakesItsFactorBeforeTheRatioOfLengths) {
  nlohmann::json rope = {{"rope_type", "longrope"},
                         {"short_factor", {1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7}},
                         {"long_factor", {2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0}}};
  const auto factor = [&](const char* key, const nlohmann::json& value) {
    rope[key] = value;
    return rope_of({{"rope_parameters", rope}}).second;
  };
  EXPECT_FLOAT_EQ(factor("original_max_position_embeddings", 16), 1.224744871391589F);
  EXPECT_FLOAT_EQ(rope_of({{"rope_parameters", rope}}).first, 0.2874797582626343F);
  EXPECT_FLOAT_EQ(
      rope_of({{"rope_parameters", rope}, {"original_max_position_embeddings", 32}}).second,
      1.0954451150103321F);
  EXPECT_FLOAT_EQ(factor("factor", 32.0), 1.5F);
}

TEST(Llama, MistralsWindowIs4096UnlessTheConfigSaysOtherwise) {
  nlohmann::json config = testing::tiny_llama();
  config["model_type"] = "mistral";
  EXPECT_EQ(LlamaConfig::from_json(config).window, std::vector<int64_t>(2, 4096));
  config["sliding_window"] = nullptr;
  EXPECT_EQ(LlamaConfig::from_json(config).window, std::vector<int64_t>(2, 0));
  config["sliding_window"] = 7;
  EXPECT_EQ(LlamaConfig::from_json(config).window, std::vector<int64_t>(2, 7));
}

ExitCode code_of(const nlohmann::json& config) {
  try {
    LlamaConfig::from_json(config);
  } catch (const Error& error) {
    return error.code();
  }
  return ExitCode::kDone;
}

TEST(Llama, ANumberOutOfRangeIsRefusedWithTheRange) {
  const auto refuse = [](const char* field, int64_t value, const std::string& said) {
    nlohmann::json config = testing::tiny_llama();
    config["model_type"] = "mistral";
    config[field] = value;
    io::expect_refused([&] { LlamaConfig::from_json(config); }, said);
  };
  refuse("num_hidden_layers", 10001, "10001, expected 1 to 10000");
  refuse("sliding_window", -1, "-1, expected 0 (none) or more");
}

TEST(Llama, RefusesConfigsThatItWouldComputeWrongly) {
  const nlohmann::json good = testing::tiny_llama();
  EXPECT_EQ(code_of(good), ExitCode::kDone);
  const std::vector<std::pair<const char*, nlohmann::json>> mistakes = {
      {"hidden_act", "gelu"},
      {"num_key_value_heads", 4},
      {"head_dim", 15},
      {"hidden_size", 0},
      {"vocab_size", "many"},
      {"num_hidden_layers", 1 << 20},
      {"model_type", 3},
      {"partial_rotary_factor", 0.5},
      {"rope_parameters", {{"partial_rotary_factor", 0.5}}},
      {"rope_parameters", {{"rope_type", "proportional"}}},
      {"rope_parameters", {{"rope_type", "linear"}, {"factor", 0.0}}},
      {"rope_parameters", {{"rope_type", "yarn"}}},
      {"rope_parameters", {{"rope_type", "longrope"}, {"factor", 2.0}}},
      {"rope_parameters",
       {{"rope_type", "longrope"}, {"short_factor", {1.0}}, {"long_factor", {1.0}}}},
      {"rope_parameters",
       {{"rope_type", "llama3"}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}}}};
  for (const auto& [field, value] : mistakes) {
    nlohmann::json config = good;
    config[field] = value;
    EXPECT_EQ(code_of(config), ExitCode::kData) << field;
  }
}

}  // namespace
}  // namespace graft::models
