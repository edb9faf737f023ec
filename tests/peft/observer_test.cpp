// The observer of slots: what it sees is what a LoRA beside it computes its gradients from.
#include "peft/observer.h"

#include <gtest/gtest.h>

#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

/// A LoRA on every linear, its parameters moved.
std::unique_ptr<Tiny> adapted() {
  auto tiny = std::make_unique<Tiny>("llama");
  std::shared_ptr<Method> method = methods().make("lora");
  read_fields(*method, "{target_modules: [all-linear, head]}");
  tiny->attach("lora", method);
  models::LoadOptions options;
  options.quantization = models::Quantization::kNone;
  tiny->load(options);
  tiny->jitter();
  return tiny;
}

/// Two rows of 12 tokens, the second with 5 of padding.
models::Lane padded_lane() {
  models::Lane lane = make_lane(0);
  lane.batch.documents_BL[1].slice(0, 7).fill_(-1);
  lane.batch.labels_BL[1].slice(0, 6).fill_(-100);
  lane.batch.num_tokens = 19, lane.batch.num_targets = 17;
  return lane;
}

TEST(Observer, SeesTheGradientOfTheMatrixAndLeavesTheModelAsItWas) {
  const auto tiny = adapted();
  std::vector<models::Lane> lanes = {padded_lane(), make_lane(1)};
  const double loss = tiny->sweep(lanes, 2).loss;
  const auto gradients = tiny->sweep(lanes, 2).gradients;
  const double targets = 17 + 22;
  std::map<std::string, Tensor> dw;
  std::vector<Observer::Seen> seen;
  for (const LinearSite& site : tiny->adapters.slots().linears) {
    if (site.slot->empty()) continue;
    seen.push_back({&site, [&dw, &site](const Observation& o) {
                      const Tensor one = o.dy.t().mm(o.x);
                      Tensor& sum = dw[site.name];
                      sum = sum.defined() ? sum + one : one;
                    }});
  }
  {
    Observer observer(seen, tiny->model->num_stages(), Observer::Gradients::kYes);
    models::TrunkOptions options;
    options.recompute = models::Recompute::kOn;
    tiny->trunk->sweep(lanes, observer, options);
  }
  int compared = 0;
  for (size_t i = 0; i < gradients.size(); i += 2) {  // A, then B
    const std::string name = tiny->params()[i].name;
    const std::string slot = name.substr(2, name.rfind('.') - 2);
    const Tensor a = tiny->params()[i].value.detach(), b = tiny->params()[i + 1].value.detach();
    const Tensor g = dw.at(slot) / targets;  // s = 1
    EXPECT_TRUE(at::allclose(g.mm(a.t()), gradients[i + 1], 1e-4, 1e-6)) << name;
    EXPECT_TRUE(at::allclose(b.t().mm(g), gradients[i], 1e-4, 1e-6)) << name;
    ++compared;
  }
  EXPECT_EQ(compared, 15);
  EXPECT_EQ(tiny->sweep(lanes, 2).loss, loss);
}

TEST(Observer, SeesEachTokenOnceOnTheWayUp) {
  const auto tiny = adapted();
  const LinearSite& site = tiny->adapters.slots().linears.at(2);
  const std::vector<models::Lane> lanes = {padded_lane(), make_lane(1)};
  std::vector<Tensor> x, predicts;
  {
    const Observer observer({{&site,
                              [&](const Observation& o) {
                                EXPECT_FALSE(o.dy.defined());
                                x.push_back(o.x), predicts.push_back(o.predicts);
                              }}},
                            tiny->model->num_stages(), Observer::Gradients::kNo);
    tiny->trunk->forward(lanes, {});
  }
  tiny->trunk->forward(lanes, {});  // no longer
  ASSERT_EQ(x.size(), 2u);
  EXPECT_EQ(x[0].size(0), 19);
  EXPECT_EQ(predicts[0].sum().item<int64_t>(), 17);
  EXPECT_EQ(x[1].size(0), 24);
}

}  // namespace
}  // namespace graft::peft
