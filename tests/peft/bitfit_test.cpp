// BitFit: how much it trains, and what the gradient of a bias is.
#include <gtest/gtest.h>

#include "peft/observer.h"
#include "tests/peft/tiny.h"
#include "tests/testing.h"

namespace graft::peft {
namespace {

std::unique_ptr<Tiny> make(const std::string& fields) {
  auto tiny = std::make_unique<Tiny>("qwen2");  // with biases on q, k, v
  std::shared_ptr<Method> method = methods().make("bitfit");
  read_fields(*method, fields);
  tiny->attach("bitfit", method);
  tiny->load(testing::unquantised());
  return tiny;
}

TEST(Bitfit, TrainsOneValueAnOutput) {
  const auto all = make("{}"), existing = make("{only_existing: true}");
  int64_t outputs = 0, with_bias = 0;
  for (const LinearSite& site : all->adapters.slots().linears) {
    outputs += site.layer >= 0 ? site.info.out : 0;
    with_bias += site.info.has_bias ? site.info.out : 0;
  }
  EXPECT_EQ(all->adapters.params().numel(), outputs);
  EXPECT_EQ(existing->adapters.params().numel(), with_bias);
  EXPECT_LT(with_bias, outputs);
}

TEST(Bitfit, GradientOfABiasIsTheSumOverTokensOfThatOfTheOutput) {
  const auto tiny = make("{}");
  tiny->jitter();
  std::vector<models::Lane> lanes = {make_lane(0)};
  const auto gradients = tiny->sweep(lanes, 1).gradients;
  std::map<std::string, Tensor> sums;
  std::vector<Observer::Seen> seen;
  for (const LinearSite& site : tiny->adapters.slots().linears) {
    if (!site.slot->empty())
      seen.push_back({&site, [&](const Observation& o) { sums[site.name] = o.dy.sum(0); }});
  }
  Observer observer(seen, tiny->model->num_stages(), Observer::Gradients::kYes);
  tiny->trunk->sweep(lanes, observer, {});
  for (size_t i = 0; i < gradients.size(); ++i) {
    const std::string slot = tiny->params()[i].name.substr(2);  // "0.block.0.attn.q.bias"
    const Tensor sum = sums.at(slot.substr(0, slot.rfind('.')));
    const double targets = static_cast<double>(lanes[0].batch.num_targets);
    EXPECT_LT((gradients[i] - sum / targets).abs().max().item<double>(), 1e-6) << slot;
  }
}

// softmax does not see a vector that is the same for all keys; rotated by their positions it is
// not.
TEST(Bitfit, ABiasOfKeysHasAGradientWithRotaryPositionsOnly) {
  const auto tiny = make("{target_modules: attn.k}");
  tiny->jitter();
  models::Lane lane = make_lane(0);
  const auto largest = [&] {
    double most = 0;
    for (const Tensor& g : tiny->sweep({lane}, 1).gradients)
      most = std::max(most, g.abs().max().item<double>());
    return most;
  };
  EXPECT_GT(largest(), 1e-4);
  lane.batch.positions_BL.zero_();  // no rotation
  EXPECT_LT(largest(), 1e-6);
}

}  // namespace
}  // namespace graft::peft
