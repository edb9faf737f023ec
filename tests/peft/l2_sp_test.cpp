// L2-SP and with it the penalty of the slot `loss`: added once to a step's gradients, whatever the
// lanes and ranks.
#include <gtest/gtest.h>

#include <mutex>

#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

constexpr double kAlpha = 0.5;

std::unique_ptr<Tiny> make(bool with_penalty, dist::Comm* comm = nullptr) {
  auto tiny = std::make_unique<Tiny>("llama");
  tiny->attach("lora", methods().make("lora"));
  if (with_penalty) {
    std::shared_ptr<Method> method = methods().make("l2_sp");
    read_fields(*method, "{alpha: " + std::to_string(kAlpha) + "}");
    tiny->attach("l2_sp", method);
  }
  tiny->load({}, comm);
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

TEST(L2Sp, AddsAlphaTimesTheDistanceFromTheStartOnceAStep) {
  for (const int64_t lanes : {1, 3}) {
    std::vector<models::Lane> all;
    for (int64_t i = 0; i < lanes; ++i) all.push_back(make_lane(i));
    const auto plain = make(false), held = make(true);
    const auto expected = gradients_of(*plain, all, lanes), found = gradients_of(*held, all, lanes);
    for (size_t i = 0; i < expected.size(); ++i) {
      const Param& param = held->params()[i];
      const Tensor moved = fill(param.name, param.value.sizes(), 0.1);  // what jitter() added
      EXPECT_TRUE(at::allclose(found[i], expected[i] + kAlpha * moved, 1e-4, 1e-6)) << param.name;
    }
  }
}

TEST(L2Sp, IsTheSameOnEveryRank) {
  const auto alone = make(true);
  const auto expected = gradients_of(*alone, {make_lane(0), make_lane(1)}, 2);
  std::mutex mutex;
  dist::run_virtual_ranks(2, [&](dist::Comm& comm) {
    const auto tiny = make(true, &comm);
    const auto found = gradients_of(*tiny, {make_lane(comm.rank())}, 2);
    const std::lock_guard lock(mutex);
    for (size_t i = 0; i < expected.size(); ++i)
      EXPECT_TRUE(at::equal(found[i], expected[i])) << tiny->params()[i].name;
  });
}

TEST(L2Sp, HoldsWhatInitFromBegins) {
  const TestFolder folder;
  make(false)->save(folder.path());
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
