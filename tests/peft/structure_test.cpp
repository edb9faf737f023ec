// What the papers say of an update's structure: its rank, its support, the angles that it keeps,
// how many numbers are trained.
#include <gtest/gtest.h>

#include <cmath>

#include "peft/draws.h"
#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

double largest_difference(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

Tensor update_of(const OneSlot& slot) {
  return slot.adapter().merged(at::zeros_like(slot.weight())).detach();
}

/// Singular values above the rounding errors of float32.
int64_t rank_of(const Tensor& m) {
  const Tensor s = at::linalg_svdvals(m.to(at::kDouble));
  return s.gt(s[0] * 1e-6).sum().item<int64_t>();
}

TEST(Structure, LohaHasTheSquareOfItsRank) {
  EXPECT_EQ(rank_of(update_of(OneSlot("loha", "{r: 3}"))), 9);
  EXPECT_EQ(rank_of(update_of(OneSlot("lora", "{r: 3}"))), 3);
}

TEST(Structure, LokrHasTheProductOfItsFactorsRanks) {
  const OneSlot slot("lokr", "{r: 2}"), both("lokr", "{r: 2, decompose_both: true}");
  EXPECT_EQ(rank_of(update_of(slot)), rank_of(slot.value("lokr_w1")) * 2);
  EXPECT_EQ(rank_of(update_of(both)), 2 * 2);
}

/// The columns of LoKr's first and second factor for a matrix with `in` inputs.
std::pair<int64_t, int64_t> lokr_columns(int64_t in, const std::string& factor) {
  nlohmann::json config = tiny_config("llama");
  config["intermediate_size"] = in;
  Tiny tiny(config);
  const std::shared_ptr<Method> method = methods().make("lokr");
  read_fields(*method, "{target_modules: mlp.down, r: 100, decompose_factor: " + factor + "}");
  tiny.attach("lokr", method);
  tiny.load();
  return {tiny.params()[0].value.size(1), tiny.params()[1].value.size(1)};
}

TEST(Structure, LokrSplitsSizesAsItsPaperDoes) {
  EXPECT_EQ(lokr_columns(128, "-1"), (std::pair<int64_t, int64_t>{8, 16}));
  EXPECT_EQ(lokr_columns(127, "-1"), (std::pair<int64_t, int64_t>{1, 127}));
  EXPECT_EQ(lokr_columns(128, "4"), (std::pair<int64_t, int64_t>{4, 32}));
}

TEST(Structure, KronaIsLokrOfWholeFactors) {
  const OneSlot krona("krona", "{scale: 3}"), lokr("lokr", "{r: 64, alpha: 192}");
  const at::NoGradGuard no_grad;
  for (const auto& [from, to] : {std::pair{"krona_a", "lokr_w1"}, {"krona_b", "lokr_w2"}})
    lokr.adapter().named_parameters()[to].copy_(krona.value(from));
  EXPECT_LT(largest_difference(update_of(krona), update_of(lokr)), 1e-6);
  EXPECT_GT(update_of(krona).abs().max().item<double>(), 1e-2);
}

int64_t trained_at(const Tiny& tiny, const std::string& slot) {
  int64_t count = 0;
  for (const Param& p : tiny.params()) count += p.name.starts_with("0." + slot) ? p.numel() : 0;
  return count;
}

TEST(Structure, DiffuseKronaTrainsTheNumbersOfItsTwoFactors) {
  const OneSlot slot("diffusekrona", "{a_out: 4, a_in: 6}");  // of 96 outputs, 48 inputs
  EXPECT_EQ(trained_at(slot.tiny, "block.0.attn.q"), 4 * 6 + (96 / 4) * (48 / 6));
}

TEST(Structure, VeraTrainsAVectorOfEachSide) {
  const OneSlot slot("vera", "{r: 5}");
  int64_t expected = 0;
  for (const LinearSite& site : slot.tiny.adapters.slots().linears) {
    if (!site.slot->empty()) expected += site.info.out + 5;
  }
  EXPECT_EQ(slot.tiny.adapters.params().numel(), expected);
}

TEST(Structure, Ia3TrainsAScaleOfKeysValuesAndTheInnerLayer) {
  const OneSlot slot("ia3", "{}", "qwen2");
  int64_t expected = 0;
  for (const LinearSite& site : slot.tiny.adapters.slots().linears) {
    if (site.name.ends_with("attn.k") || site.name.ends_with("attn.v")) expected += site.info.out;
    if (site.name.ends_with("mlp.down")) expected += site.info.in;
  }
  EXPECT_EQ(slot.tiny.adapters.params().numel(), expected);
}

/// The cosines between the rows of a matrix.
Tensor cosines(const Tensor& w) {
  const Tensor rows = w / w.norm(2, 1, true);
  return rows.mm(rows.t());
}

TEST(Structure, OftKeepsTheAnglesBetweenTheRows) {
  const OneSlot slot("oft", "{use_cayley_neumann: false, oft_block_size: 8}");
  const Tensor w = slot.weight(), turned = slot.adapter().merged(w).detach();
  EXPECT_GT(largest_difference(turned, w), 0.05);
  EXPECT_LT(largest_difference(cosines(turned), cosines(w)), 1e-5);
}

/// Of a BOFT with blocks of 6 over 48 inputs.
Tensor boft_rotation(const std::string& factors) {
  const OneSlot slot("boft", "{boft_block_size: 6, boft_n_butterfly_factor: " + factors + "}");
  const Tensor s = slot.value("boft_s").slice(0, 0, 48);
  return slot.adapter().merged(at::eye(96, 48)).detach().slice(0, 0, 48) / s;
}

TEST(Structure, BoftReachesEveryInputWithLog2OfTheBlocksAndOneFactors) {
  const Tensor blocks = boft_rotation("1"), dense = boft_rotation("4");  // log2(48 / 6) + 1
  EXPECT_GT(dense.abs().min().item<double>(), 0);
  EXPECT_LT(boft_rotation("3").abs().min().item<double>(), 1e-12);
  for (int64_t row = 0; row < 48; ++row) {
    for (int64_t column = 0; column < 48; ++column) {
      const double element = blocks[row][column].item<double>();
      if (row / 6 != column / 6) {
        EXPECT_EQ(element, 0) << row << " " << column;
      }
    }
  }
}

TEST(Structure, BoftsFileOfOneFactorThatSaysTwoIsRefusedByItsShape) {
  const TestFolder folder;
  const OneSlot slot("boft", "{}");
  Peft::Saved saved = slot.tiny.save_part(0);
  saved.config["boft_n_butterfly_factor"] = 2;
  Tiny::write_adapter(folder.path(), saved.config, saved.tensors, saved.metadata);
  Tiny other("llama");
  models::io::expect_refused([&] { other.adapters.attach_frozen(folder.path()); }, "boft_R",
                             ExitCode::kData);
}

TEST(Structure, FourierftsUpdateLivesOnItsFrequenciesAndTheirMirrors) {
  constexpr int64_t kCount = 40;
  const OneSlot slot("fourierft", "{n_frequency: 40, random_loc_seed: 3}");
  const Tensor update = update_of(slot);
  const int64_t out = update.size(0), in = update.size(1);
  const Tensor spectrum = at::fft_fft2(update.to(at::kDouble)).abs();
  const Tensor places = first_of_randperm(out * in, kCount, 3),
               values = slot.value("fourierft_spectrum");
  Tensor allowed = at::zeros({out, in}, at::kBool);
  for (int64_t i = 0; i < kCount; ++i) {
    const int64_t row = places[i].item<int64_t>() / in, column = places[i].item<int64_t>() % in;
    allowed[row][column] = true;
    allowed[(out - row) % out][(in - column) % in] = true;
  }
  const double size = spectrum.max().item<double>();
  EXPECT_LT(spectrum.masked_select(allowed.logical_not()).max().item<double>(), 1e-5 * size);
  // A value and its mirror share it: half each, times the scaling, 150.
  EXPECT_NEAR(size, 75 * values.abs().max().item<double>(), 1e-3 * size);
}

}  // namespace
}  // namespace graft::peft
