// LoRand against an adapter of dense matrices, W = sum P K Q built by loops.
#include <gtest/gtest.h>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

models::SublayerAdapter& adapter_at(const OneSlot& slot, const std::string& name) {
  for (const auto& site : slot.tiny.adapters.slots().sublayers) {
    if (site.name == name) return *site.slot->adapters().at(0);
  }
  throw std::logic_error(name);
}

Tensor dense_projection(const std::map<std::string, Tensor>& p, const std::string& name,
                        const Tensor& k, const Tensor& x) {
  Tensor w = at::zeros({p.at(name + "p").size(1), p.at(name + "q").size(2)});
  for (int64_t i = 0; i < k.size(0); ++i)
    w = w + p.at(name + "p")[i].mm(k[i]).mm(p.at(name + "q")[i]);
  return x.matmul(w) + p.at(name + "bias");
}

void expect_dense_adapter(const std::string& options, bool shared) {
  const OneSlot slot("lorand", options);
  auto& adapter = adapter_at(slot, "block.1.mlp");
  std::map<std::string, Tensor> p;
  for (const auto& item : adapter.named_parameters()) p[item.key()] = item.value().detach();
  EXPECT_EQ(p.size(), shared ? 7 : 8);
  const Tensor x = fill("x", {2, 3, 48}, 1), o = 2 * x + 1;
  const Tensor inner = at::gelu(dense_projection(p, "down_", p.at("down_k"), o));
  const Tensor expected = o + dense_projection(p, "up_", p.at(shared ? "down_k" : "up_k"), inner);
  const auto sublayer = [](const Tensor& h) { return 2 * h + 1; };
  EXPECT_TRUE(at::allclose(adapter.forward(x, sublayer, {}), expected, 1e-4, 1e-5));
}

TEST(Lorand, IsAnAdapterOfDenseMatrices) {
  expect_dense_adapter("{factor: 3, branches: 2, kernel_dim: 5}", false);
  expect_dense_adapter("{sites: [mlp], share_kernel: true}", true);
}

TEST(Lorand, TrainsWhatThePaperCounts) {
  const OneSlot slot("lorand", "{}");
  int64_t count = 0;
  for (const Tensor& p : adapter_at(slot, "block.0.attn").parameters()) count += p.numel();
  const int64_t d = 48, inner = 24, branches = 4, k = 8;
  const auto projection = [&](int64_t in, int64_t out) {
    return branches * (k * in + k * k + k * out) + out;
  };
  EXPECT_EQ(count, projection(d, inner) + projection(inner, d));
}

TEST(Lorand, AFactorBeyondTheWidthIsRefused) {
  models::io::expect_refused([] { OneSlot("lorand", "{factor: 64}"); },
                             "factor = 64, at most the model's width 48", ExitCode::kUsage);
}

}  // namespace
}  // namespace graft::peft
