// Targets: the words a user may write for slots, and what is written into PEFT's files for them.
#include "peft/targets.h"

#include <gtest/gtest.h>

#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

using Names = std::vector<std::string>;
using models::io::expect_refused;

class TargetsTest : public testing::Test {
 protected:
  Names resolve(const Targets& targets) const {
    Names names;
    for (const LinearSite* site : targets.resolve(slots)) names.push_back(site->name);
    return names;
  }
  Names modules(std::initializer_list<std::string> words) const {
    return resolve({configs::StringOrList(words)});
  }
  Names written(const Targets& targets) const { return hf_targets(targets.resolve(slots), slots); }

  std::unique_ptr<models::Model> model = models::make_model(tiny_config("llama"));
  SlotMap slots{*model};
};

const Names kQueries = {"block.0.attn.q", "block.1.attn.q"};

TEST_F(TargetsTest, AllLinearIsEveryMatrixOfTheBlocks) {
  Names expected;
  for (const char* block : {"block.0.", "block.1."}) {
    for (const char* role :
         {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"}) {
      expected.push_back(std::string(block) + role);
    }
  }
  EXPECT_EQ(modules({"all-linear"}), expected);
}

TEST_F(TargetsTest, RoleSuffixAndGlobMeanTheSame) {
  EXPECT_EQ(modules({"attn.q"}), kQueries);
  EXPECT_EQ(modules({"q_proj"}), kQueries);
  EXPECT_EQ(modules({"self_attn.q_proj"}), kQueries);
  EXPECT_EQ(modules({"block.*.attn.q"}), kQueries);
  EXPECT_EQ(modules({"model.layers.*.q_proj"}), kQueries);
}

TEST_F(TargetsTest, SlotAndPathMeanOne) {
  EXPECT_EQ(modules({"block.1.attn.q"}), Names{"block.1.attn.q"});
  EXPECT_EQ(modules({"model.layers.1.self_attn.q_proj"}), Names{"block.1.attn.q"});
  EXPECT_EQ(modules({"embed_tokens"}), Names{"embed"});
  EXPECT_EQ(modules({"lm_head"}), Names{"head"});
}

TEST_F(TargetsTest, OrderIsTheModelsAndRepetitionHarmless) {
  EXPECT_EQ(modules({"head", "attn.q", "q_proj", "embed"}),
            (Names{"embed", "block.0.attn.q", "block.1.attn.q", "head"}));
}

TEST_F(TargetsTest, ExcludeAndLayersTakeAway) {
  EXPECT_EQ(resolve({{"attn.*"}, {"attn.k", "o_proj"}}),
            (Names{"block.0.attn.q", "block.0.attn.v", "block.1.attn.q", "block.1.attn.v"}));
  EXPECT_EQ(resolve({{"attn.q", "embed"}, {}, {1}}), (Names{"embed", "block.1.attn.q"}));
}

TEST_F(TargetsTest, ASuffixIsWholeWords) { EXPECT_THROW(modules({"proj"}), Error); }

TEST_F(TargetsTest, WordsThatMeanNothingAreAnsweredWithTheNearest) {
  expect_refused([&] { modules({"q_prj"}); },
                 "target_modules 'q_prj' matches nothing in this model; did you mean 'q_proj'?",
                 ExitCode::kUsage);
  expect_refused(
      [&] {
        resolve({{"attn.q"}, {"atn.k"}});
      },
      "exclude_modules 'atn.k' matches nothing in this model; did "
      "you mean 'attn.k'?",
      ExitCode::kUsage);
  expect_refused(
      [&] {
        resolve({{"attn.q"}, {"attn.q"}});
      },
      "leave no slot to adapt", ExitCode::kUsage);
}

TEST_F(TargetsTest, ALayerTheModelLacksIsRefused) {
  expect_refused(
      [&] {
        resolve({{"attn.q"}, {}, {0, 2}});
      },
      "layers_to_transform: this model has no layer 2", ExitCode::kUsage);
}

TEST_F(TargetsTest, PeftIsToldSuffixesWhereAllAreMeantElsePaths) {
  EXPECT_EQ(written({{"attn.q", "attn.v"}}), (Names{"q_proj", "v_proj"}));
  EXPECT_EQ(written({{"attn.q"}, {}, {1}}), Names{"model.layers.1.self_attn.q_proj"});
  EXPECT_EQ(written({{"attn.q", "block.0.mlp.up", "embed", "head"}}),
            (Names{"embed_tokens", "lm_head", "model.layers.0.mlp.up_proj", "q_proj"}));
}

TEST_F(TargetsTest, WhatIsWrittenMeansTheSameSlots) {
  for (const Targets& targets :
       {Targets{{"all-linear"}, {"block.0.mlp.*"}}, Targets{{"attn.*", "head"}, {}, {1}}}) {
    Targets back;
    back.modules.values = written(targets);
    EXPECT_EQ(resolve(back), resolve(targets));
  }
}

TEST(Glob, StarsStandForAnyCharacters) {
  EXPECT_TRUE(glob_match("*", ""));
  EXPECT_TRUE(glob_match("a*c", "abbc"));
  EXPECT_TRUE(glob_match("*.q", "block.0.attn.q"));
  EXPECT_TRUE(glob_match("a*b*b", "aabab"));
  EXPECT_FALSE(glob_match("a*c", "abb"));
  EXPECT_FALSE(glob_match("", "a"));
  EXPECT_FALSE(glob_match("a", "ab"));
}

TEST(Patterns, TheLongestKeyThatMeansTheSlotWins) {
  LinearSite site;
  site.name = "block.1.attn.q", site.role = "attn.q",
  site.hf_path = "model.layers.1.self_attn.q_proj";
  const std::map<std::string, int> pattern = {
      {"q_proj", 4}, {"model.layers.1.self_attn.q_proj", 6}, {"v_proj", 9}};
  EXPECT_EQ(pattern_value(pattern, site, 8), 6);
  site.hf_path = "model.layers.0.self_attn.q_proj";
  EXPECT_EQ(pattern_value(pattern, site, 8), 4);
  EXPECT_EQ(pattern_value({{"v_proj", 9}}, site, 8), 8);
}

}  // namespace
}  // namespace graft::peft
