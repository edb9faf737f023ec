// A method added by the five steps of peft/README.md (five_steps.cmake): beside the contract and
// the presets, which run over it in this program, that the catalogue knows it.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "launcher/method_sheet.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;

TEST(FiveSteps, TouchThreeFiles) {
  int written = 0;
  for (fs::recursive_directory_iterator entry(GRAFT_SOURCE_DIR), end; entry != end; ++entry)
    written += entry->is_regular_file() && !entry->is_symlink() ? 1 : 0;
  EXPECT_EQ(written, 3);  // the rest are links to the tree's files
}

TEST(FiveSteps, TheCatalogueKnowsTheMethod) {
  const auto& all = peft::method_facts();
  const auto found = std::find_if(all.begin(), all.end(),
                                  [](const auto& facts) { return facts.name == GRAFT_FOLLOWED; });
  ASSERT_NE(found, all.end());
  const Facts sheet = method_sheet(*found, GRAFT_SOURCE_DIR "/configs/models/tiny_llama.yaml");
  EXPECT_EQ(sheet.at("formula"), "y = l * (W x + b)");
  EXPECT_EQ(sheet.at("mergeable"), true);
  EXPECT_EQ(sheet.at("not_mergeable_with"), Facts::array({"a base with biases"}));  // l scales them
  EXPECT_EQ(sheet.at("starts_as_base"), true);
  EXPECT_EQ(sheet.at("on_model").at("trained_parameters"), 2 * (6 * 16 + 2 * 16));
}

}  // namespace
}  // namespace graft::launcher
