// A real model, SmolLM2-135M-Instruct in GGUF (GRAFT_SMOLLM2), against transformers:
// tests/golden/smollm2_gguf.json.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "dist/comm_factory.h"
#include "launcher/generate.h"
#include "models/base.h"
#include "models/io/open_source.h"
#include "tests/testing.h"

namespace graft::models {
namespace {

using testing::Base;
using testing::batch_of;

class SmolLm2 : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* path = std::getenv("GRAFT_SMOLLM2");
    if (path == nullptr) GTEST_SKIP() << "GRAFT_SMOLLM2 is not set";
    path_ = path;
  }
  Base load(Quantization quantization, bool double_quantization = false) {
    LoadOptions options;
    options.quantization = quantization;
    options.double_quantization = double_quantization;
    const auto source = io::open_source(path_);
    return Base(read_base_config(path_), *source, *world_.host, options);
  }
  std::vector<int64_t> ids(const char* name) const { return golden_[name]; }
  /// The prompt and its greedy continuation as one row.
  data::Batch prompt_and_continuation() const {
    std::vector<int64_t> all = ids("prompt_ids");
    for (const int64_t id : ids("greedy_new_ids")) all.push_back(id);
    return batch_of(at::tensor(all).unsqueeze(0));
  }
  static launcher::World one_rank() {
    launcher::World world;
    world.host = dist::make_single_comm();
    return world;
  }

  launcher::World world_ = one_rank();
  const nlohmann::json golden_ = testing::golden("smollm2_gguf.json");
  std::string path_;
};

/// [[id, logit] ...], the largest first.
void expect_top(const Tensor& logits_V, const nlohmann::json& expected) {
  const auto [values, ids] = logits_V.topk(static_cast<int64_t>(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    EXPECT_EQ(ids[at].item<int64_t>(), expected[i][0]);
    EXPECT_NEAR(values[at].item<double>(), expected[i][1], 2e-3);
  }
}

TEST_F(SmolLm2, LogitsLossAndGreedyTextEqualTransformers) {
  Base base = load(Quantization::kNone);
  const Tensor logits = base.logits(batch_of(at::tensor(ids("prompt_ids")).unsqueeze(0)))[0];
  expect_top(logits[0], golden_["top5_at_prompt_position_0"]);
  expect_top(logits[-1], golden_["top5_at_last_prompt_position"]);
  EXPECT_NEAR(logits[-1].logsumexp(0).item<double>(), golden_["logsumexp_last_position"], 2e-3);
  EXPECT_NEAR(base.mean_loss(prompt_and_continuation()), golden_["loss_prompt_plus_continuation"],
              1e-4);

  launcher::Workbench bench{world_,  at::kFloat, std::move(base.model), std::move(base.store),
                            nullptr, nullptr,    std::move(base.trunk), ""};
  launcher::GenerateOptions options;
  options.max_new_tokens = static_cast<int64_t>(ids("greedy_new_ids").size());
  EXPECT_EQ(launcher::generate(bench, ids("prompt_ids"), options, [](int64_t) {}),
            ids("greedy_new_ids"));
}

/// 2.417 in float32: a model that was four bits already pays twice.
TEST_F(SmolLm2, Nf4HasTheLossOfBitsandbytes) {
  // transformers on every linear's weight after bitsandbytes 0.50.2's quantize_4bit (nf4, blocks of
  // 64) and dequantize_4bit: with compress_statistics, and without.
  EXPECT_NEAR(load(Quantization::kNf4, true).mean_loss(prompt_and_continuation()), 3.2413814, 1e-4);
  EXPECT_NEAR(load(Quantization::kNf4, false).mean_loss(prompt_and_continuation()), 3.2335846,
              1e-4);
}

}  // namespace
}  // namespace graft::models
