// Whole tiny models against transformers, PEFT and torch: files they saved, and what they computed
// from them. The numbers are written by tests/oracle/make_fixtures.py into GRAFT_ORACLE_DIR, whose
// layout its header describes.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "dist/comm_factory.h"
#include "kernels/adamw/adamw.h"
#include "launcher/gradients.h"
#include "launcher/optim/rules.h"
#include "models/base.h"
#include "models/io/json_file.h"
#include "models/io/open_source.h"
#include "models/io/safetensors.h"
#include "tests/testing.h"

namespace graft::models {
namespace {

using testing::Base;
using testing::batch_of;
using testing::relative_error;

constexpr double kTolerance = 1e-4;  // of float32 against other kernels; measured below 1e-5

/// LoRA takes nothing from the base: asking for a weight is a mistake.
class NoBaseWeights : public peft::BaseWeights {
  Tensor weight(const peft::LinearSite& site) override { throw std::logic_error(site.name); }
  Tensor bias(const peft::LinearSite& site) override { throw std::logic_error(site.name); }
};

class Oracle : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const char* root = std::getenv("GRAFT_ORACLE_DIR");
    if (root == nullptr) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
    folder_ = std::string(root) + "/" + GetParam();
    numbers_ = io::read_json_file(folder_ + "/oracle.json");
    tensors_ = std::make_unique<io::SafetensorsFile>(folder_ + "/oracle.safetensors");
    LoadOptions options = testing::unquantised();
    if (GetParam().ends_with("nf4")) options.quantization = Quantization::kNf4;
    const auto source = io::open_source(folder_ + "/model");
    base_ = std::make_unique<Base>(read_base_config(folder_ + "/model"), *source, *comm_, options);
  }

  data::Batch batch() const {
    return batch_of(tensors_->read("input_ids"), tensors_->read("labels"));
  }
  /// Each row is a lane: the mean over all targets is not the mean of the lanes' means.
  std::vector<Lane> lanes() const {
    std::vector<Lane> lanes;
    for (int64_t row = 0; row < 2; ++row) {
      const auto of_row = [&](const char* name) { return tensors_->read(name).narrow(0, row, 1); };
      lanes.push_back({batch_of(of_row("input_ids"), of_row("labels")), row, 0});
    }
    return lanes;
  }
  std::unique_ptr<peft::Peft> attach_adapter() {
    auto adapters = std::make_unique<peft::Peft>(*base_->model, at::kCPU, 1);
    std::vector<peft::MethodEntry> entries = {{"", nullptr, folder_ + "/adapter"}};
    adapters->attach(entries);
    NoBaseWeights none;
    adapters->initialize(none);
    return adapters;
  }
  /// Forward and backward of both lanes. @return the mean loss
  double sweep(launcher::Gradients& gradients) {
    std::vector<Lane> both = lanes();
    base_->trunk->sweep(both, gradients, {});
    const auto targets = static_cast<double>(both[0].batch.num_targets + both[1].batch.num_targets);
    gradients.reduce(*comm_, targets);
    return (both[0].loss_sum + both[1].loss_sum) / targets;
  }
  void expect_training(const char* name, double max_grad_norm);

  std::unique_ptr<dist::Comm> comm_ = dist::make_single_comm();
  std::string folder_;
  nlohmann::json numbers_;
  std::unique_ptr<io::SafetensorsFile> tensors_;
  std::unique_ptr<Base> base_;
};

TEST_P(Oracle, BaseLogitsAndLossEqualTransformers) {
  EXPECT_EQ(batch().num_targets, numbers_["num_targets"]);
  EXPECT_LT(relative_error(base_->logits(batch()), tensors_->read("logits")), kTolerance);
  EXPECT_NEAR(base_->mean_loss(batch()), numbers_["loss"], kTolerance);
}

TEST_P(Oracle, LogitsWithTheAdapterEqualPeft) {
  const auto adapters = attach_adapter();
  EXPECT_LT(relative_error(base_->logits(batch()), tensors_->read("adapter_logits")), kTolerance);
  EXPECT_NEAR(base_->mean_loss(batch()), numbers_["adapter_loss"], kTolerance);
}

TEST_P(Oracle, EveryGradientEqualsPeft) {
  const auto adapters = attach_adapter();
  launcher::Gradients gradients(adapters->params(), base_->model->num_stages(), 2,
                                launcher::Reduction::kTree);
  EXPECT_NEAR(sweep(gradients), numbers_["adapter_loss"], kTolerance);
  const auto& params = adapters->params().all();
  EXPECT_EQ(params.size() + 4,
            tensors_->entries().size());  // beside input_ids, labels and two logits
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor expected = tensors_->read("grad." + params[i].hf_key);
    EXPECT_LT(relative_error(gradients.of()[i], expected), kTolerance) << params[i].hf_key;
  }
}

void Oracle::expect_training(const char* name, double max_grad_norm) {
  const auto adapters = attach_adapter();
  const auto& train = numbers_["train"];
  launcher::Gradients gradients(adapters->params(), base_->model->num_stages(), 2,
                                launcher::Reduction::kTree);
  launcher::AdamW optimizer(adapters->params(), {train["weight_decay"]});
  ASSERT_EQ(train[name].size(), 10U);
  for (const double expected : train[name]) {
    EXPECT_NEAR(sweep(gradients), expected, kTolerance) << "step " << optimizer.num_steps() + 1;
    const double norm = std::sqrt(kernels::sum_of_squares(gradients.flat()));
    if (norm > max_grad_norm) gradients.flat().mul_(max_grad_norm / (norm + 1e-6));
    optimizer.step(gradients.of(), train["learning_rate"]);
  }
}

TEST_P(Oracle, TenStepsOfAdamWHaveTheLossesOfTorch) { expect_training("losses", INFINITY); }

TEST_P(Oracle, TenStepsWithClippingHaveTheLossesOfTorch) {
  expect_training("losses_max_grad_norm_1", 1.0);
}

INSTANTIATE_TEST_SUITE_P(Cases, Oracle,
                         ::testing::Values("llama_tied", "llama_llama3_rope", "mistral_window",
                                           "qwen2", "qwen3", "llama_nf4"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace graft::models
