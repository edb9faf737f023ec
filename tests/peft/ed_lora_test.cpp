// ED-LoRA: its scale, and what the rows of placeholder tokens do.
#include <gtest/gtest.h>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

TEST(EdLora, AlphaIsTheScaleWhateverTheRank) {
  const OneSlot slot("ed_lora", "{r: 6, lora_alpha: 3}");
  const Tensor x = fill("x", {2, 3, 48}, 1);
  const Tensor w = slot.weight() + 3 * slot.value("lora_b").mm(slot.value("lora_a"));
  EXPECT_TRUE(at::allclose(slot.forward(x), at::linear(x, w), 1e-4, 1e-5));
  EXPECT_TRUE(at::allclose(slot.adapter().merged(slot.weight()), w, 1e-5, 1e-6));
}

std::unique_ptr<Tiny> tiny_with(const std::string& options) {
  auto tiny = std::make_unique<Tiny>("llama");
  std::shared_ptr<Method> method = methods().make("ed_lora");
  read_fields(*method, options);
  tiny->attach("ed_lora", method);
  models::LoadOptions unquantised;
  unquantised.quantization = models::Quantization::kNone;
  tiny->load(unquantised);
  return tiny;
}

Tensor rows_of(const Tiny& tiny, int block) {
  for (const Param& p : tiny.params()) {
    if (p.name == "0.block." + std::to_string(block) + ".input.token_rows") return p.value.detach();
  }
  throw std::logic_error("no rows");
}

data::Batch tokens(std::vector<int64_t> ids) {
  const Tensor t = at::tensor(ids, at::kLong).unsqueeze(0);
  return make_batch(t, t);
}

TEST(EdLora, APlaceholderStartsAsItsClassWord) {
  const auto tiny = tiny_with("{token_ids: [90, 91], token_start: [5, 7]}");
  const Tensor placeholders = tiny->logits(tokens({3, 90, 20, 91, 90, 4}));
  const Tensor words = tiny->logits(tokens({3, 5, 20, 7, 5, 4}), false);
  EXPECT_LT((placeholders - words).abs().max().item<double>(), 1e-4);
}

TEST(EdLora, ARandomPlaceholderHasTheDeviationOfThePaper) {
  const auto tiny = tiny_with("{token_ids: [90], token_start: [-1]}");
  const Tensor table = fill("model.embed_tokens.weight", {128, 48}, 1);
  const double deviation = (rows_of(*tiny, 0)[0] + table[90]).std().item<double>();
  EXPECT_NEAR(deviation, 0.013, 0.004);
  EXPECT_EQ(rows_of(*tiny, 1).abs().max().item<double>(), 0);
}

TEST(EdLora, RowsOfABlockMoveItsPlaceholdersAlone) {
  const auto tiny = tiny_with("{token_ids: [90]}");
  const data::Batch with = tokens({3, 8, 20, 90, 6, 4}), without = tokens({3, 8, 20, 9, 6, 4});
  const at::NoGradGuard no_grad;
  rows_of(*tiny, 1).add_(fill("rows", {1, 48}, 1));
  const Tensor change = (tiny->logits(with) - tiny->logits(with, false)).abs().amax({0, 2});
  for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(change[i].item<double>() > 1e-3, i >= 3) << i;
  EXPECT_TRUE(at::equal(tiny->logits(without), tiny->logits(without, false)));
}

TEST(EdLora, TokensOutsideOfTheVocabularyAreRefused) {
  models::io::expect_refused([] { tiny_with("{token_ids: [5000]}"); }, "token 5000, the vocabulary",
                             ExitCode::kUsage);
  models::io::expect_refused([] { tiny_with("{token_ids: [1, 2], token_start: [3]}"); },
                             "one for each of token_ids", ExitCode::kUsage);
}

}  // namespace
}  // namespace graft::peft
