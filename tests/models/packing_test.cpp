// Packed documents: each computes what it computes alone, and sees nothing of its neighbours.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <deque>

#include "data/collate.h"
#include "dist/comm_factory.h"
#include "tests/testing.h"

namespace graft::models {
namespace {

using testing::Base;

/// Documents of random tokens at fixed places of two rows of 24: three in the first with padding
/// between and behind, two in the second, which they fill.
struct Packed {
  struct Place {
    int64_t row, column, length;
  };
  static constexpr std::array<Place, 5> kPlaces = {
      {{0, 0, 7}, {0, 7, 1}, {0, 10, 11}, {1, 0, 15}, {1, 15, 9}}};

  std::array<Tensor, 5> tokens;

  Packed() {
    for (size_t d = 0; d < tokens.size(); ++d)
      tokens[d] = testing::random_tokens(1, kPlaces[d].length, 128, d + 1);
  }
  data::Batch batch() const {
    std::deque<std::vector<uint32_t>> words;
    std::deque<std::vector<uint8_t>> masks;
    std::vector<data::Piece> pieces;
    for (size_t d = 0; d < tokens.size(); ++d) {
      const auto* begin = tokens[d].const_data_ptr<int64_t>();
      words.emplace_back(begin, begin + tokens[d].numel());
      masks.emplace_back(words.back().size(), uint8_t{1});
      pieces.push_back({words.back(), masks.back(), kPlaces[d].row, kPlaces[d].column});
    }
    return data::collate(pieces, 2, 24);
  }
  /// The part of [2, 24, ...] that belongs to document d.
  static Tensor of_document(const Tensor& t, size_t d) {
    return t[kPlaces[d].row].narrow(0, kPlaces[d].column, kPlaces[d].length);
  }
};

nlohmann::json windowed() {
  nlohmann::json config = testing::tiny_llama();
  config["model_type"] = "mistral";
  config["sliding_window"] = 5;
  return config;
}

class Packing : public ::testing::TestWithParam<nlohmann::json> {
 protected:
  std::unique_ptr<dist::Comm> comm = dist::make_single_comm();
  const Base base{GetParam(), *comm};
};

TEST_P(Packing, PackedDocumentsEqualEachAlone) {
  const Packed packed;
  const Tensor logits = base.logits(packed.batch());
  double loss_sum = 0;
  for (size_t d = 0; d < packed.tokens.size(); ++d) {
    const data::Batch alone = testing::batch_of(packed.tokens[d]);
    EXPECT_LT(testing::relative_error(Packed::of_document(logits, d), base.logits(alone)[0]), 1e-5)
        << d;
    if (alone.num_targets > 0)
      loss_sum += base.mean_loss(alone) * static_cast<double>(alone.num_targets);
  }
  EXPECT_NEAR(base.mean_loss(packed.batch()),
              loss_sum / static_cast<double>(packed.batch().num_targets), 1e-5);
}

TEST_P(Packing, ADocumentNeverSeesAnother) {
  const Tensor before = base.logits(Packed().batch());
  for (size_t changed = 0; changed < Packed::kPlaces.size(); ++changed) {
    Packed packed;
    packed.tokens[changed] = (packed.tokens[changed] + 1) % 128;
    const Tensor after = base.logits(packed.batch());
    for (size_t d = 0; d < Packed::kPlaces.size(); ++d) {
      const bool same = at::equal(Packed::of_document(after, d), Packed::of_document(before, d));
      EXPECT_EQ(same, d != changed) << "document " << d << ", changed " << changed;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Packing, ::testing::Values(testing::tiny_llama(), windowed()),
                         [](const auto& info) {
                           return info.param.template value<int>("sliding_window", 0) > 0
                                      ? "Window"
                                      : "WholeDocument";
                         });

TEST(PackingWindow, ATokenIsSeenOneWindowALayerAhead) {
  const auto comm = dist::make_single_comm();
  const Base base(windowed(), *comm);
  const Tensor tokens = testing::random_tokens(1, 24, 128, 1);
  const Tensor before = base.logits(testing::batch_of(tokens));
  tokens[0][0] = (tokens[0][0] + 1) % 128;
  const Tensor after = base.logits(testing::batch_of(tokens));
  constexpr int64_t kReach = 2 * (5 - 1);  // two layers; the newest five keys hold the query's own
  for (int64_t position = 0; position < 24; ++position) {
    EXPECT_EQ(at::equal(after[0][position], before[0][position]), position > kReach) << position;
  }
}

}  // namespace
}  // namespace graft::models
