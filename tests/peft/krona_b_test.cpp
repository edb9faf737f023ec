// KronA^B against its definition: the whole Kronecker product beside the MLP, and the learned share
// of the input.
#include <gtest/gtest.h>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

void expect_definition(const std::string& options, double scale) {
  Tiny tiny("llama");
  const std::shared_ptr<Method> method = methods().make("krona_b");
  read_fields(*method, options);
  tiny.attach("krona_b", method);
  tiny.load();
  tiny.jitter();
  models::SublayerAdapter* adapter = nullptr;
  for (const auto& site : tiny.adapters.slots().sublayers) {
    if (site.name == "block.1.mlp") adapter = site.slot->adapters().front().get();
    EXPECT_EQ(site.slot->empty(), site.role != "mlp") << site.name;
  }
  ASSERT_NE(adapter, nullptr);
  const auto parameters = adapter->named_parameters();
  const Tensor x = fill("x", {2, 3, 48}, 1), o = fill("o", {2, 3, 48}, 1);
  Tensor expected =
      o + scale * x.matmul(at::kron(parameters["krona_a"], parameters["krona_b"]).t());
  if (parameters.contains("residual")) expected = expected + x * parameters["residual"];
  const auto mlp = [&](const Tensor& h) {
    EXPECT_TRUE(at::equal(h, x));
    return o;
  };
  const Tensor y = adapter->forward(x, mlp, models::Pass());
  EXPECT_TRUE(at::allclose(y, expected, 1e-4, 1e-5)) << options;
  EXPECT_GT((y - o).abs().max().item<double>(), 1e-2) << options;
}

TEST(KronaB, IsItsDefinition) {
  expect_definition("{scale: 3}", 3);
  expect_definition("{residual: true, a_out: 4, a_in: 12}", 1);
}

TEST(KronaB, SizesThatDoNotDivideAreRefusedWithSomeThatDo) {
  Tiny tiny("llama");
  const std::shared_ptr<Method> method = methods().make("krona_b");
  read_fields(*method, "{a_in: 5}");
  tiny.attach("krona_b", method);
  models::io::expect_refused([&] { tiny.load(); }, "block.0.mlp: a_in = 5 does not divide 48",
                             ExitCode::kUsage);
}

}  // namespace
}  // namespace graft::peft
