// Fields: every type, every message, the dump's fixed point, help and the editor schema.
#include "configs/schema.h"

#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "configs/check.h"

namespace graft::configs {
namespace {

struct Inner {
  int size = 4;
  std::string name = "inner";

  void fields(Fields& f) {
    f("size", size, f.range(1, 4096), "inner size");
    f("name", name, "what it is called");
  }
};

struct Everything {
  bool flag = false;
  int count = 1;
  int64_t seed = 42;
  double rate = 2e-4;
  double dropout = 0.0;
  std::string path = "a/b.h5";
  std::string kind = "nf4";
  std::optional<int> limit;
  std::optional<std::string> revision;
  Auto<int> threads;
  StringOrList targets = "all-linear";
  std::vector<std::string> names;
  std::vector<int> layers;
  std::map<std::string, int> ranks;
  std::map<std::string, double> alphas;
  Inner inner;
  std::vector<Inner> list;
  std::optional<Inner> maybe;

  void fields(Fields& f) {
    f("flag", flag, "a switch");
    f("count", count, f.at_least(0), "a number of things");
    f("seed", seed, "of everything random");
    f("rate", rate, f.positive(), "learning rate");
    f("dropout", dropout, f.at_least(0).below(1), "share of zeros");
    f("path", path, "a file");
    f("kind", kind, f.one_of({"none", "nf4", "int8"}), "storage");
    f("limit", limit, f.at_least(1), "at most so many");
    f("revision", revision, "which one");
    f("threads", threads, f.range(1, 64), "CPU threads");
    f("targets", targets, "what is adapted");
    f("names", names, f.one_of({"loss", "accuracy"}), "metrics");
    f("layers", layers, f.at_least(0), "which layers");
    f("ranks", ranks, f.range(1, 64), "rank by name");
    f("alphas", alphas, "alpha by name");
    f("inner", inner, "a section");
    f("list", list, "sections");
    f("maybe", maybe, "a section or none");
    f.require(limit.value_or(0) <= 100, "limit", "must not exceed 100");
    f.require(inner.name != "bad", "inner.name", "must not be bad");
  }
};

Everything read(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return read_text<Everything>(text, "f", overrides);
}

std::string problems_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  try {
    read(text, overrides);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    return error.what();
  }
  return "";
}

TEST(Schema, AFurtherCheckReportsBesideOtherMistakesAtElementsOfLists) {
  const Check<Everything> check = [](Everything& config, Fields& f) {
    EXPECT_EQ(config.names.size(), 2u);
    EXPECT_EQ(config.count, Everything().count);
    f.require(false, "names.1", "no such metric");
    f.require(false, "list.0.size", "too small");
    f.require(false, "count", "is not said: it is wrong already");
  };
  const std::string text = "count: many\nnames: [loss, accuracy]\nlist:\n  - {size: 5}\n";
  try {
    read_text<Everything>(text, "f", {}, check);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    const std::string said = error.what();
    EXPECT_NE(said.find("f:1:8: count: expected an integer"), std::string::npos) << said;
    EXPECT_NE(said.find("\nf:2:15: names.1: no such metric\nf:4:12: list.0.size: too small"),
              std::string::npos)
        << said;
    EXPECT_EQ(said.find("is not said"), std::string::npos) << said;
  }
}

TEST(Schema, AbsentKeysKeepTheirDefaults) {
  EXPECT_EQ(dump(read("{}")), dump(Everything()));
  EXPECT_EQ(read("inner: {size: 9}\n").inner.name, "inner");
}

TEST(Schema, EveryTypeIsRead) {
  const Everything c = read(R"(flag: true
count: 7
seed: -9223372036854775808
rate: 1e-5
path: 123
kind: none
limit: 3
revision: main
threads: 8
targets: [attn.q, "*_proj"]
names: [loss, accuracy]
layers: [0, 31]
ranks: {attn.q: 4, block.3.mlp.up: 2}
alphas: {x: 1}
inner: {size: 2, name: "yes"}
list: [{size: 5}, {name: b}]
maybe: {}
)");
  EXPECT_TRUE(c.flag);
  EXPECT_EQ(c.count, 7);
  EXPECT_EQ(c.seed, std::numeric_limits<int64_t>::min());
  EXPECT_EQ(c.rate, 1e-5);
  EXPECT_EQ(c.path, "123");
  EXPECT_EQ(c.limit, 3);
  EXPECT_EQ(c.revision, "main");
  EXPECT_EQ(c.threads.value, 8);
  EXPECT_EQ(c.targets.values, (std::vector<std::string>{"attn.q", "*_proj"}));
  EXPECT_EQ(c.names.size(), 2u);
  EXPECT_EQ(c.layers, (std::vector<int>{0, 31}));
  EXPECT_EQ(c.ranks.at("block.3.mlp.up"), 2);
  EXPECT_EQ(c.alphas.at("x"), 1.0);
  EXPECT_EQ(c.inner.name, "yes");
  ASSERT_EQ(c.list.size(), 2u);
  EXPECT_EQ(c.list[0].size, 5);
  EXPECT_EQ(c.list[1].name, "b");
  EXPECT_EQ(c.maybe->size, 4);
}

TEST(Schema, NullAndAutoUnset) {
  const Everything c = read("limit: null\nrevision: ~\nthreads: auto\nmaybe:\n");
  EXPECT_FALSE(c.limit || c.revision || c.threads.value || c.maybe);
  EXPECT_EQ(read("revision: \"null\"\n").revision, "null");
}

TEST(Schema, WholeNumbersMayBeWrittenAsPeopleDo) {
  const std::pair<const char*, int64_t> kCases[] = {{"1e4", 10000},
                                                    {"10_000", 10000},
                                                    {"2.5e3", 2500},
                                                    {"+7", 7},
                                                    {"-0", 0},
                                                    {"16.0", 16},
                                                    {"1E2", 100},
                                                    {"1_0_0", 100},
                                                    {"1e+3", 1000},
                                                    {"120e-1", 12},
                                                    {"0", 0},
                                                    {"0e5", 0},
                                                    {"9007199254740993", 9007199254740993}};
  for (const auto& [text, value] : kCases) {
    EXPECT_EQ(read(std::string("seed: ") + text).seed, value) << text;
  }
  for (const char* text : {"1.5",    "1e-1",  "1.00000000000000000001",
                           "1__0",   "_1",    "1_",
                           "0x1F",   "0b1",   "1e",
                           "e4",     ".",     "1.2.3",
                           "nan",    ".inf",  "1e400",
                           "1 2",    "--1",   "9223372036854775808",
                           "\"16\"", "'1e4'", "on",
                           "null",   "[]",    "{}"}) {
    EXPECT_NE(problems_of(std::string("seed: ") + text), "") << text;
  }
}

TEST(Schema, NumbersAreDecimalAndFinite) {
  const std::pair<const char*, double> kCases[] = {
      {"1", 1}, {".5", .5}, {"5.", 5}, {"1_000.5", 1000.5}, {"2.0e-4", 2e-4}, {"1e3", 1000}};
  for (const auto& [text, value] : kCases) {
    EXPECT_EQ(read(std::string("rate: ") + text).rate, value) << text;
  }
  for (const char* text : {".inf", ".nan", "inf", "1e999", "1e-999", "0x10", "010", "\"1\""}) {
    EXPECT_NE(problems_of(std::string("rate: ") + text), "") << text;
  }
}

TEST(Schema, MessagesSayWhatWasExpectedAndGot) {
  const std::pair<const char*, const char*> kCases[] = {
      {"count: abc", "f:1:8: count: expected an integer from 0 to 2147483647, got 'abc'"},
      {"count: -1", "f:1:8: count: expected an integer from 0 to 2147483647, got '-1'"},
      {"count: 3e9", "f:1:8: count: expected an integer from 0 to 2147483647, got '3e9'"},
      {"seed: \"16\"", "f:1:7: seed: expected an integer, got the text \"16\""},
      {"seed: 010",
       "f:1:7: seed: expected an integer, got '010'; a leading zero reads as octal elsewhere: "
       "remove it"},
      {"seed: 99999999999999999999",
       "f:1:7: seed: expected an integer, got '99999999999999999999'; it does not fit 64 bits"},
      {"rate: 0", "f:1:7: rate: expected a number greater than 0, got '0'"},
      {"rate: 1e999",
       "f:1:7: rate: expected a number greater than 0, got '1e999'; it is outside the range of a "
       "double"},
      {"dropout: 1", "f:1:10: dropout: expected a number of at least 0 and less than 1, got '1'"},
      {"flag: yes", "f:1:7: flag: expected true or false, got 'yes'"},
      {"flag: \"true\"", "f:1:7: flag: expected true or false, got the text \"true\""},
      {"flag: 1", "f:1:7: flag: expected true or false, got '1'"},
      {"path: no", "f:1:7: path: expected a string, got 'no'; put it in quotes if it is one"},
      {"path: null", "f:1:7: path: expected a string, got null"},
      {"path: [a]", "f:1:7: path: expected a string, got a list"},
      {"kind: nf5", "f:1:7: kind: expected one of none, nf4, int8, got 'nf5'; did you mean 'nf4'?"},
      {"kind: zzzz", "f:1:7: kind: expected one of none, nf4, int8, got 'zzzz'"},
      {"limit: 0", "f:1:8: limit: expected an integer from 1 to 2147483647 or null, got '0'"},
      {"threads: 65", "f:1:10: threads: expected an integer from 1 to 64 or auto, got '65'"},
      {"threads: null", "f:1:10: threads: expected an integer from 1 to 64 or auto, got null"},
      {"targets: {a: 1}", "f:1:10: targets: expected a string or a list of strings, got a mapping"},
      {"names: loss", "f:1:8: names: expected a list, got 'loss'"},
      {"names: [los]",
       "f:1:9: names.0: expected one of loss, accuracy, got 'los'; did you mean 'loss'?"},
      {"layers: [0, x]", "f:1:13: layers.1: expected an integer from 0 to 2147483647, got 'x'"},
      {"ranks: {q: 65}", "f:1:12: ranks.q: expected an integer from 1 to 64, got '65'"},
      {"inner: 3", "f:1:8: inner: expected a mapping of keys to values, got '3'"},
      {"inner:\n  sise: 3", "f:2:3: inner.sise: unknown key; did you mean 'size'?"},
      {"inner: {zzzzzz: 3}", "f:1:9: inner.zzzzzz: unknown key; known: size, name"},
      {"list: [{size: 0}]", "f:1:15: list.0.size: expected an integer from 1 to 4096, got '0'"},
      {"maybe: 3", "f:1:8: maybe: expected a mapping of keys to values or null, got '3'"},
      {"maybe: {size: x}", "f:1:15: maybe.size: expected an integer from 1 to 4096, got 'x'"},
      {"limit: 101", "f:1:8: limit: must not exceed 100"},
      {"inner: {name: bad}", "f:1:15: inner.name: must not be bad"},
      {"- a", "f:1:1: expected a mapping of keys to values, got a list"},
      {"", "f:1:1: expected a mapping of keys to values, got null"},
  };
  for (const auto& [text, message] : kCases) EXPECT_EQ(problems_of(text), message) << text;
}

TEST(Schema, AllMistakesComeAtOnceInFileOrder) {
  EXPECT_EQ(problems_of("ratee: 1\nlist:\n  - size: 0\n    sise: 1\nflag: on\ncount: 1\ncount: 2\n",
                        {"inner.size=none", "kid=1"}),
            "f:1:1: ratee: unknown key; did you mean 'rate'?\n"
            "f:3:11: list.0.size: expected an integer from 1 to 4096, got '0'\n"
            "f:4:5: list.0.sise: unknown key; did you mean 'size'?\n"
            "f:5:7: flag: expected true or false, got 'on'\n"
            "f:7:1: count: duplicate key; first on line 6\n"
            "command line: inner.size: expected an integer from 1 to 4096, got 'none'\n"
            "command line: kid: unknown key; did you mean 'kind'?");
}

TEST(Schema, AWrongValueIsReportedOnceNotAgainByARule) {
  EXPECT_EQ(problems_of("limit: [101]\n"),
            "f:1:8: limit: expected an integer from 1 to 2147483647 or null, got a list");
}

TEST(Schema, OverridesWinAndRepairTheFile) {
  const Everything c = read("rate: -1\nlist: [{size: 1}]\n",
                            {"rate=0.5", "list.0.size=8", "threads=4", "targets=[a, b]"});
  EXPECT_EQ(c.rate, 0.5);
  EXPECT_EQ(c.list[0].size, 8);
  EXPECT_EQ(c.threads.value, 4);
  EXPECT_EQ(c.targets.values.size(), 2u);
}

TEST(Dump, ReadsBackToTheSameText) {
  Everything c;
  c.rate = 0.1 + 0.2;
  c.dropout = 5e-324;
  c.path = "yes";
  c.limit = 3;
  c.targets = {"q", "a: b"};
  c.layers = {1, 2};
  c.ranks = {{"attn.q", 4}, {"12", 5}};
  c.alphas = {{"x y", 1e300}, {"z", 32}};
  c.list = {{1, "#"}, {2, "null"}};
  c.maybe = Inner{9, "\xc3\xa9\n"};
  const std::string text = dump(c);
  const Everything again = read(text);
  EXPECT_EQ(dump(again), text);
  EXPECT_EQ(again.rate, c.rate);
  EXPECT_EQ(again.dropout, c.dropout);
  EXPECT_EQ(again.path, c.path);
  EXPECT_EQ(again.ranks, c.ranks);
  EXPECT_EQ(again.alphas, c.alphas);
  EXPECT_EQ(again.list[1].name, "null");
  EXPECT_EQ(again.maybe->name, c.maybe->name);
}

TEST(Dump, KeepsTheFormOfAStringOrList) {
  EXPECT_NE(dump(read("targets: q\n")).find("\ntargets: q\n"), std::string::npos);
  EXPECT_NE(dump(read("targets: [q]\n")).find("\ntargets: [q]\n"), std::string::npos);
}

TEST(Dump, IsYamlAPersonWouldWrite) {
  EXPECT_EQ(
      dump(read("list: [{size: 5}]\nlayers: [1, 2]\nranks: {q: 4}\nrate: 1e-9\n")),
      "flag: false\ncount: 1\nseed: 42\nrate: 1.0e-09\ndropout: 0.0\npath: a/b.h5\nkind: nf4\n"
      "limit: null\nrevision: null\nthreads: auto\ntargets: all-linear\nnames: []\n"
      "layers: [1, 2]\nranks:\n  q: 4\nalphas: {}\ninner:\n  size: 4\n  name: inner\n"
      "list:\n  - size: 5\n    name: inner\nmaybe: null\n");
}

TEST(Describe, OneLineAKey) {
  const std::string text = describe_text(describe(Everything()));
  for (const char* line : {
           "rate         learning rate (number greater than 0; default 0.0002)\n",
           "kind         storage (one of none, nf4, int8; default nf4)\n",
           "threads      CPU threads (integer from 1 to 64 or auto; default auto)\n",
           "targets      what is adapted (string or list of string; default all-linear)\n",
           "names        metrics (list of one of loss, accuracy; default [])\n",
           "ranks        rank by name (map of name to integer from 1 to 64; default {})\n",
           "inner.size   inner size (integer from 1 to 4096; default 4)\n",
           "list[].size  inner size (integer from 1 to 4096; default 4)\n",
           "maybe        a section or none (section or null; default null)\n",
       }) {
    EXPECT_NE(text.find(line), std::string::npos) << line << "in\n" << text;
  }
}

TEST(JsonSchema, HoldsTypesBoundsDocsAndDefaults) {
  const nlohmann::json schema = json_schema(describe(Everything()));
  EXPECT_EQ(schema["type"], "object");
  EXPECT_EQ(schema["additionalProperties"], false);
  const nlohmann::json& keys = schema["properties"];
  EXPECT_EQ(keys.size(), 18u);
  EXPECT_EQ(keys["rate"], (nlohmann::json{{"type", "number"},
                                          {"exclusiveMinimum", 0.0},
                                          {"description", "learning rate"},
                                          {"default", 2e-4}}));
  EXPECT_EQ(keys["kind"]["enum"], (nlohmann::json{"none", "nf4", "int8"}));
  EXPECT_EQ(keys["inner"]["properties"]["size"]["maximum"], 4096);
  EXPECT_EQ(keys["inner"]["additionalProperties"], false);
  EXPECT_EQ(keys["list"]["items"]["properties"]["size"]["minimum"], 1);
  EXPECT_EQ(keys["ranks"]["additionalProperties"]["maximum"], 64);
  EXPECT_EQ(keys["threads"]["anyOf"][1]["const"], "auto");
  EXPECT_EQ(keys["threads"]["default"], "auto");
  EXPECT_EQ(keys["limit"]["anyOf"][1]["type"], "null");
  EXPECT_TRUE(keys["limit"]["default"].is_null());
  EXPECT_EQ(keys["targets"]["anyOf"].size(), 2u);
}

// A section whose further keys depend on one just read, as the list of methods has it.
struct Shape {
  virtual ~Shape() = default;
  virtual void fields(Fields& f) = 0;
};
struct Circle : Shape {
  double radius = 1;
  void fields(Fields& f) override { f("radius", radius, f.positive(), "from the centre"); }
};
struct AnyShape {
  std::string name;
  std::unique_ptr<Shape> shape;

  void fields(Fields& f) {
    f("method", name, "which shape");
    if (f.reading() && name == "circle") shape = std::make_unique<Circle>();
    if (shape != nullptr) {
      shape->fields(f);
    } else if (f.reading()) {
      f.fail("method", "unknown shape '" + name + "'");
    } else {
      f.more_keys();
    }
  }
};
struct Drawing {
  std::vector<AnyShape> shapes;
  void fields(Fields& f) { f("shapes", shapes, "what is drawn"); }
};

TEST(Schema, KeysMayDependOnAKeyAlreadyRead) {
  const auto c = read_text<Drawing>("shapes: [{radius: 3, method: circle}]\n", "f");
  EXPECT_EQ(dump(c), "shapes:\n  - method: circle\n    radius: 3.0\n");
  const nlohmann::json schema = json_schema(describe(c));
  EXPECT_EQ(schema["properties"]["shapes"]["items"]["additionalProperties"], true);
}

TEST(Schema, AFailedKeyDoesNotMakeItsNeighboursUnknown) {
  try {
    read_text<Drawing>("shapes:\n  - {method: cirle, radius: 3}\n  - radius: 1\n", "f");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "f:2:14: shapes.0.method: unknown shape 'cirle'\n"
                 "f:3:5: shapes.1.method: unknown shape ''");
  }
}

TEST(Schema, AMissingFileIsAUsageError) {
  try {
    load_config<Everything>("/nonexistent/run.yaml");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    EXPECT_NE(std::string(error.what()).find("/nonexistent/run.yaml"), std::string::npos);
  }
  EXPECT_THROW(load_config<Everything>("/"), Error);
}

}  // namespace
}  // namespace graft::configs
