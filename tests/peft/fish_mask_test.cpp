// FISH Mask: the Fisher information against a PyTorch loop of batch 1, the choice at any world
// size, and what training with the mask does.
#include <gtest/gtest.h>

#include <cstdlib>
#include <mutex>

#include "models/io/json_file.h"
#include "models/io/open_source.h"
#include "tests/peft/tiny.h"
#include "tests/testing.h"

namespace graft::peft {
namespace {

using testing::tiny_llama;

models::LoadOptions dense() {
  models::LoadOptions options;
  options.quantization = models::Quantization::kNone;
  return options;
}

std::shared_ptr<Method> fish(const std::string& fields) {
  std::shared_ptr<Method> method = methods().make("fish_mask");
  read_fields(*method, fields);
  return method;
}

std::map<std::string, Tensor> places(const Tiny& tiny) {
  std::map<std::string, Tensor> found;
  for (const Constant& constant : tiny.adapters.params().constants())
    found[constant.hf_key] = constant.value.clone();
  return found;
}

TEST(FishMask, EightEqualSamplesHaveEightTimesTheSquare) {
  const auto model = models::make_model(tiny_llama());
  const SlotMap slots(*model);
  const auto scores = [&](int times) {
    const auto method = fish("{}");
    const Observation seen{peft::fill("x", {5, 4}, 1), peft::fill("dy", {5, 3}, 1), {}};
    for (int i = 0; i < times; ++i) method->observe(slots.linears[1], seen);
    return method->scores(slots.linears[1]);
  };
  const Tensor gradient = at::mm(peft::fill("dy", {5, 3}, 1).t(), peft::fill("x", {5, 4}, 1));
  EXPECT_LT(testing::relative_error(scores(8), (8 * gradient.square()).flatten()), 1e-6);
}

TEST(FishMask, ChoosesExactlyTheShareOfAllValuesTogether) {
  Tiny tiny(tiny_llama());
  tiny.attach("fish_mask", fish("{keep: 0.03}"));
  tiny.load(dense());
  int64_t total = 0;
  for (const LinearSite& site : tiny.adapters.slots().linears)
    total += site.layer >= 0 ? site.info.in * site.info.out : 0;
  EXPECT_EQ(tiny.adapters.params().numel(),
            static_cast<int64_t>(0.03 * static_cast<double>(total)));
  std::set<int64_t> counts;
  for (const Param& param : tiny.params()) counts.insert(param.numel());
  EXPECT_GT(counts.size(), 1U) << "the share is of each matrix";
}

// The forward pass of calibration has seen the places of before the choice, as many of them.
TEST(FishMask, TrainsThePlacesThatItSaves) {
  Tiny tiny(tiny_llama());
  tiny.attach("fish_mask", fish("{keep: 0.05, target_modules: [block.0.attn.q]}"));
  tiny.load(dense());
  const LinearSite& site = *tiny.adapters.slots().find_linear("block.0.attn.q");
  const at::NoGradGuard no_grad;
  Tensor values = tiny.params()[0].value;
  values.fill_(1);
  const Tensor zero = at::zeros({site.info.out, site.info.in});
  const Tensor update = site.slot->adapters()[0]->merged(zero);
  EXPECT_EQ(update.count_nonzero().item<int64_t>(), values.numel());
  const Tensor p = tiny.adapters.params().constants()[0].value.to(at::kLong);
  EXPECT_TRUE(update.index({p[0], p[1]}).eq(1).all().item<bool>());
}

TEST(FishMask, SeesAsManyRowsAsItAskedFor) {
  const auto run = [](bool beside_another) {
    Tiny tiny(tiny_llama());
    tiny.attach("fish_mask", fish("{keep: 0.02, num_samples: 2, target_modules: [attn.q]}"));
    if (beside_another)
      tiny.attach("fish_mask", fish("{keep: 0.02, num_samples: 4, target_modules: [attn.v]}"));
    tiny.first_rows = {make_lane(0)};
    if (beside_another) tiny.first_rows.push_back(make_lane(1));
    tiny.load(dense());
    std::map<std::string, Tensor> found;
    for (const auto& [key, value] : places(tiny)) {
      if (key.find("q_proj") != std::string::npos) found[key] = value;
    }
    return found;
  };
  const auto alone = run(false), beside = run(true);
  ASSERT_EQ(alone.size(), 2U);
  for (const auto& [key, value] : alone) EXPECT_TRUE(at::equal(beside.at(key), value)) << key;
}

TEST(FishMask, SamePlacesOnOneTwoAndFourRanks) {
  const auto run = [](dist::Comm* comm) {
    Tiny tiny(tiny_llama());
    tiny.attach("fish_mask", fish("{keep: 0.02}"));
    tiny.load(dense(), comm);
    return places(tiny);
  };
  const auto expected = run(nullptr);
  std::mutex mutex;
  for (const int world : {2, 4}) {
    dist::run_virtual_ranks(world, [&](dist::Comm& comm) {
      const auto found = run(&comm);
      const std::lock_guard lock(mutex);
      for (const auto& [key, value] : expected) EXPECT_TRUE(at::equal(found.at(key), value)) << key;
    });
  }
}

TEST(FishMask, NothingOffTheMaskMovesWithWeightDecay) {
  Tiny tiny(tiny_llama());
  tiny.attach("fish_mask", fish("{keep: 0.05}"));
  tiny.load(dense());
  tiny.optimizer = std::make_unique<launcher::AdamW>(tiny.adapters.params(),
                                                     launcher::StepConfig{.weight_decay = 0.1});
  for (int i = 0; i < 3; ++i) tiny.step({make_lane(0), make_lane(1)}, 2);
  const at::NoGradGuard no_grad;
  int64_t moved = 0;
  for (const LinearSite& site : tiny.adapters.slots().linears) {
    if (site.slot->empty()) continue;
    const Tensor w = peft::fill(site.name, {site.info.out, site.info.in}, 1);
    moved += site.slot->adapters().front()->merged(w).ne(w).sum().item<int64_t>();
  }
  EXPECT_GT(moved, 0.9 * static_cast<double>(tiny.adapters.params().numel()));
  EXPECT_LE(moved, tiny.adapters.params().numel());
}

// The mean over five draws of the random mask, of as many values, is worse.
TEST(FishMask, LearnsMoreThanARandomMask) {
  const std::vector<models::Lane> lanes = {make_lane(0), make_lane(1)};
  const auto loss_after = [&](const std::string& name, const std::shared_ptr<Method>& method) {
    Tiny tiny(tiny_llama());
    tiny.attach(name, method);
    tiny.first_rows = lanes;
    tiny.load(dense());
    for (int i = 0; i < 20; ++i) tiny.step(lanes, 2);
    return std::pair(tiny.sweep(lanes, 2).loss, tiny.adapters.params().numel());
  };
  double random = 0;
  int64_t values = 0;
  for (int seed = 0; seed < 5; ++seed) {
    std::shared_ptr<Method> shira = methods().make("shira");
    read_fields(*shira,
                "{target_modules: all-linear, r: 1, random_seed: " + std::to_string(seed) + "}");
    const auto [loss, n] = loss_after("shira", shira);
    random += loss / 5, values = n;
  }
  int64_t total = 0;
  const auto model = models::make_model(tiny_llama());
  const SlotMap slots(*model);
  for (const LinearSite& site : slots.linears)
    total += site.layer >= 0 ? site.info.in * site.info.out : 0;
  const double keep = static_cast<double>(values) / static_cast<double>(total);
  const auto [loss, n] = loss_after("fish_mask", fish("{keep: " + std::to_string(keep) + "}"));
  EXPECT_LE(n, values);
  EXPECT_LT(loss, random);
}

class FishOracle : public ::testing::TestWithParam<std::string> {};

TEST_P(FishOracle, PlacesAndLossesAreTorchs) {
  const char* root = std::getenv("GRAFT_ORACLE_DIR");
  if (root == nullptr) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
  const std::string folder = std::string(root) + "/" + GetParam();
  const auto numbers = models::io::read_json_file(folder + "/fish.json");
  const models::io::SafetensorsFile rows(folder + "/oracle.safetensors");
  const models::io::SafetensorsFile expected(folder + "/fish.safetensors");
  std::vector<models::Lane> lanes;
  for (int64_t row = 0; row < 2; ++row) {
    const auto of_row = [&](const char* name) { return rows.read(name).narrow(0, row, 1); };
    lanes.push_back({testing::batch_of(of_row("input_ids"), of_row("labels")), row, 0});
  }
  const auto source = models::io::open_source(folder + "/model");
  Tiny tiny(models::read_base_config(folder + "/model"));
  // So many that the share of all values rounds down to torch's count.
  const double keep = (numbers["count"].get<double>() + 0.5) / numbers["total"].get<double>();
  tiny.attach("fish_mask", fish("{keep: " + std::to_string(keep) + "}"));
  tiny.first_rows = lanes;
  tiny.load(dense(), nullptr,
            [&](const std::string& name, const Tensor&) { return source->read(name); });
  EXPECT_EQ(tiny.adapters.params().numel(), numbers["count"].get<int64_t>());
  for (const LinearSite& site : tiny.adapters.slots().linears) {
    if (site.slot->empty()) continue;
    const Tensor found = places(tiny).at("base_model.model." + site.hf_path + ".fish_places");
    EXPECT_TRUE(at::equal(found[0].to(at::kLong) * site.info.in + found[1].to(at::kLong),
                          expected.read("places." + site.hf_path)))
        << site.name;
  }
  for (const double loss : numbers["losses"]) EXPECT_NEAR(tiny.step(lanes, 2, 1e-2), loss, 1e-4);
}

INSTANTIATE_TEST_SUITE_P(Cases, FishOracle,
                         ::testing::Values("llama_tied", "mistral_window", "qwen2", "qwen3"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace graft::peft
