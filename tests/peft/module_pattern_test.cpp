// ModulePattern against Python 3.11: what re.match(r"(.*\.)?(key)$", module) finds, as PEFT asks
// it.
#include "peft/module_pattern.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

#include "tests/models/io_testing.h"

namespace graft::peft {
namespace {

constexpr const char* kModules[] = {
    "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head"};

bool matches(const char* key, std::string_view module) {
  size_t work = ModulePattern::kMostWork;
  return ModulePattern(key).matches(module, work);
}

struct Row {
  const char* key;
  const char* found;  ///< one digit a module
};

TEST(ModulePattern, MatchesWhatPythonMatches) {
  const Row rows[] = {
      {R"(q_proj)", "11000"},
      {R"(proj)", "00000"},
      {R"(self_attn.q_proj)", "11000"},
      {R"(1.self_attn.q_proj)", "10000"},
      {R"(model.layers.1.*q_proj)", "11000"},
      {R"(model.layers.*)", "11100"},
      {R"(^model.layers.1.self_attn.q_proj)", "10000"},
      {R"(^q_proj)", "00000"},
      {R"(q_proj$)", "11000"},
      {R"(layers\.[01]\..*q_proj)", "10000"},
      {R"(.*\.(q|v)_proj)", "11000"},
      {R"(layers\.\d+\.mlp\..*)", "00100"},
      {R"(layers\.\d\..*)", "10100"},
      {R"(layers\.\d{2}\..*)", "01000"},
      {R"(lm_head|embed_tokens)", "00011"},
      {R"((?:lm_head|model.embed_tokens))", "00011"},
      {R"(layers.[0-9].mlp.[^x]*)", "00100"},
      {R"(layers.[^0-9a].*)", "00000"},
      {R"(l?m_head)", "00001"},
      {R"(l??m_+head)", "00001"},
      {R"([]lm_]+head)", "00001"},
      {R"([^]]*_proj)", "11100"},
      {R"(e.{4}_tokens)", "00010"},
      {R"(e.{,3}_tokens)", "00000"},
      {R"(\w+)", "11111"},
      {R"((((a*)*)*)*.*)", "11111"},
      {R"(self_attn)", "00000"},
      {R"(.*)", "11111"},
      {R"()", "00000"},
      {R"([a-z_]+.1.*[p-r]_proj)", "11000"},
      {R"(\W*lm\_head)", "00001"},
      {R"(layers\.(1|2)\..*)", "10100"},
      {R"(layers\.(1{2}).*)", "01000"},
  };
  for (const Row& row : rows) {
    std::string found;
    for (const char* module : kModules) found += matches(row.key, module) ? '1' : '0';
    EXPECT_EQ(found, row.found) << row.key;
  }
}

TEST(ModulePattern, WhatPythonRefusesOrWeDoNotKnowIsADataError) {
  const std::string too_long(600, 'a'), too_deep(20, '(');
  for (const char* key : {"*q_proj",
                          "(",
                          "q)",
                          "a**",
                          "a*+",
                          "a{2}{3}",
                          "[a",
                          "a{x}",
                          "a{3,2}",
                          "^*",
                          "(?i)a",
                          "a(?=b)",
                          "(a)\\1",
                          "a\\b",
                          "[z-a]",
                          "[\\.-z]",
                          "a\xc3\xa9",
                          "a\\",
                          too_long.c_str(),
                          too_deep.c_str()}) {
    models::io::expect_refused([&] { ModulePattern pattern(key); }, "the pattern '");
  }
}

TEST(ModulePattern, NoPatternIsSlow) {
  const std::string module = std::string(400, 'a');
  const auto start = std::chrono::steady_clock::now();
  for (const char* key :
       {"(a+)+b", "(((((((((((a*)*)*)*)*)*)*)*)*)*)*)*b", "(a|a|aa)*b", ".*.*.*.*.*.*.*.*.*.*.*.*b",
        "(((a?){99}){99}){99}b", "(a*)*(a*)*(a*)*b"}) {
    EXPECT_FALSE(matches(key, module)) << key;
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

TEST(ModulePattern, OneThatTakesTooLongIsRefusedByName) {
  std::string key = "a";
  for (int i = 0; i < 15; ++i) key = "(?:" + key + "|b)+";
  const auto start = std::chrono::steady_clock::now();
  models::io::expect_refused([&] { matches(key.c_str(), std::string(400, 'a')); },
                             "the pattern '" + key + "' takes too long");
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

TEST(ModulePattern, AnEntryForEachModuleOfALargeModelIsNotTooMuch) {
  std::vector<std::string> modules;
  for (int i = 0; i < 126 * 7; ++i)
    modules.push_back("model.layers." + std::to_string(i / 7) + ".mlp." + std::to_string(i % 7));
  size_t work = ModulePattern::kMostWork;
  for (const std::string& key : modules) {
    const ModulePattern pattern(key);
    for (const std::string& module : modules)
      EXPECT_EQ(pattern.matches(module, work), key == module);
  }
}

}  // namespace
}  // namespace graft::peft
