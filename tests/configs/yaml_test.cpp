// The YAML reader: what it refuses and where it says so; overrides; the writer's round trip.
#include "configs/yaml.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>

#include "configs/check.h"

namespace graft::configs {
namespace {

// Every problem of a text, as the user sees them; empty if it is accepted.
std::string problems_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  Problems problems;
  std::optional<Node> root = parse_yaml(text, problems);
  for (const std::string& assignment : overrides) apply_override(assignment, *root, problems);
  try {
    problems.throw_if_any("f");
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    return error.what();
  }
  return "";
}

Node parse(const std::string& text, const std::vector<std::string>& overrides = {}) {
  Problems problems;
  std::optional<Node> root = parse_yaml(text, problems);
  for (const std::string& assignment : overrides) apply_override(assignment, *root, problems);
  problems.throw_if_any("f");
  return *root;
}

std::string overridden(const std::string& text, const std::vector<std::string>& overrides) {
  return to_yaml(parse(text, overrides));
}

TEST(Yaml, PlacesAreOneBased) {
  const Node root = parse("# comment\na: 1\nb:\n  - c: two\n");
  EXPECT_EQ(root.find("a")->key_place.line, 2);
  EXPECT_EQ(root.find("a")->key_place.column, 1);
  EXPECT_EQ(root.find("a")->place.column, 4);
  const Node& c = root.find("b")->items[0].items[0];
  EXPECT_EQ(c.text, "two");
  EXPECT_EQ(c.key_place.line, 4);
  EXPECT_EQ(c.key_place.column, 5);
  EXPECT_EQ(c.place.column, 8);
}

TEST(Yaml, RefusesWhatAConfigurationHasNoUseFor) {
  const struct {
    std::string text, message;
  } kCases[] = {
      {"a: 1\na: 2\n", "f:2:1: a: duplicate key; first on line 1"},
      {"s: {x: 1, x: 2}\n", "f:1:11: s.x: duplicate key; first on line 1"},
      {"a: &x 1\n", "f:1:4: a: anchors (&name) are not supported: repeat the value"},
      {"a: !!str 1\n", "f:1:4: a: tags (!tag:yaml.org,2002:str) are not supported: remove it"},
      {"a: !mine {b: 1}\n", "f:1:4: a: tags (!!mine) are not supported: remove it"},
      {"b: {<<: {c: 1}}\n", "f:1:5: b.<<: merge keys are not supported: write the keys out"},
      {"a: 1\n---\nb: 2\n", "f:2:1: a second document; one file holds one document"},
      {"? [a]\n: 1\n", "f:1:3: a key must be plain text; or is a bracket not closed?"},
      {"~: 1\n", "f:1:1: a key must not be empty"},
      {"a: \"x\\0y\"\n", "f:1:4: a text must not hold the character NUL"},
      {std::string("a: x\0y\n", 7), "f:1:5: the byte 0x00 is not text (UTF-8 expected)"},
      {"a: 1\nb: \x04\nc: 3\n", "f:2:4: the byte 0x04 is not text (UTF-8 expected)"},
      {"a: \xff\n", "f:1:4: the byte 0xff is not text (UTF-8 expected)"},
      {"a: \xc0\xaf\n", "f:1:4: the byte 0xc0 is not text (UTF-8 expected)"},
      {"a: \xed\xa0\x80\n", "f:1:4: the byte 0xed is not text (UTF-8 expected)"},
      {"a: \xc3", "f:1:4: the byte 0xc3 is not text (UTF-8 expected)"},
  };
  for (const auto& item : kCases) EXPECT_EQ(problems_of(item.text), item.message) << item.text;
}

TEST(Yaml, AcceptsTextInAnyLanguageAndWindowsLines) {
  EXPECT_EQ(parse("a: \xc3\xa9\xe4\xb8\xad\xf0\x9f\x8c\xb1\r\nb: 2\r\n").find("a")->text,
            "\xc3\xa9\xe4\xb8\xad\xf0\x9f\x8c\xb1");
}

TEST(Yaml, SyntaxErrorsHaveAPlace) {
  EXPECT_EQ(problems_of("a: 1\nb: [1, 2\nc: 3\n").substr(0, 4), "f:3:");
  EXPECT_EQ(problems_of("a:\n\tb: 1\n").substr(0, 4), "f:2:");
  EXPECT_EQ(problems_of("a: *nowhere\n").substr(0, 6), "f:1:4:");
}

TEST(Yaml, AnAliasBombIsRefusedAtOnce) {
  std::string bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n";
  for (int i = 1; i < 9; ++i) {
    const std::string last = "*a" + std::to_string(i - 1);
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + last;
    for (int j = 1; j < 9; ++j) bomb += "," + last;
    bomb += "]\n";
  }
  ASSERT_LT(bomb.size(), 460u);
  const auto start = std::chrono::steady_clock::now();
  const std::string text = problems_of(bomb);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(200));
  EXPECT_NE(text.find("f:2:10: a1.0: aliases (*name) are not supported"), std::string::npos);
  EXPECT_NE(text.find("f:9:5: a8: anchors (&name) are not supported"), std::string::npos);
}

TEST(Yaml, AListThatHoldsItselfIsRefused) {
  EXPECT_EQ(problems_of("a: &a [*a]\n"),
            "f:1:4: a: anchors (&name) are not supported: repeat the value\n"
            "f:1:8: a.0: aliases (*name) are not supported: repeat the value");
}

TEST(Yaml, ThirtyTwoLevelsAreTheLimit) {
  EXPECT_EQ(problems_of(std::string(32, '[') + std::string(32, ']')), "");
  EXPECT_EQ(problems_of(std::string(33, '[') + std::string(33, ']')),
            "f:1:33: nested deeper than 32");
  EXPECT_NE(problems_of(std::string(100000, '[')), "");
}

TEST(Yaml, OneMebibyteIsTheLimit) {
  const std::string line = "a: 1\n";
  EXPECT_EQ(problems_of(line + std::string((1 << 20) - line.size(), '\n')), "");
  EXPECT_EQ(problems_of(line + std::string((1 << 20) - line.size() + 1, '\n')),
            "f:1:1: larger than 1 MiB: this is not a configuration");
}

TEST(Yaml, ManyMistakesAreListedToAHundredAndCounted) {
  std::string text = "k0: 0\n";
  for (int i = 0; i < 150; ++i) text += "k0: 0\n";
  const std::string all = problems_of(text);
  EXPECT_EQ(std::count(all.begin(), all.end(), '\n'), 100);
  EXPECT_NE(all.find("\n... and 50 more"), std::string::npos);
}

TEST(Yaml, MessagesCarryNoControlCharactersOfTheFile) {
  const std::string text = problems_of("s: {\"a\\e[31m\": 1, \"a\\e[31m\": 2}\n");
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  EXPECT_NE(text.find("s.a?[31m"), std::string::npos);
}

TEST(Override, ReachesSectionsListsAndNewKeys) {
  EXPECT_EQ(overridden("a:\n  b: 1\n", {"a.b=2"}), "a:\n  b: 2\n");
  EXPECT_EQ(overridden("a: 1\n", {"b.c=x", "b.d=[1, 2]"}), "a: 1\nb:\n  c: x\n  d: [1, 2]\n");
  EXPECT_EQ(overridden("p: [{r: 1}, {r: 2}]\n", {"p.1.r=8"}), "p:\n  - r: 1\n  - r: 8\n");
  EXPECT_EQ(overridden("p: []\n", {"p.0.r=8"}), "p:\n  - r: 8\n");
  EXPECT_EQ(overridden("a: 1\n", {"p.0.r=8"}), "a: 1\np:\n  - r: 8\n");
  EXPECT_EQ(overridden("a: 1\n", {"a="}), "a: null\n");
  EXPECT_EQ(overridden("a: 1\n", {"a=x=y"}), "a: x=y\n");
  EXPECT_EQ(overridden("a: 1\n", {"a=2", "a=3"}), "a: 3\n");
}

TEST(Override, MistakesNameTheCommandLineAndTheKey) {
  const struct {
    std::string assignment, message;
  } kCases[] = {
      {"a", "command line: a: expected section.key=value, got 'a'"},
      {"=1", "command line: expected section.key=value, got '=1'"},
      {"a..b=1", "command line: a..b: expected section.key=value, got 'a..b=1'"},
      {"a.=1", "command line: a.: expected section.key=value, got 'a.=1'"},
      {"a.x.y=1", "command line: a.x.y: a is a single value, '1': it has no 'x'"},
      {"p.2.r=1",
       "command line: p.2.r: p is a list of 1: '2' is not an index into it (the first is 0)"},
      {"p.r=1",
       "command line: p.r: p is a list of 1: 'r' is not an index into it (the first is 0)"},
      {"a=&x 1", "command line: a: anchors (&name) are not supported: repeat the value"},
      {"a=[1", "command line: a: a key must be plain text; or is a bracket not closed?"},
  };
  for (const auto& item : kCases) {
    EXPECT_EQ(problems_of("a: 1\np: [{r: 1}]\n", {item.assignment}), item.message);
  }
}

TEST(Writer, QuotesWhateverCouldBeTakenForSomethingElse) {
  for (const char* text :
       {"",     "null", "~",          "true", "No",       "ON",           "12",           "1e4",
        "0x1F", "010",  "2024-01-01", "a: b", "a #b",     "- a",          "*a",           "&a",
        "!a",   "[a",   "a,b",        "{a}",  "\"",       "\\",           "a\nb",         " a",
        "a ",   "\t",   ".inf",       "\x01", "\xc2\x90", "\xe2\x80\xa8", "\xef\xbb\xbf", "'",
        "|",    ">",    "%a",         "@a",   "`a",       "? a"}) {
    Node root, item;
    root.kind = Node::Kind::kMap;
    item.kind = Node::Kind::kScalar;
    item.text = text;
    item.quoted = true;
    item.key = std::string("k") + text;
    root.items.push_back(item);
    const std::string written = to_yaml(root);
    const Node again = parse(written);
    ASSERT_EQ(again.items.size(), 1u) << written;
    EXPECT_EQ(again.items[0].key, item.key) << written;
    EXPECT_EQ(again.items[0].text, text) << written;
    EXPECT_TRUE(again.items[0].quoted) << written;
  }
}

}  // namespace
}  // namespace graft::configs
