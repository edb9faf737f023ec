// models/io/json_file and mapped_file: what is refused before any format is parsed.
#include <sys/stat.h>

#include "models/io/json_file.h"
#include "models/io/mapped_file.h"
#include "tests/models/io_testing.h"

namespace graft::models::io {
namespace {

TEST(Json, ReadsAConfig) {
  const TestFolder folder;
  const auto config =
      read_json_file(folder.write("config.json", R"({"a": {"x": 1}, "b": [{"x": 2}, {"x": 3}]})"));
  EXPECT_EQ(config["b"][1]["x"], 3);
}

TEST(Json, RefusesDuplicateKeysAtAnyLevel) {
  expect_refused([] { parse_json(R"({"a": 1, "a": 2})", "f"); }, "f: duplicate JSON key 'a'");
  expect_refused([] { parse_json(R"([{"b": {"a": 1, "c": {}, "a": 2}}])", "f"); },
                 "duplicate JSON key 'a'");
}

TEST(Json, RefusesDeepNesting) {
  const auto nested = [](size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  EXPECT_TRUE(parse_json(nested(64), "f").is_array());
  expect_refused([&] { parse_json(nested(65), "f"); }, "levels deep");
  expect_refused([&] { parse_json(std::string(10'000'000, '['), "f"); }, "levels deep");
}

TEST(Json, RefusesGiantValueCounts) {
  std::string text = "[0";
  for (int i = 0; i < 4'000'000; ++i) text += ",0";
  expect_refused([&] { parse_json(text + "]", "f"); }, "JSON values");
}

TEST(Json, RefusesWhatIsNotOneValueOfUtf8) {
  for (const char* text :
       {"", "{", "{} {}", "[1,]", "[NaN]", "[1e999]", "\"\xff\"", "\"\xc0\xaf\"", "{1: 2}"}) {
    expect_refused([&] { parse_json(text, "f"); }, "f: not valid JSON");
  }
}

TEST(Json, RefusesAFileOverTheLimit) {
  const TestFolder folder;
  const std::string path = folder.write("config.json", "[1, 2, 3]");
  EXPECT_EQ(read_json_file(path, 9).size(), 3u);
  expect_refused([&] { read_json_file(path, 8); }, "more than the 8 allowed");
}

TEST(MappedFile, ChecksEveryRead) {
  const TestFolder folder;
  const MappedFile file(folder.write("f", "abcdef"));
  const auto read = [&](uint64_t offset, size_t size) {
    std::string out(size, '?');
    file.read(offset, std::as_writable_bytes(std::span(out)));
    return out;
  };
  EXPECT_EQ(read(2, 4), "cdef");
  EXPECT_EQ(read(6, 0), "");
  expect_refused([&] { read(2, 5); }, "past the end");
  expect_refused([&] { read(7, 0); }, "past the end");
  expect_refused([&] { read(UINT64_MAX, 1); }, "past the end");
}

TEST(MappedFile, OpensAnEmptyFile) {
  const TestFolder folder;
  EXPECT_TRUE(MappedFile(folder.write("f", "")).bytes().empty());
}

TEST(MappedFile, RefusesWhatIsNotARegularFile) {
  const TestFolder folder;
  const std::string pipe = folder.path() + "/pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  expect_refused([&] { MappedFile file(pipe); }, "not a regular file");
  expect_refused([&] { MappedFile file("/dev/zero"); }, "not a regular file");
  expect_refused([&] { MappedFile file(folder.path()); }, "not a regular file");
  expect_refused([&] { MappedFile file(folder.path() + "/none"); }, "No such file");
}

TEST(PlainFileName, IsOneComponentOfAPath) {
  EXPECT_TRUE(is_plain_file_name("model-00001-of-00002.safetensors"));
  EXPECT_TRUE(is_plain_file_name("..a"));
  for (const std::string& name :
       {std::string(), std::string("."), std::string(".."), std::string("../a"),
        std::string("/etc/passwd"), std::string("a/b"), std::string("a\\b"),
        std::string("a\0b", 3)}) {
    EXPECT_FALSE(is_plain_file_name(name)) << name;
  }
}

}  // namespace
}  // namespace graft::models::io
