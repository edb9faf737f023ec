// L2-SP: what it adds to a step's gradients, once, whatever the lanes and ranks, and to what.
#include <gtest/gtest.h>

#include <mutex>

#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

constexpr double kAlpha = 0.5, kBeta = 0.25;

struct Run {
  std::string model = "llama", below = "lora";
  bool with_penalty = true;
};

std::unique_ptr<Tiny> make(const Run& run, dist::Comm* comm = nullptr) {
  auto tiny = std::make_unique<Tiny>(run.model.c_str());
  tiny->attach(run.below, methods().make(run.below));
  if (run.with_penalty) {
    std::shared_ptr<Method> method = methods().make("l2_sp");
    read_fields(*method,
                "{alpha: " + std::to_string(kAlpha) + ", beta: " + std::to_string(kBeta) + "}");
    tiny->attach("l2_sp", method);
  }
  models::LoadOptions unquantised;
  unquantised.quantization = models::Quantization::kNone;
  tiny->load(unquantised, comm);
  tiny->jitter();
  return tiny;
}

/// The step's gradients as the optimiser gets them.
std::vector<Tensor> gradients_of(Tiny& tiny, const std::vector<models::Lane>& lanes,
                                 int64_t count) {
  std::vector<Tensor> gradients = tiny.sweep(lanes, count).gradients;
  tiny.adapters.after_reduce({0, 100});
  return gradients;
}

/// What the penalty adds must be alpha times what jitter() moved.
void expect_alpha_times_the_distance(Run run, int64_t lanes) {
  std::vector<models::Lane> all;
  for (int64_t i = 0; i < lanes; ++i) all.push_back(make_lane(i));
  const auto held = make(run);
  run.with_penalty = false;
  const auto plain = make(run);
  const auto expected = gradients_of(*plain, all, lanes), found = gradients_of(*held, all, lanes);
  for (size_t i = 0; i < expected.size(); ++i) {
    const Param& param = held->params()[i];
    const bool is_new =
        run.model == "llama_tokens" && param.name.find(".head.") != std::string::npos;
    const Tensor moved = fill(param.name, param.value.sizes(), 0.1);
    const Tensor added = is_new ? kBeta * param.value.detach() : kAlpha * moved;
    EXPECT_TRUE(at::allclose(found[i], expected[i] + added, 1e-4, 1e-6)) << param.name;
  }
}

TEST(L2Sp, AddsAlphaTimesTheDistanceFromTheStartOnceAStep) {
  for (const int64_t lanes : {1, 3}) expect_alpha_times_the_distance({}, lanes);
}

TEST(L2Sp, HoldsTensorsOfTheBaseItself) {
  for (const int64_t lanes : {1, 3}) expect_alpha_times_the_distance({"llama", "full"}, lanes);
}

TEST(L2Sp, DecaysAClassifiersHeadToZero) {
  for (const char* below : {"lora", "full", "linear_probe"})
    expect_alpha_times_the_distance({"llama_tokens", below}, 1);
}

TEST(L2Sp, GivesTheStartToCheckpointsAndNotToTheAdapter) {
  const auto tiny = make({});
  const auto& kept = tiny->adapters.params().kept();
  ASSERT_EQ(kept.size(), tiny->params().size());
  for (size_t i = 0; i < kept.size(); ++i) {
    const Param& param = tiny->params()[kept[i].param];
    EXPECT_TRUE(at::allclose(kept[i].value + fill(param.name, param.value.sizes(), 0.1),
                             param.value.detach()));
  }
  EXPECT_EQ(tiny->adapters.num_saved(), 1U);
  EXPECT_EQ(tiny->saved_tensors().size(), tiny->params().size());
}

TEST(L2Sp, IsTheSameOnEveryRank) {
  const auto alone = make({});
  const auto expected = gradients_of(*alone, {make_lane(0), make_lane(1)}, 2);
  std::mutex mutex;
  dist::run_virtual_ranks(2, [&](dist::Comm& comm) {
    const auto tiny = make({}, &comm);
    const auto found = gradients_of(*tiny, {make_lane(comm.rank())}, 2);
    const std::lock_guard lock(mutex);
    for (size_t i = 0; i < expected.size(); ++i)
      EXPECT_TRUE(at::equal(found[i], expected[i])) << tiny->params()[i].name;
  });
}

TEST(L2Sp, HoldsWhatInitFromBegins) {
  const TestFolder folder;
  make({"llama", "lora", false})->save(folder.path());
  Tiny tiny("llama");
  tiny.attach("", nullptr, folder.path());
  tiny.attach("l2_sp", methods().make("l2_sp"));
  tiny.load();
  const auto before = tiny.sweep({make_lane(0)}, 1).gradients;
  std::vector<Tensor> copies;
  for (const Tensor& g : before) copies.push_back(g.clone());
  tiny.adapters.after_reduce({0, 100});
  for (size_t i = 0; i < copies.size(); ++i) EXPECT_TRUE(at::equal(before[i], copies[i]));
}

}  // namespace
}  // namespace graft::peft
