// collate() against batches written out by hand.
#include "data/collate.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "configs/check.h"

namespace graft::data {
namespace {

at::Tensor rows(std::vector<int64_t> values, int64_t num_rows) {
  return at::tensor(values, at::kLong).view({num_rows, -1});
}

TEST(Collate, LaysOutTwoDocumentsOfARowAndPadding) {
  const std::vector<uint32_t> a = {11, 12, 13}, b = {21, 22}, c = {31, 32, 33, 34};
  const std::vector<uint8_t> all_a(3, 1), all_b(2, 1), all_c(4, 1);
  const Batch batch =
      collate(std::vector<Piece>{{a, all_a, 0, 0}, {c, all_c, 1, 0}, {b, all_b, 0, 3}}, 2, 6);
  EXPECT_TRUE(batch.tokens_BL.equal(rows({11, 12, 13, 21, 22, 0, 31, 32, 33, 34, 0, 0}, 2)));
  EXPECT_TRUE(batch.positions_BL.equal(rows({0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 0, 0}, 2)));
  EXPECT_TRUE(batch.documents_BL.equal(rows({0, 0, 0, 1, 1, -1, 0, 0, 0, 0, -1, -1}, 2)));
  EXPECT_TRUE(
      batch.labels_BL.equal(rows({12, 13, -100, 22, -100, -100, 32, 33, 34, -100, -100, -100}, 2)));
  EXPECT_EQ(batch.num_tokens, 9);
  EXPECT_EQ(batch.num_targets, 6);
}

TEST(Collate, LabelsOnlyWhatTheMaskOfTheNextTokenSays) {
  const std::vector<uint32_t> tokens = {1, 2, 3, 4, 5};
  const std::vector<uint8_t> mask = {1, 0, 1, 0, 1};  // a first token is never predicted
  const Batch batch = collate(std::vector<Piece>{{tokens, mask, 0, 0}}, 1, 5);
  EXPECT_TRUE(batch.labels_BL.equal(rows({-100, 3, -100, 5, -100}, 1)));
  EXPECT_EQ(batch.num_targets, 2);
}

TEST(Collate, PredictsTheLabelOfADocumentAtItsLastToken) {
  const std::vector<uint32_t> a = {11, 12, 13}, b = {21, 22};
  const std::vector<uint8_t> none(3, 0), all(2, 1);
  const Batch batch = collate(std::vector<Piece>{{a, none, 0, 0, 7}, {b, all, 0, 3, 0}}, 1, 6);
  EXPECT_TRUE(batch.labels_BL.equal(rows({-100, -100, 7, -100, 0, -100}, 1)));
  EXPECT_EQ(batch.num_targets, 2);
}

TEST(Collate, PredictsTheLabelsOfTokensAtTheTargets) {
  const std::vector<uint32_t> tokens = {11, 12, 13}, labels = {4, 5, 6};
  const std::vector<uint8_t> mask = {1, 0, 1};
  const Batch batch = collate(std::vector<Piece>{{tokens, mask, 0, 1, kNoLabel, labels}}, 1, 5);
  EXPECT_TRUE(batch.labels_BL.equal(rows({-100, 4, -100, 6, -100}, 1)));
  EXPECT_EQ(batch.num_targets, 2);
}

TEST(Collate, GivesAnEmptyLaneItsShapeAndNoToken) {
  const Batch batch = collate({}, 3, 8);
  EXPECT_EQ(batch.tokens_BL.sizes(), at::IntArrayRef({3, 8}));
  EXPECT_TRUE(batch.empty());
  EXPECT_EQ(batch.num_targets, 0);
  EXPECT_TRUE(batch.documents_BL.eq(-1).all().item<bool>());
  EXPECT_TRUE(batch.labels_BL.eq(kNoLabel).all().item<bool>());
}

TEST(Collate, RefusesADocumentThatDoesNotFit) {
  const std::vector<uint32_t> tokens = {1, 2, 3};
  const std::vector<uint8_t> mask = {1, 1, 1};
  EXPECT_THROW(collate(std::vector<Piece>{{tokens, mask, 0, 2}}, 1, 4), Error);
}

}  // namespace
}  // namespace graft::data
