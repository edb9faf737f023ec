// AdaLoRA: how many ranks are left, and a directory of PEFT's with rows cut
// off.
#include <gtest/gtest.h>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

/// Values E that are not zero, over all slots.
int64_t num_ranks(const Tiny& tiny) {
  int64_t count = 0;
  for (const Param& p : tiny.params()) {
    if (p.name.ends_with("lora_e")) count += p.value.ne(0).sum().item<int64_t>();
  }
  return count;
}

TEST(Adalora, RanksFallWithTheThirdPowerAndStayWhereTheyEnd) {
  OneSlot slot("adalora",
               "{target_modules: all-linear, init_r: 6, target_r: 2, tinit: 2,"
               " tfinal: 90}");  // of 100 steps
  const int64_t slots = static_cast<int64_t>(slot.tiny.params().size()) / 3;
  std::string chosen;
  for (int step = 1; step <= 14; ++step) {
    slot.tiny.step({make_lane(0)}, 1);
    const double left = step <= 2 ? 1 : step >= 10 ? 0 : 1 - (step - 2) / 8.0;
    const auto budget = static_cast<int64_t>(4.0 * slots * left * left * left + 2.0 * slots);
    EXPECT_EQ(num_ranks(slot.tiny), budget) << "step " << step;
  }
}

TEST(Adalora, ARunTooShortForItsPhasesIsRefused) {
  OneSlot slot("adalora", "{tinit: 60, tfinal: 40}");
  models::io::expect_refused([&] { slot.tiny.step({make_lane(0)}, 1); }, "tinit + tfinal = 100",
                             ExitCode::kUsage);
}

TEST(Adalora, RowsThatPeftCutOffAreNotMissed) {
  const auto write = [](const std::string& directory, int64_t rows, const nlohmann::json& pattern) {
    const std::string module = "base_model.model.model.layers.0.self_attn.q_proj.";
    const Tensor a = fill("a", {6, 48}, 0.2), b = fill("b", {96, 6}, 0.2), e = fill("e", {6, 1}, 1);
    const Tensor kept = at::tensor({0, 2, 3, 5}).to(at::kLong);
    const Tensor mask = at::zeros({6, 1}).index_fill_(0, kept, 1);
    const bool cut = rows == 4;
    Tiny::write_adapter(directory,
                        {{"peft_type", "ADALORA"},
                         {"init_r", 6},
                         {"target_r", 4},
                         {"rank_pattern", pattern},
                         {"total_step", 10}},
                        {{module + "lora_A", cut ? a.index_select(0, kept) : a},
                         {module + "lora_B", cut ? b.index_select(1, kept) : b},
                         {module + "lora_E", cut ? e.index_select(0, kept) : e * mask}});
  };
  const auto logits = [](const std::string& directory) {
    Tiny tiny("llama");
    tiny.attach("", nullptr, directory);
    tiny.load();
    return tiny.logits(make_lane(0).batch);
  };
  const TestFolder whole, cut;
  write(whole.path(), 6, nullptr);
  write(cut.path(), 4,
        {{"model.layers.0.self_attn.q_proj.lora_E", {true, false, true, true, false, true}}});
  EXPECT_LT((logits(cut.path()) - logits(whole.path())).abs().max().item<double>(), 1e-4);
}

}  // namespace
}  // namespace graft::peft
