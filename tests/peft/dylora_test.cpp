// DyLoRA: any first ranks work alone as they did in training, and which of them are trained.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

void use(const OneSlot& slot, int64_t ranks) {
  slot.adapter().named_buffers()["ranks"].fill_(ranks);
}

void expect_prefix(const std::string& scale_by, const std::function<double(double)>& scale) {
  const std::string options = "{r: 6, block_size: 2, lora_alpha: 3, scale_by: " + scale_by;
  const OneSlot slot("dylora", options + "}");
  const Tensor x = fill("x", {2, 3, 48}, 1), w = slot.weight();
  const Tensor a = slot.value("lora_a"), b = slot.value("lora_b");
  models::Pass training;
  training.training = true;
  for (const int64_t ranks : {2, 4, 6}) {
    use(slot, ranks);
    const Tensor expected =
        w + scale(static_cast<double>(ranks)) * b.slice(1, 0, ranks).mm(a.slice(0, 0, ranks));
    const Tensor y = slot.adapter().forward(x, Dense(w, slot.bias()), training).detach();
    EXPECT_TRUE(at::allclose(y, at::linear(x, expected), 1e-4, 1e-5)) << scale_by << ranks;
    const OneSlot cut("dylora", options + ", inference_r: " + std::to_string(ranks) + "}");
    EXPECT_TRUE(at::allclose(cut.forward(x), y, 1e-4, 1e-5)) << "cut to " << ranks;
    EXPECT_TRUE(at::allclose(cut.adapter().merged(w), expected, 1e-4, 1e-5)) << scale_by << ranks;
  }
}

TEST(Dylora, CutToItsFirstRanksItComputesWhatItDidInTraining) {
  expect_prefix("sqrt_rank", [](double b) { return 3 / std::sqrt(6 * b); });
  expect_prefix("rank", [](double b) { return 3 / b; });
  expect_prefix("pieces", [](double b) { return 3 / (b / 2); });
}

int64_t ranks_of(const Tiny& tiny, size_t slot) {
  return tiny.adapters.params().constants().at(slot).value.item<int64_t>();
}

TEST(Dylora, EveryPrefixComesUpAtRandomAndTheSameForAllSlots) {
  OneSlot one("dylora", "{r: 6, block_size: 2}"), again("dylora", "{r: 6, block_size: 2}"),
      apart("dylora", "{r: 6, block_size: 2, per_slot: true}");
  std::map<int64_t, int> counts;
  int differ = 0;
  for (int step = 0; step < 60; ++step) {
    ++counts[ranks_of(one.tiny, 0)];
    EXPECT_EQ(ranks_of(one.tiny, 0), ranks_of(again.tiny, 0));
    EXPECT_EQ(ranks_of(one.tiny, 0), ranks_of(one.tiny, 1));
    differ += ranks_of(apart.tiny, 0) != ranks_of(apart.tiny, 1);
    for (OneSlot* slot : {&one, &again, &apart}) slot->tiny.step({make_lane(0)}, 1);
  }
  EXPECT_EQ(counts.size(), 3U);
  for (const auto& [ranks, count] : counts) EXPECT_GT(count, 9) << ranks;
  EXPECT_GT(differ, 20);
}

TEST(Dylora, TrainsTheNewestBlockOrThePrefix) {
  const auto moved = [](const std::string& update) {
    OneSlot slot("dylora", "{r: 6, block_size: 2, update: " + update + "}");
    for (const auto& c : slot.tiny.adapters.params().constants()) Tensor(c.value).fill_(4);
    const Tensor before = slot.value("lora_a").clone();
    slot.tiny.step({make_lane(0)}, 1);
    std::set<int64_t> rows;
    for (int64_t row = 0; row < 6; ++row) {
      if (!at::equal(before[row], slot.value("lora_a")[row])) rows.insert(row);
    }
    return rows;
  };
  EXPECT_EQ(moved("piece"), (std::set<int64_t>{2, 3}));
  EXPECT_EQ(moved("prefix"), (std::set<int64_t>{0, 1, 2, 3}));
}

TEST(Dylora, BlocksThatDoNotFillTheRankAreRefused) {
  models::io::expect_refused([] { OneSlot("dylora", "{r: 6, block_size: 4}"); }, "a divisor of r",
                             ExitCode::kUsage);
}

}  // namespace
}  // namespace graft::peft
