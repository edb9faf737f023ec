// Weight handles and names: what dense() shares, what may outlive a pin, and tables of names that
// invert.
#include "models/weight.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "configs/check.h"
#include "dist/comm_factory.h"
#include "models/names.h"
#include "models/nn/linear.h"
#include "tests/testing.h"

namespace graft::models {
namespace {

using dist::Pin;
using testing::Base;

class WeightOfABase : public ::testing::Test {
 protected:
  std::unique_ptr<dist::Comm> comm = dist::make_single_comm();
  const Base base{testing::tiny_llama(), *comm, {}};  // NF4
  const Weight& matrix = base.weight("block.1.mlp.up.weight");
  const Weight& vector = base.weight("block.1.attn_norm.weight");
  const Weight& table = base.weight("embed.weight");
};

TEST_F(WeightOfABase, IsReadUnderAPinOnly) {
  for (const Weight* weight : {&matrix, &vector, &table}) EXPECT_THROW(weight->dense(), Error);
}

TEST_F(WeightOfABase, IsRebuiltEachTimeUnlessKept) {
  const Pin pin(*base.store, matrix.block());
  const Tensor first = matrix.dense();
  EXPECT_FALSE(first.is_alias_of(matrix.dense()));
  matrix.keep();
  const Tensor kept = matrix.dense();
  EXPECT_TRUE(kept.is_alias_of(matrix.dense()));
  EXPECT_TRUE(at::equal(kept, first));
  matrix.drop();
  EXPECT_FALSE(kept.is_alias_of(matrix.dense()));
}

TEST_F(WeightOfABase, VectorsAreCopiesSoAutogradMayKeepThem) {
  const Pin pin(*base.store, vector.block());
  const Tensor bytes = base.store->bytes(vector.block(), vector.offset(), vector.payload_bytes());
  EXPECT_FALSE(vector.dense().is_alias_of(bytes));
}

TEST_F(WeightOfABase, AnAdapterIsGivenACopySoAutogradMayKeepIt) {
  const Pin pin(*base.store, table.block());
  const Tensor bytes = base.store->bytes(table.block(), table.offset(), table.payload_bytes());
  ASSERT_TRUE(table.dense().is_alias_of(bytes));
  const Weight no_bias{};
  EXPECT_FALSE(BaseLinearOp(table, no_bias).weight().is_alias_of(bytes));
}

TEST_F(WeightOfABase, RowsAreThoseOfTheTable) {
  const Pin pin(*base.store, table.block());
  const Tensor ids = testing::random_tokens(2, 5, 128, 1);
  EXPECT_TRUE(at::equal(table.rows(ids), at::embedding(table.dense(), ids)));
}

TEST_F(WeightOfABase, NamesInvert) {
  const NameMap& names = base.model->names();
  for (const auto& [hf, value] : testing::golden_weights(*base.model)) {
    const auto ours = names.from_hf(hf);
    ASSERT_TRUE(ours.has_value()) << hf;
    EXPECT_EQ(names.to_hf(*ours)->name, hf);
    EXPECT_NO_THROW(base.weight(*ours)) << hf;
  }
}

TEST_F(WeightOfABase, ModulesAndSuffixesAreHuggingFaces) {
  const NameMap& names = base.model->names();
  EXPECT_EQ(names.hf_module("block.11.attn.q"), "model.layers.11.self_attn.q_proj");
  EXPECT_EQ(names.slot_of_hf_module("model.layers.11.self_attn.q_proj"), "block.11.attn.q");
  EXPECT_EQ(names.hf_module("head"), "lm_head");
  EXPECT_EQ(names.role_of_hf_suffix("down_proj"), "mlp.down");
  EXPECT_EQ(names.role_of_hf_suffix("proj"), std::nullopt);
  EXPECT_EQ(names.from_hf("model.layers.x.self_attn.q_proj.weight"), std::nullopt);
  EXPECT_EQ(role_of("block.3.attn.q"), "attn.q");
  EXPECT_EQ(role_of("embed"), "embed");
}

}  // namespace
}  // namespace graft::models
