// Where paper, release and library disagree, each side is a value of a field: what the values that
// are not HF PEFT's compute. (What they share with PEFT: peft_oracle_test.cpp; LyCORIS's side:
// tests/cli/test_lycoris.py.)
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

double largest_difference(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

TEST(Disagreement, DeloraScalesByEachColumnOrByTheWholeMatrix) {
  const OneSlot columns("delora", "{}"), matrix("delora", "{norms: matrix}");
  const Tensor w = columns.weight();
  EXPECT_LT(largest_difference(columns.value("delora_w_norm"), w.square().sum(0).sqrt()), 1e-5);
  EXPECT_LT(largest_difference(matrix.value("delora_w_norm"), w.square().sum().sqrt()), 1e-4);
}

TEST(Disagreement, C3aDividesByTheInputsOrNot) {
  const OneSlot divided("c3a", "{}"), whole("c3a", "{divide_by_in: false}");
  const Tensor zero = at::zeros_like(divided.weight()), x = fill("x", {3, zero.size(1)}, 1);
  const Tensor update = divided.adapter().merged(zero).detach() * zero.size(1);
  EXPECT_LT(largest_difference(whole.adapter().merged(zero).detach(), update), 1e-5);
  EXPECT_LT(largest_difference(whole.forward(x), at::linear(x, whole.weight() + update)), 1e-4);
}

TEST(Disagreement, HraAddsThePapersPenaltyToTheGradient) {
  OneSlot slot("hra", "{orth_penalty: 0.5, r: 4}");
  slot.tiny.sweep({make_lane(0)}, 1);
  const Param& param = slot.tiny.params().front();
  const Tensor before = param.value.grad().clone(), u = param.value.detach().clone();
  slot.tiny.adapters.after_reduce({0, 10});
  const Tensor leaf = u.requires_grad_();
  (0.5 * (leaf.t().mm(leaf) - at::eye(4)).square().sum()).backward();
  EXPECT_LT(largest_difference(param.value.grad() - before, leaf.grad()), 1e-4);
}

TEST(Disagreement, HraWithGramSchmidtHasColumnsOfItsOwnWherePeftHasPairs) {
  Tiny tiny("llama");
  const std::shared_ptr<Method> method = methods().make("hra");
  read_fields(*method, "{apply_GS: true, r: 4}");
  tiny.attach("hra", method);
  tiny.load();
  for (const Param& param : tiny.params()) {
    const Tensor s = at::linalg_svdvals(param.value.detach());
    EXPECT_GT((s[3] / s[0]).item<double>(), 0.1) << param.name << ": of pairs it is 0";
  }
}

TEST(Disagreement, RandloraPairsRandomColumnsAsPeftOrAsThePapersSum) {
  constexpr int64_t kRank = 5, kProducts = 10, kNarrow = 48, kWide = 96;  // of 48 inputs
  for (const bool paper : {false, true}) {
    const OneSlot slot("randlora", std::string("{r: 5, randlora_alpha: 10, pairing: ") +
                                       (paper ? "paper}" : "peft}"));
    Tensor a, b;
    for (const Constant& c : slot.tiny.adapters.params().constants()) {
      if (c.name.ends_with("randlora_A")) a = c.value.select(1, 0).slice(1, 0, kNarrow);
      if (c.name.ends_with("randlora_B")) b = c.value.slice(0, 0, kWide).slice(1, 0, kProducts);
    }
    const Tensor lambda = slot.value("lambda"), gamma = slot.value("gamma");
    Tensor sum = at::zeros({kWide, kNarrow});
    for (int64_t j = 0; j < kProducts; ++j) {
      for (int64_t k = 0; k < kRank; ++k) {
        const int64_t p = k * kProducts + j;  // PEFT reads B's columns in their order
        const Tensor column =
            paper ? b.select(1, j).select(1, k) : b.select(1, p / kRank).select(1, p % kRank);
        sum += at::outer(column, lambda[k][j] * gamma[j] * a[k]);
      }
    }
    const Tensor update = slot.adapter().merged(at::zeros({kWide, kNarrow})).detach();
    EXPECT_LT(largest_difference(update, 2 * sum), 1e-4 * sum.abs().max().item<double>()) << paper;
    EXPECT_EQ(slot.tiny.save_part(0).config["peft_type"].is_null(), paper);
  }
}

/// Logits of a tiny model whose gates are set.
Tensor gated(const char* options, const Tensor& gate) {
  Tiny tiny("llama");
  std::shared_ptr<Method> method = methods().make("llama_adapter");
  read_fields(*method, options);
  tiny.attach("llama_adapter", method);
  tiny.load();
  const at::NoGradGuard no_grad;
  for (const Param& p : tiny.params()) {
    if (p.name.ends_with("gate")) Tensor(p.value).copy_(gate.expand_as(p.value));
  }
  return tiny.logits(make_lane(0).batch);
}

TEST(Disagreement, LlamaAdapterHasAGateALayerOrTanhOfOneAHead) {
  const Tensor gate = at::full({1}, 0.7), one_head = at::zeros({1, 6, 1, 1});
  const Tensor by_layer = gated("{}", gate.tanh());
  EXPECT_LT(largest_difference(gated("{gate: heads}", gate.view({1, 1, 1, 1})), by_layer), 1e-5);
  one_head[0][2] = 0.7;
  EXPECT_GT(largest_difference(gated("{gate: heads}", one_head), by_layer), 1e-3);
}

TEST(Disagreement, PromptTuningStartsAsPeftOrAsThePaper) {
  const auto start = [](const char* options) {
    Tiny tiny("llama");
    std::shared_ptr<Method> method = methods().make("prompt_tuning");
    read_fields(*method, options);
    tiny.attach("prompt_tuning", method);
    tiny.load();
    return tiny.params().front().value.detach().clone();
  };
  EXPECT_GT(start("{}").abs().max().item<double>(), 1.5);
  const Tensor uniform = start("{init_range: 0.5}");
  EXPECT_LE(uniform.abs().max().item<double>(), 0.5);
  EXPECT_NEAR(uniform.std().item<double>(), 0.5 / std::sqrt(3.0), 0.02);
  const Tensor rows = start("{prompt_tuning_init: SAMPLE_VOCAB, sample_tokens: 3}");
  std::set<double> kinds;
  for (int64_t i = 0; i < rows.size(0); ++i) kinds.insert(rows[i][0].item<double>());
  EXPECT_EQ(kinds.size(), 3);
}

/// The update of a matrix of zeros in training, under one lane's randomness.
Tensor update_in_training(const OneSlot& slot, uint64_t lane) {
  models::Pass pass;
  pass.training = true;
  pass.random = {7, lane};
  const int64_t in = slot.site().info.in, out = slot.site().info.out;
  return slot.adapter().forward(at::eye(in), Dense(at::zeros({out, in}), {}), pass).t().detach();
}

TEST(Disagreement, RowsOfLokrAndLohaRestAndOthersMakeUpForThemIfAsked) {
  for (const auto& [method, options, is_scaled] :
       {std::tuple{"loha", "{rank_dropout: 0.25}", true},
        std::tuple{"loha", "{rank_dropout: 0.25, rank_dropout_scale: false}", false},
        std::tuple{"lokr", "{rank_dropout: 0.25}", false},
        std::tuple{"lokr", "{rank_dropout: 0.25, rank_dropout_scale: true}", true}}) {
    const OneSlot slot(method, options);
    const Tensor whole = slot.adapter().merged(at::zeros_like(slot.weight())).detach();
    const Tensor update = update_in_training(slot, 1), rests = update.abs().sum(1).eq(0);
    const double kept = 1 - rests.to(at::kDouble).mean().item<double>();
    EXPECT_NEAR(kept, 0.75, 0.15) << method;
    const Tensor expected = whole.masked_fill(rests.unsqueeze(1), 0) / (is_scaled ? kept : 1);
    EXPECT_LT(largest_difference(update, expected), 1e-4) << method << " " << options;
    EXPECT_GT(largest_difference(update_in_training(slot, 2), update), 1e-3) << "another lane";
    EXPECT_TRUE(at::equal(update_in_training(slot, 1), update)) << "recomputed";
  }
}

TEST(Disagreement, TheWholeUpdateRestsInAShareOfLanes) {
  const OneSlot slot("lokr", "{module_dropout: 0.25}");
  int resting = 0;
  for (uint64_t lane = 0; lane < 400; ++lane)
    resting += update_in_training(slot, lane).abs().sum().item<double>() == 0;
  EXPECT_NEAR(resting, 100, 30);
}

}  // namespace
}  // namespace graft::peft
