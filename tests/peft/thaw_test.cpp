// Storage class S: weights of the base trained where they lie, cut over the ranks. The oracle is
// transformers' own full fine-tuning (tests/oracle/make_fixtures.py).
#include <c10/core/Allocator.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "models/io/json_file.h"
#include "models/io/open_source.h"
#include "tests/peft/tiny.h"
#include "tests/testing.h"

namespace graft::peft {
namespace {

using testing::relative_error;
using testing::tiny_llama;

models::LoadOptions options_of(models::Quantization quantization, at::ScalarType dtype) {
  models::LoadOptions options;
  options.quantization = quantization;
  options.compute_dtype = dtype;
  return options;
}

const std::string kEverything = "{num_layers: 3, final_norm: true, head: true, embeddings: true}";

struct Thawed {
  std::string method, fields = "{}";
  bool tied = true;
  models::Quantization quantization = models::Quantization::kNone;
  at::ScalarType dtype = at::kFloat;

  std::unique_ptr<Tiny> make(dist::Comm* comm = nullptr) const {
    auto tiny = std::make_unique<Tiny>(tiny_llama(3, tied));
    std::shared_ptr<Method> made = methods().make(method);
    read_fields(*made, fields);
    tiny->attach(method, made);
    tiny->load(options_of(quantization, dtype), comm);
    return tiny;
  }
};

std::vector<models::Lane> lanes(int64_t begin, int64_t end) {
  std::vector<models::Lane> lanes;
  for (int64_t lane = begin; lane < end; ++lane) lanes.push_back(make_lane(lane));
  return lanes;
}

void expect_same(const models::io::NamedTensors& a, const models::io::NamedTensors& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i)
    EXPECT_TRUE(at::equal(a[i].second, b[i].second)) << a[i].first;
}

TEST(FreezeLayers, OfAllLayersIsFullFineTuningStepForStep) {
  for (const bool tied : {true, false}) {
    const auto full = Thawed{"full", "{}", tied}.make();
    const auto frozen = Thawed{"freeze_layers", kEverything, tied}.make();
    for (int i = 0; i < 3; ++i)
      EXPECT_EQ(frozen->step(lanes(0, 2), 2), full->step(lanes(0, 2), 2)) << "tied: " << tied;
    expect_same(frozen->saved_tensors(), full->saved_tensors());
  }
}

TEST(FreezeLayers, OfTheHeadAloneIsTheLinearProbe) {
  const auto frozen = Thawed{"freeze_layers", "{num_layers: 0, head: true}", false}.make();
  const auto probe = Thawed{"linear_probe", "{}", false}.make();
  for (int i = 0; i < 3; ++i)
    EXPECT_NEAR(frozen->step(lanes(0, 2), 2), probe->step(lanes(0, 2), 2), 1e-6);
  EXPECT_LT(
      relative_error(frozen->saved_tensors().front().second, probe->saved_tensors().front().second),
      1e-6);
}

/// Counts what this thread allocates and frees while it lives.
class Allocated : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device) override {
    now += bytes;
    most = std::max(most, now);
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t now = 0, most = 0;
};

/// The most bytes that are live at once in a sweep.
int64_t peak_of_sweep(int layers, const std::string& fields) {
  Tiny tiny(tiny_llama(layers, false));
  std::shared_ptr<Method> method = methods().make("freeze_layers");
  read_fields(*method, fields);
  tiny.attach("freeze_layers", method);
  tiny.load(options_of(models::Quantization::kNone, at::kFloat));
  const auto comm = dist::make_single_comm();
  launcher::Gradients sink(tiny.adapters.params(), tiny.model->num_stages(), 1,
                           launcher::Reduction::kTree, comm.get());
  models::TrunkOptions options;
  options.lowest_trained = tiny.adapters.params().lowest_stage();
  std::vector<models::Lane> lane = lanes(0, 1);
  const auto allocated = std::make_shared<Allocated>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, allocated);
  tiny.trunk->sweep(lane, sink, options);
  return allocated->most;
}

TEST(FreezeLayers, PeakOfActivationsIsFlatInTheNumberOfFrozenLayers) {
  const int64_t four = peak_of_sweep(4, "{num_layers: 1}"),
                eight = peak_of_sweep(8, "{num_layers: 1}");
  EXPECT_GT(four, 0);
  EXPECT_EQ(eight, four);
  EXPECT_GT(peak_of_sweep(8, "{num_layers: 8}"), eight);
}

TEST(FreezeLayers, OnlyTheTopBlocksHaveGradients) {
  const auto tiny = Thawed{"freeze_layers", "{num_layers: 1}"}.make();
  const ParamSet& params = tiny->adapters.params();
  const auto comm = dist::make_single_comm();
  launcher::Gradients gradients(params, tiny->model->num_stages(), 1, launcher::Reduction::kTree,
                                comm.get());
  for (int stage = 0; stage < tiny->model->num_stages(); ++stage)
    EXPECT_EQ(gradients.parameters(stage).size(), stage == 3 ? 9U : 0U) << "stage " << stage;
  EXPECT_EQ(params.lowest_stage(), 3);
  for (const Param& param : params.all()) EXPECT_TRUE(param.name.starts_with("0.block.2."));
}

TEST(FreezeLayers, RestStaysQuantisedAndOnlyThatIsHashed) {
  const auto tiny =
      Thawed{"freeze_layers", "{num_layers: 1}", true, models::Quantization::kNf4}.make();
  std::map<std::string, std::string> formats;
  models::for_each_weight(*tiny->model, [&](int, const std::string& name, const models::Weight& w) {
    formats[name] = w.format().name();
  });
  EXPECT_EQ(formats["block.1.attn.q.weight"], "nf4 (double quantised)");
  EXPECT_EQ(formats["block.2.attn.q.weight"], "Float");
  const std::string base = tiny->store->hash();
  tiny->step(lanes(0, 2), 2);
  EXPECT_EQ(tiny->store->hash(), base);
  tiny->store->own(3, 0, 1).add_(1);  // nothing of block 2 is frozen, its stage is 3
  EXPECT_EQ(tiny->store->hash(), base);
  tiny->store->own(2, 0, 1).add_(1);
  EXPECT_NE(tiny->store->hash(), base);
}

TEST(FreezeLayers, MoreLayersThanThereAreAreRefused) {
  models::io::expect_refused(
      [] {
        (void)Thawed{"freeze_layers", "{num_layers: 4}"}.make();
      },
      "num_layers = 4, the model has 3", ExitCode::kUsage);
}

TEST(FreezeLayers, AnAdapterOnAThawedMatrixIsRefusedWithBothNames) {
  Tiny tiny(tiny_llama(3));
  tiny.attach("lora", methods().make("lora"));
  tiny.attach("full", methods().make("full"));
  models::io::expect_refused([&] { tiny.load(); }, "block.0.attn.q.weight is trained whole",
                             ExitCode::kUsage);
}

/// Losses and saved tensors of three steps over four lanes.
void expect_equal_at_any_world_size(const Thawed& thawed) {
  const auto alone = thawed.make();
  std::vector<double> expected;
  for (int i = 0; i < 3; ++i) expected.push_back(alone->step(lanes(0, 4), 4));
  const auto saved = alone->saved_tensors();
  std::mutex mutex;
  for (const int world : {2, 4}) {
    dist::run_virtual_ranks(world, [&](dist::Comm& comm) {
      const auto tiny = thawed.make(&comm);
      const int64_t per_rank = 4 / world;
      std::vector<double> losses;
      for (int i = 0; i < 3; ++i) {
        losses.push_back(
            tiny->step(lanes(comm.rank() * per_rank, (comm.rank() + 1) * per_rank), 4));
      }
      const auto mine = tiny->saved_tensors();
      const std::lock_guard lock(mutex);
      EXPECT_EQ(losses, expected) << "rank " << comm.rank() << " of " << world;
      if (comm.rank() == 0) expect_same(mine, saved);
      EXPECT_GT(comm.bytes(dist::Traffic::kReduced), 0);
    });
  }
}

TEST(Thaw, SameBitsOnOneTwoAndFourRanks) {
  for (const bool tied : {true, false}) {
    expect_equal_at_any_world_size({"full", "{}", tied});
    expect_equal_at_any_world_size(
        {"full", "{}", tied, models::Quantization::kNone, at::kBFloat16});
  }
  expect_equal_at_any_world_size(
      {"freeze_layers", "{num_layers: 2, head: true}", false, models::Quantization::kNf4});
}

// K7: blocks below the lowest trained one are gathered on the way up only.
TEST(Thaw, NothingIsGatheredBelowTheLowestTrainedBlock) {
  dist::run_virtual_ranks(2, [](dist::Comm& comm) {
    const auto gathered = [&](const std::string& fields) {
      const auto tiny = Thawed{"freeze_layers", fields, false}.make(&comm);
      tiny->step(lanes(comm.rank(), comm.rank() + 1), 2);
      const int64_t before = comm.bytes(dist::Traffic::kGathered);
      tiny->step(lanes(comm.rank(), comm.rank() + 1), 2);
      return comm.bytes(dist::Traffic::kGathered) - before;
    };
    const auto tiny = Thawed{"full", "{}", false}.make(&comm);
    const int64_t block = tiny->store->shard_bytes(1);
    // Two buffers: blocks 3 and 2 are still there on the way down, 1 is gathered again.
    const int64_t all = gathered("{num_layers: 3}"), top = gathered("{num_layers: 1}");
    EXPECT_EQ(all - top, block);
  });
}

TEST(LinearProbe, OnlyTheHeadsStageRunsBackward) {
  dist::run_virtual_ranks(2, [](dist::Comm& comm) {
    const auto tiny = Thawed{"linear_probe", "{}", false}.make(&comm);
    EXPECT_EQ(tiny->adapters.params().lowest_stage(), tiny->model->num_stages() - 1);
    const auto gathered = [&](const auto& pass) {
      const int64_t before = comm.bytes(dist::Traffic::kGathered);
      pass();
      return comm.bytes(dist::Traffic::kGathered) - before;
    };
    const auto mine = lanes(comm.rank(), comm.rank() + 1);
    const auto step = [&] { tiny->step(mine, 2); };
    const auto forward = [&] { tiny->logits(mine.front().batch); };
    step();
    EXPECT_EQ(gathered(step), gathered(forward));
    EXPECT_GT(gathered(forward), 0);
  });
}

// The norm that clipping uses is one tree over the elements of each weight.
TEST(Thaw, GradientNormHasTheSameBitsAtAnyWorldSize) {
  std::mutex mutex;
  std::vector<double> norms;
  double plain = 0;
  for (const int world : {1, 2, 4}) {
    dist::run_virtual_ranks(world, [&](dist::Comm& comm) {
      const auto tiny = Thawed{"full"}.make(&comm);
      launcher::Gradients gradients(tiny->adapters.params(), tiny->model->num_stages(), 4,
                                    launcher::Reduction::kTree, &comm);
      const int64_t per_rank = 4 / world;
      auto mine = lanes(comm.rank() * per_rank, (comm.rank() + 1) * per_rank);
      tiny->trunk->sweep(mine, gradients, {});
      gradients.reduce(comm, 1.0);
      const double norm = gradients.norm();
      const std::lock_guard lock(mutex);
      norms.push_back(norm);
      if (world == 1) {
        for (const Tensor& g : gradients.of())
          plain += g.to(at::kDouble).square().sum().item<double>();
      }
    });
  }
  EXPECT_NEAR(norms[0], std::sqrt(plain), 1e-9 * norms[0]);
  for (const double norm : norms) EXPECT_EQ(norm, norms[0]);
}

class FullOracle : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const char* root = std::getenv("GRAFT_ORACLE_DIR");
    if (root == nullptr) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
    folder_ = std::string(root) + "/" + GetParam();
    numbers_ = models::io::read_json_file(folder_ + "/full.json");
    const models::io::SafetensorsFile rows(folder_ + "/oracle.safetensors");
    for (int64_t row = 0; row < 2; ++row) {
      const auto of_row = [&](const char* name) { return rows.read(name).narrow(0, row, 1); };
      lanes_.push_back({testing::batch_of(of_row("input_ids"), of_row("labels")), row, 0});
    }
    const auto source = models::io::open_source(folder_ + "/model");
    tiny_ = std::make_unique<Tiny>(models::read_base_config(folder_ + "/model"));
    tiny_->attach("full", methods().make("full"));
    tiny_->load(options_of(models::Quantization::kNone, at::kFloat), nullptr,
                [&](const std::string& name, const Tensor&) { return source->read(name); });
  }
  void expect_training(const char* name, double max_grad_norm) {
    launcher::AdamW optimizer(tiny_->adapters.params(), {.weight_decay = numbers_["weight_decay"]});
    for (const double expected : numbers_[name]) {
      const auto [loss, norm] = sweep();
      EXPECT_NEAR(loss, expected, 1e-4) << "step " << optimizer.num_steps() + 1;
      if (norm > max_grad_norm) gradients_->scale(max_grad_norm / (norm + 1e-6));
      optimizer.step(gradients_->of(), numbers_["learning_rate"]);
      tiny_->adapters.publish();
    }
  }
  /// Loss and gradient norm.
  std::pair<double, double> sweep() {
    gradients_.emplace(tiny_->adapters.params(), tiny_->model->num_stages(), 2,
                       launcher::Reduction::kTree, comm_.get());
    tiny_->trunk->sweep(lanes_, *gradients_, {});
    const auto targets =
        static_cast<double>(lanes_[0].batch.num_targets + lanes_[1].batch.num_targets);
    gradients_->reduce(*comm_, targets);
    return {(lanes_[0].loss_sum + lanes_[1].loss_sum) / targets, gradients_->norm()};
  }

  std::string folder_;
  nlohmann::json numbers_;
  std::vector<models::Lane> lanes_;
  std::unique_ptr<dist::Comm> comm_ = dist::make_single_comm();
  std::unique_ptr<Tiny> tiny_;
  std::optional<launcher::Gradients> gradients_;
};

TEST_P(FullOracle, EveryGradientEqualsTransformers) {
  sweep();
  const models::io::SafetensorsFile expected(folder_ + "/full.safetensors");
  const auto& params = tiny_->params();
  EXPECT_EQ(params.size(), expected.entries().size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& gradient = gradients_->of()[i];
    EXPECT_LT(relative_error(gradient.view(params[i].thawed->shape()),
                             expected.read("grad." + params[i].hf_key)),
              1e-4)
        << params[i].hf_key;
  }
}

TEST_P(FullOracle, TenStepsHaveTheLossesOfTorch) { expect_training("losses", INFINITY); }

TEST_P(FullOracle, TenStepsWithClippingHaveTheLossesOfTorch) {
  expect_training("losses_max_grad_norm_1", 1.0);
}

INSTANTIATE_TEST_SUITE_P(Cases, FullOracle,
                         ::testing::Values("llama_tied", "llama_llama3_rope", "mistral_window",
                                           "qwen2", "qwen3"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace graft::peft
