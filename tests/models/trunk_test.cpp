// The sweep: against ordinary autograd of the whole model, and against itself where the order of
// work must not matter.
#include "models/trunk.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "configs/check.h"
#include "dist/comm_factory.h"
#include "launcher/gradients.h"
#include "peft/slot_map.h"
#include "tests/testing.h"

namespace graft::models {
namespace {

using dist::Comm;
using dist::run_virtual_ranks;
using dist::Traffic;
using testing::Base;
using testing::batch_of;

constexpr int64_t kLanes = 4;

/// What a test varies.
struct Variant {
  int layers = 2;
  bool tied_head = false;
  nlohmann::json targets = "all-linear";
  nlohmann::json only_layers = nlohmann::json::array();
  double dropout = 0;
};

/// The step's lanes that one rank owns; those listed as empty hold no token.
std::vector<Lane> lanes_of(int rank, int world, const std::vector<int64_t>& empty = {}) {
  std::vector<Lane> lanes;
  for (int64_t k = rank * kLanes / world; k < (rank + 1) * kLanes / world; ++k) {
    data::Batch batch =
        batch_of(testing::random_tokens(2, 8 + k, 128, 10 + static_cast<uint64_t>(k)));
    if (std::find(empty.begin(), empty.end(), k) != empty.end()) {
      batch.documents_BL.fill_(-1), batch.labels_BL.fill_(-100);
      batch.num_tokens = batch.num_targets = 0;
    }
    lanes.push_back({std::move(batch), k, 0});
  }
  return lanes;
}

/// What a step leaves: the gradients, flat and in the ParamSet's order, and each lane's loss.
struct Step {
  Tensor gradients;
  std::vector<double> losses;
};

void expect_equal(const Step& a, const Step& b) {
  EXPECT_TRUE(at::equal(a.gradients, b.gradients));
  EXPECT_EQ(a.losses, b.losses);
  EXPECT_GT(a.gradients.abs().max().item<float>(), 0);
}

/// A tiny Llama with LoRA on one rank.
class Bench {
 public:
  Bench(Comm& comm, const Variant& setup)
      : comm_(comm),
        base_(testing::tiny_llama(setup.layers, setup.tied_head), comm),
        adapters_(testing::attach(*base_.model, "lora",
                                  {{"r", 4},
                                   {"lora_alpha", 8},
                                   {"lora_dropout", setup.dropout},
                                   {"target_modules", setup.targets},
                                   {"layers_to_transform", setup.only_layers}})) {
    options.random = {3, 0};
  }

  /// @param per_sweep  lanes that share a sweep
  Step step(std::vector<Lane> lanes, size_t per_sweep = kLanes, int64_t num_lanes = kLanes) {
    launcher::Gradients gradients(params(), base_.model->num_stages(), num_lanes,
                                  launcher::Reduction::kTree);
    for (size_t first = 0; first < lanes.size(); first += per_sweep) {
      const size_t count = std::min(per_sweep, lanes.size() - first);
      base_.trunk->sweep(std::span(lanes).subspan(first, count), gradients, options);
    }
    gradients.reduce(comm_, 1);
    return {flat(gradients.of()), losses(lanes)};
  }

  /// The same by one autograd graph over the whole model and all lanes, without the trunk.
  Step by_plain_autograd(const std::vector<Lane>& lanes) {
    std::vector<std::unique_ptr<dist::Pin>> pins;
    for (int b = 0; b < store().num_blocks(); ++b)
      pins.push_back(std::make_unique<dist::Pin>(store(), b));
    Step result;
    Tensor total = at::zeros({});
    for (const Lane& lane : lanes) {
      Pass pass;
      pass.batch = &lane.batch;
      pass.lane = lane.number;
      pass.training = true;
      pass.random = kernels::derive(options.random, lane.number);
      Carry carry;
      for (pass.stage = 0; pass.stage < base_.model->num_stages(); ++pass.stage) {
        carry = base_.model->stage(pass.stage, std::move(carry), pass);
      }
      result.losses.push_back(carry.h().item<double>());
      total = total + carry.h();
    }
    std::vector<Tensor> values;
    for (const peft::Param& param : params().all()) values.push_back(param.value);
    result.gradients = flat(torch::autograd::grad({total}, values));
    return result;
  }

  const peft::ParamSet& params() const { return adapters_->params(); }
  dist::BlockStore& store() { return *base_.store; }
  Model& model() { return *base_.model; }
  Trunk& trunk() { return *base_.trunk; }
  TrunkOptions options;

 private:
  static Tensor flat(const std::vector<Tensor>& gradients) {
    std::vector<Tensor> parts;
    for (const Tensor& g : gradients) parts.push_back(g.flatten());
    return at::cat(parts);
  }
  static std::vector<double> losses(const std::vector<Lane>& lanes) {
    std::vector<double> out;
    for (const Lane& lane : lanes) out.push_back(lane.loss_sum);
    return out;
  }

  Comm& comm_;
  Base base_;
  std::unique_ptr<peft::Peft> adapters_;
};

Step one_rank_step(const Variant& setup, const std::vector<int64_t>& empty = {}) {
  at::set_num_threads(1);  // as every virtual rank has
  const auto comm = dist::make_single_comm();
  return Bench(*comm, setup).step(lanes_of(0, 1, empty));
}

TEST(Trunk, GradientsEqualOrdinaryAutograd) {
  const auto comm = dist::make_single_comm();
  for (const bool tied : {false, true}) {
    for (const nlohmann::json& targets :
         {nlohmann::json("all-linear"), nlohmann::json{"embed_tokens", "lm_head"},
          nlohmann::json{"embed_tokens", "q_proj", "down_proj", "lm_head"}}) {
      Bench bench(*comm, {.tied_head = tied, .targets = targets, .dropout = 0.1});
      const Step expected = bench.by_plain_autograd(lanes_of(0, 1)),
                 step = bench.step(lanes_of(0, 1));
      EXPECT_LT(testing::relative_error(step.gradients, expected.gradients), 1e-6) << targets;
      EXPECT_EQ(step.losses, expected.losses);
    }
  }
}

TEST(Trunk, RecomputeChangesNoBit) {
  const auto comm = dist::make_single_comm();
  Bench bench(*comm, {.dropout = 0.1});
  const Step kept = bench.step(lanes_of(0, 1));
  bench.options.recompute = Recompute::kOn;
  expect_equal(bench.step(lanes_of(0, 1)), kept);
}

TEST(Trunk, LanesOfOneSweepEqualOneLaneASweep) {
  const auto comm = dist::make_single_comm();
  Bench bench(*comm, {.dropout = 0.1});
  const Step together = bench.step(lanes_of(0, 1));
  for (const size_t per_sweep : {1, 3})
    expect_equal(bench.step(lanes_of(0, 1), per_sweep), together);
}

TEST(Trunk, DropoutFollowsItsKey) {
  const auto comm = dist::make_single_comm();
  Bench bench(*comm, {.dropout = 0.1});
  const Step first = bench.step(lanes_of(0, 1));
  bench.options.random = {4, 0};
  EXPECT_NE(bench.step(lanes_of(0, 1)).losses, first.losses);
  bench.options.training = false;
  const Step evaluated = bench.step(lanes_of(0, 1));
  bench.options.random = {5, 0};
  expect_equal(bench.step(lanes_of(0, 1)), evaluated);
}

TEST(Trunk, StoppingAtTheLowestTrainedStageChangesNoBit) {
  const auto comm = dist::make_single_comm();
  Bench bench(*comm, {.layers = 3, .only_layers = {1}});
  const Step whole = bench.step(lanes_of(0, 1));
  bench.options.lowest_trained = bench.params().lowest_stage();
  EXPECT_EQ(bench.options.lowest_trained, 2);
  for (const Recompute recompute : {Recompute::kOff, Recompute::kOn}) {
    bench.options.recompute = recompute;
    expect_equal(bench.step(lanes_of(0, 1)), whole);
  }
}

TEST(Trunk, AnyNumberOfRanksGivesTheSameBits) {
  for (const bool tied : {false, true}) {
    const Variant setup{.layers = 3, .tied_head = tied, .dropout = 0.1};
    const Step expected = one_rank_step(setup);
    for (const int world : {1, 2, 4}) {
      std::vector<Step> steps(static_cast<size_t>(world));
      run_virtual_ranks(world, [&](Comm& comm) {
        at::set_num_threads(1);
        steps[static_cast<size_t>(comm.rank())] =
            Bench(comm, setup).step(lanes_of(comm.rank(), world));
      });
      std::vector<double> losses;
      for (const Step& step : steps) {
        EXPECT_TRUE(at::equal(step.gradients, expected.gradients)) << world << " ranks";
        losses.insert(losses.end(), step.losses.begin(), step.losses.end());
      }
      EXPECT_EQ(losses, expected.losses) << world << " ranks";
    }
  }
}

TEST(Trunk, EmptyLanesAddNothing) {
  const Step with_empty = one_rank_step({}, {1, 3});
  const auto comm = dist::make_single_comm();
  std::vector<Lane> real = lanes_of(0, 1);
  real = {real[0], real[2]};
  real[1].number = 1;
  const Step alone = Bench(*comm, {}).step(real, 2, 2);
  EXPECT_TRUE(at::equal(with_empty.gradients, alone.gradients));
  EXPECT_EQ(with_empty.losses, (std::vector<double>{alone.losses[0], 0, alone.losses[1], 0}));
}

TEST(Trunk, ARankWithoutTokensTakesPartInEveryGather) {
  const Step expected = one_rank_step({}, {2, 3});
  run_virtual_ranks(2, [&](Comm& comm) {
    at::set_num_threads(1);
    Bench bench(comm, {});
    EXPECT_TRUE(
        at::equal(bench.step(lanes_of(comm.rank(), 2, {2, 3})).gradients, expected.gradients));
  });
}

/// Bytes that a rank receives in a sweep after the first. Of N layer blocks two stay gathered from
/// sweep to sweep when the way down reaches the bottom; the table of a tied model stays always, an
/// untied one shares its buffer with the head.
int64_t steady_bytes(const dist::BlockStore& store, const Variant& setup, int lowest) {
  const int n = setup.layers;
  std::vector<int> gathered;
  for (int b = lowest <= 1 ? 3 : 1; b <= n; ++b) gathered.push_back(b);
  for (int b = n - 2; b >= std::max(lowest, 1); --b) gathered.push_back(b);
  if (!setup.tied_head) gathered.insert(gathered.end(), {0, n + 2});
  int64_t bytes = 0;
  for (const int b : gathered) bytes += (store.world() - 1) * store.shard_bytes(b);
  return bytes;
}

TEST(Trunk, GathersWhatTheFormulaSaysAndNothingBelowTheLowestTrainedStage) {
  for (const bool tied : {false, true}) {
    for (const nlohmann::json& only :
         {nlohmann::json::array(), nlohmann::json{2}, nlohmann::json{4}}) {
      const Variant setup{.layers = 5, .tied_head = tied, .only_layers = only};
      for (const int world : {2, 4}) {
        run_virtual_ranks(world, [&](Comm& comm) {
          at::set_num_threads(1);
          Bench bench(comm, setup);
          bench.options.lowest_trained = bench.params().lowest_stage();
          bench.step(lanes_of(comm.rank(), world));
          const int64_t expected = steady_bytes(bench.store(), setup, bench.options.lowest_trained);
          for (const Recompute recompute : {Recompute::kOff, Recompute::kOn}) {
            const int64_t before = comm.bytes(Traffic::kGathered);
            bench.options.recompute = recompute;
            bench.step(lanes_of(comm.rank(), world));
            EXPECT_EQ(comm.bytes(Traffic::kGathered) - before, expected)
                << world << " ranks, tied " << tied << ", layers " << only;
          }
        });
      }
    }
  }
}

/// Keeps what the base made of each lane's tokens, and asks for it or does not.
struct Onlooker : SequenceAdapter {
  bool asks = true;
  std::vector<Tensor> seen;
  Carry edit(Carry carry, const Pass& pass) override {
    seen.push_back(pass.look_BTD);
    return carry;
  }
  bool looks() const override { return asks; }
};

std::shared_ptr<Onlooker> look_on(Bench& bench) {
  auto onlooker = std::make_shared<Onlooker>();
  peft::SlotMap(bench.model()).find_input()->slot->push(onlooker);
  return onlooker;
}

TEST(TrunkLook, IsTheLastHiddenStateOfTheBaseWithoutItsAdapters) {
  const auto comm = dist::make_single_comm();
  Bench bench(*comm, {});
  const auto onlooker = look_on(bench);
  const std::vector<Lane> lanes = lanes_of(0, 1);
  bench.step(lanes);
  Pass untouched;
  untouched.adapters = false;
  untouched.want = Want::kLogits;
  const auto logits = bench.trunk().forward(lanes, untouched);
  bench.trunk().forward(lanes, {});
  ASSERT_EQ(onlooker->seen.size(), 2 * lanes.size());
  const Tensor head = testing::golden_weight("lm_head.weight", {128, 48});
  for (size_t l = 0; l < onlooker->seen.size(); ++l) {
    const Tensor& look = onlooker->seen[l];
    EXPECT_FALSE(look.requires_grad());
    EXPECT_LT(testing::relative_error(at::linear(look, head), logits[l % lanes.size()]), 1e-6);
  }
}

TEST(TrunkLook, IsMadeForThoseWhoAskOnlyAndChangesNoBit) {
  const auto comm = dist::make_single_comm();
  Bench bench(*comm, {.dropout = 0.1});
  const Step alone = bench.step(lanes_of(0, 1));
  const auto onlooker = look_on(bench);
  expect_equal(bench.step(lanes_of(0, 1)), alone);
  onlooker->asks = false;
  onlooker->seen.clear();
  bench.step(lanes_of(0, 1));
  for (const Tensor& look : onlooker->seen) EXPECT_FALSE(look.defined());
}

TEST(TrunkLook, CostsAtMostOneMoreGatherOfEachBlock) {
  run_virtual_ranks(2, [](Comm& comm) {
    at::set_num_threads(1);
    Bench bench(comm, {.layers = 5});
    const auto onlooker = look_on(bench);
    const auto bytes_with = [&](bool asks) {
      onlooker->asks = asks;
      bench.step(lanes_of(comm.rank(), 2));  // what the one before left gathered
      const int64_t before = comm.bytes(Traffic::kGathered);
      bench.step(lanes_of(comm.rank(), 2));
      return comm.bytes(Traffic::kGathered) - before;
    };
    int64_t all = 0;
    for (int b = 0; b < bench.store().num_blocks(); ++b) all += bench.store().shard_bytes(b);
    EXPECT_LE(bytes_with(true), bytes_with(false) + all);
  });
}

TEST(Trunk, LeavesTheBaseAsItWasAndNothingPinned) {
  run_virtual_ranks(2, [](Comm& comm) {
    at::set_num_threads(1);
    Bench bench(comm, {});
    const std::string before = bench.store().hash();
    bench.step(lanes_of(comm.rank(), 2));
    EXPECT_EQ(bench.store().hash(), before);
    for (int b = 0; b < bench.store().num_blocks(); ++b)
      EXPECT_THROW(bench.store().bytes(b, 0, 1), Error);
  });
}

}  // namespace
}  // namespace graft::models
