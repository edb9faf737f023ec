// configs/methods: one preset a method, which shows every field with its default.
#include <gtest/gtest.h>

#include <filesystem>

#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

std::string preset(const std::string& method) {
  return GRAFT_SOURCE_DIR "/configs/methods/" + method + ".yaml";
}

TEST(Presets, ExistForEveryMethodAndNothingElse) {
  std::set<std::string> files, names;
  for (const auto& entry :
       std::filesystem::directory_iterator(GRAFT_SOURCE_DIR "/configs/methods")) {
    files.insert(entry.path().stem());
  }
  for (const std::string& name : methods().names()) names.insert(name);
  EXPECT_EQ(files, names);
}

TEST(Presets, ShowEveryFieldWithItsDefault) {
  for (const std::string& name : methods().names()) {
    const auto loaded = configs::load_config<MethodEntry>(preset(name));
    EXPECT_EQ(loaded.name, name);
    EXPECT_EQ(configs::dump(loaded),
              configs::dump(MethodEntry{name, methods().make(name), std::nullopt}))
        << name;
    configs::Problems problems;
    const auto file = configs::parse_yaml(configs::read_file(preset(name)), problems);
    ASSERT_TRUE(file.has_value());
    const auto method = methods().make(name);
    for (const auto& field :
         configs::describe_section([&](configs::Fields& f) { method->fields(f); }).members) {
      EXPECT_NE(file->find(field.name), nullptr) << preset(name) << " does not show " << field.name;
    }
  }
}

TEST(Presets, OpenWithTheFormulaAndThePaper) {
  for (const MethodFacts& facts : method_facts()) {
    const std::string text = configs::read_file(preset(facts.name));
    EXPECT_TRUE(text.starts_with("# ")) << facts.name;
    EXPECT_NE(text.find(facts.summary), std::string::npos) << facts.name;
    EXPECT_NE(text.find(facts.paper), std::string::npos) << facts.name;
  }
}

}  // namespace
}  // namespace graft::peft
