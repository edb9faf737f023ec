// models/io/safetensors against bytes of the safetensors library 0.8.0, and against files that lie.
#include "models/io/safetensors.h"

#include <sys/stat.h>
#include <unistd.h>

#include <iterator>

#include "models/io/safetensors_header.h"
#include "tests/models/io_testing.h"

namespace graft::models::io {
namespace {

/// A file with this header, padded as the library does, and so many bytes of data.
std::string file_with(std::string header, size_t data_bytes) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return raw<uint64_t>(header.size()) + header + std::string(data_bytes, '\x01');
}

std::string one_tensor(const std::string& dtype, const std::string& shape,
                       const std::string& offsets) {
  return R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

SafetensorsHeader parse(const std::string& file) {
  return parse_safetensors_header(as_span(file), "f");
}

void expect_refused_file(const std::string& file, const std::string& words) {
  expect_refused([&] { parse(file); }, words);
}

NamedTensors one_of_each() {
  const auto range = [](int64_t size, at::ScalarType dtype) { return at::arange(size).to(dtype); };
  return {{"z.f32", range(3, at::kFloat)},
          {"a.f32", range(2, at::kFloat).reshape({2, 1})},
          {"i32", range(2, at::kInt)},
          {"i64", range(1, at::kLong)},
          {"f64", range(1, at::kDouble)},
          {"f16", range(5, at::kHalf)},
          {"bf16", range(3, at::kBFloat16)},
          {"u8", range(3, at::kByte)},
          {"i8", range(2, at::kChar)},
          {"i16", range(2, at::kShort)},
          {"bool", at::tensor({1, 0}).to(at::kBool)},
          {"scalar", at::full({}, 7.0f)},
          {"empty", at::zeros({0, 4})},
          {"q\"\\\n\xc3\xa9", range(1, at::kFloat)},
          {"f8", range(3, at::kFloat).to(at::kFloat8_e4m3fn)}};
}

std::string written(const NamedTensors& tensors, const SafetensorsMetadata& metadata) {
  std::string bytes;
  write_safetensors(
      [&](auto part) { bytes.append(reinterpret_cast<const char*>(part.data()), part.size()); },
      tensors, metadata);
  return bytes;
}

TEST(SafetensorsWriter, WritesTheBytesOfTheReferenceLibrary) {
  // safetensors.torch.save of the same tensors, with and without metadata.
  const std::string with = written(one_of_each(), {{"format", "pt"}});
  EXPECT_EQ(with.size(), 1002u);
  EXPECT_EQ(crc32(with), 143438847u);
  const std::string without = written(one_of_each(), {});
  EXPECT_EQ(without.size(), 970u);
  EXPECT_EQ(crc32(without), 976193458u);
}

TEST(SafetensorsWriter, DoesNotDependOnOrderOrStrides) {
  NamedTensors tensors = one_of_each();
  const std::string expected = written(tensors, {});
  std::reverse(tensors.begin(), tensors.end());
  for (auto& [name, tensor] : tensors) {
    if (tensor.dim() == 1) tensor = at::stack({tensor, tensor}, 1).select(1, 0);
  }
  EXPECT_EQ(written(tensors, {}), expected);
}

TEST(SafetensorsWriter, RefusesWhatTheFormatCannotHold) {
  const at::Tensor one = at::ones({1});
  expect_refused(
      [&] {
        written({{"a", one}, {"a", one.to(at::kInt)}}, {});
      },
      "'a': the name is taken", ExitCode::kUsage);
  expect_refused(
      [&] {
        written({{"__metadata__", one}}, {});
      },
      "the name is taken", ExitCode::kUsage);
  expect_refused(
      [&] {
        written({{"a", one.to(at::kComplexDouble)}}, {});
      },
      "cannot be written", ExitCode::kUsage);
}

TEST(SafetensorsWriter, LeavesTheOldFileWhenItFails) {
  const TestFolder folder;
  const std::string path = folder.write("a.safetensors", "old");
  const at::Tensor one = at::ones({1});
  expect_refused(
      [&] {
        write_safetensors(path, {{"a", one}, {"a", one}}, {});
      },
      "taken", ExitCode::kUsage);
  const auto half_written = [](const ByteSink& sink) {
    sink(as_span("new"));
    throw Error(ExitCode::kData, "interrupted");
  };
  expect_refused([&] { write_file(path, half_written); }, "interrupted");
  EXPECT_EQ(read_bytes(path), "old");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
  expect_refused(
      [&] {
        write_safetensors(folder.path() + "/none/a", {{"a", one}}, {});
      },
      "cannot write");
}

TEST(WriteFile, NoDeviceAndNoPipeGivesWayToAFile) {
  const TestFolder folder;
  const std::string pipe = folder.path() + "/pipe", link = folder.path() + "/link";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  std::filesystem::create_symlink("/dev/null", link);
  const auto nothing = [](const ByteSink&) {};
  for (const std::string& path : {pipe, link, folder.path()})
    expect_refused([&] { write_file(path, nothing); }, path + ": cannot write: it is no regular");
  EXPECT_TRUE(std::filesystem::is_fifo(pipe));
  EXPECT_TRUE(std::filesystem::is_symlink(link));
}

TEST(WriteFile, FilesAndLinksBesideItStayWhatTheyAre) {
  const TestFolder folder;
  const std::string path = folder.path() + "/a", victim = folder.write("victim", "precious");
  const std::string own = "." + std::to_string(::getpid()) + ".partial";
  std::filesystem::create_symlink(victim, path + ".partial");
  std::filesystem::create_symlink(victim, path + own);
  write_file(path, [](const ByteSink& sink) { sink(as_span("new")); });
  EXPECT_EQ(read_bytes(victim), "precious");
  EXPECT_EQ(read_bytes(path), "new");
  EXPECT_TRUE(std::filesystem::is_symlink(path + own));
}

TEST(SafetensorsFile, ReadsBackEveryDtype) {
  const TestFolder folder;
  const std::string path = folder.path() + "/a.safetensors";
  write_safetensors(path, one_of_each(), {{"format", "pt"}});
  const SafetensorsFile file(path);
  EXPECT_EQ(file.metadata(), (SafetensorsMetadata{{"format", "pt"}}));
  EXPECT_EQ(file.entries().size(), one_of_each().size());
  for (const auto& [name, tensor] : one_of_each()) {
    const at::Tensor read = file.read(name);
    EXPECT_EQ(read.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(read.sizes(), tensor.sizes()) << name;
    EXPECT_EQ(bytes_of(read), bytes_of(tensor)) << name;
  }
  expect_refused([&] { file.read("none"); }, "no tensor 'none'");
}

TEST(SafetensorsFile, RefusesToReadWhatWasCutOffSinceItWasOpened) {
  const TestFolder folder;
  const std::string path = folder.path() + "/a.safetensors";
  write_safetensors(path, {{"a", at::ones({1 << 20})}}, {});
  const SafetensorsFile file(path);
  std::filesystem::resize_file(path, 1 << 20);
  expect_refused([&] { file.read("a"); }, path + ": ends at byte 1048576");
}

TEST(SafetensorsFile, RefusesBoolsThatAreNeither) {
  const TestFolder folder;
  std::string bytes = file_with(one_tensor("\"BOOL\"", "[2]", "[0,2]"), 2);
  EXPECT_TRUE(SafetensorsFile(folder.write("good", bytes)).read("a").all().item<bool>());
  bytes.back() = 2;
  const SafetensorsFile file(folder.write("bad", bytes));
  expect_refused([&] { file.read("a"); }, "bools other than 0 and 1");
}

TEST(SafetensorsHeader, RefusesALengthThatLies) {
  expect_refused_file("1234567", "too short");
  expect_refused_file(raw<uint64_t>(3) + "{}", "claims 3 bytes");
  expect_refused_file(raw<uint64_t>(UINT64_MAX) + "{}", "claims");
  expect_refused_file(raw<uint64_t>(UINT64_MAX - 7) + "{}", "claims");
  expect_refused_file(raw<uint64_t>(100'000'001) + std::string(100'000'001, ' '),
                      "limit 100000000");
}

TEST(SafetensorsHeader, RefusesOtherJson) {
  expect_refused_file(file_with("[]", 0), "must start with '{'");
  expect_refused_file(file_with(" {}", 0), "must start with '{'");
  expect_refused_file(file_with(R"({"a":1})", 0), "exactly dtype, shape and data_offsets");
  expect_refused_file(
      file_with(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":0}})", 1), "exactly");
  expect_refused_file(file_with(R"({"a":{"dtype":"U8","shape":[1],"offsets":[0,1]}})", 1),
                      "missing");
  expect_refused_file(file_with(R"({"__metadata__":{"a":1}})", 0), "must be a string");
  expect_refused_file(file_with(R"({"__metadata__":[]})", 0), "must be an object");
  const std::string a = R"("a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  expect_refused_file(file_with("{" + a + "," + a + "}", 0), "duplicate JSON key 'a'");
}

TEST(SafetensorsHeader, RefusesNumbersThatAreNotSizes) {
  for (const char* shape : {"[-1]", "[1.0]", "[1e0]", "[\"1\"]", "[null]", "[[1]]", "[-0]"}) {
    expect_refused_file(file_with(one_tensor("\"U8\"", shape, "[0,1]"), 1), "non-negative integer");
  }
  expect_refused_file(file_with(one_tensor("\"U8\"", "[9223372036854775808]", "[0,1]"), 1),
                      "too large");
  expect_refused_file(file_with(one_tensor("\"U8\"", "[1]", "[0,1,2]"), 1), "list of two");
  expect_refused_file(file_with(one_tensor("\"U8\"", "1", "[0,1]"), 1), "shape a list");
}

TEST(SafetensorsHeader, RefusesShapesThatOverflow) {
  // 2^32 x 2^32 elements wrap to 0 bytes, 2^62 + 1 floats to 4.
  expect_refused_file(file_with(one_tensor("\"U8\"", "[4294967296,4294967296]", "[0,0]"), 0),
                      "overflows");
  expect_refused_file(file_with(one_tensor("\"F32\"", "[4611686018427387905]", "[0,4]"), 4),
                      "overflows");
  // An empty tensor's strides are products of its other sizes.
  expect_refused_file(file_with(one_tensor("\"F32\"", "[0,4611686018427387904,4]", "[0,0]"), 0),
                      "overflows");
  expect_refused_file(file_with(one_tensor("\"F32\"", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4),
                      "9 dimensions");
}

TEST(SafetensorsHeader, RefusesRangesThatDisagree) {
  expect_refused_file(file_with(one_tensor("\"F31\"", "[1]", "[0,4]"), 4),
                      "dtype 'F31' is not supported");
  expect_refused_file(file_with(one_tensor("\"F32\"", "[2]", "[0,4]"), 4), "take 8 bytes");
  expect_refused_file(file_with(one_tensor("\"U8\"", "[1]", "[1,0]"), 1), "backwards");
  expect_refused_file(file_with(one_tensor("\"U8\"", "[4]", "[0,4]"), 3), "past the end");
  expect_refused_file(file_with(one_tensor("\"U8\"", "[4]", "[0,4]"), 5),
                      "1 bytes at the end belong to no tensor");
  expect_refused_file(file_with(one_tensor("\"U8\"", "[3]", "[1,4]"), 4), "leaves a hole");
}

TEST(SafetensorsHeader, RefusesOverlaps) {
  const auto two = [](const char* first, const char* second) {
    return std::string(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)") + first +
           R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + second + "}}";
  };
  EXPECT_EQ(parse(file_with(two("[0,4]", "[4,8]"), 8)).entries.size(), 2u);
  expect_refused_file(file_with(two("[0,4]", "[3,7]"), 7), "overlaps");
  expect_refused_file(file_with(two("[0,4]", "[0,4]"), 4), "overlaps");
  expect_refused_file(file_with(two("[0,4]", "[5,9]"), 9), "hole");
}

TEST(SafetensorsHeader, RefusesTooManyTensors) {
  std::string header = "{";
  for (int i = 0; i <= 100'000; ++i) {
    header += (i > 0 ? ",\"" : "\"") + std::to_string(i) +
              R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  }
  expect_refused_file(file_with(header + "}", 0), "100001 tensors");
}

TEST(SafetensorsHeader, SurvivesDamageAnywhere) {
  const std::string file = written(one_of_each(), {{"format", "pt"}});
  // The header is 85 % of the file; some of its bytes (names, padding) may take other values.
  EXPECT_GT(count_refusals(file, parse), static_cast<int>(file.size()));
}

TEST(SafetensorsIndex, ListsTheFileOfEachTensor) {
  const auto files = parse_safetensors_index(
      R"({"metadata":{"total_size":9},"weight_map":{"a":"x.safetensors","b":"y.safetensors"}})",
      "f");
  EXPECT_EQ(files.at("b"), "y.safetensors");
}

TEST(SafetensorsIndex, RefusesNamesThatLeaveTheFolder) {
  for (const char* name : {"../x.safetensors", "/x.safetensors", "a/x.safetensors",
                           "a\\\\x.safetensors", "x\\u0000.safetensors", "x.bin", "..", ""}) {
    const std::string text = R"({"weight_map":{"a":")" + std::string(name) + "\"}}";
    expect_refused([&] { parse_safetensors_index(text, "f"); }, "in the same folder");
  }
  expect_refused([] { parse_safetensors_index(R"({"weight_map":{"a":1}})", "f"); },
                 "must name a file");
  expect_refused([] { parse_safetensors_index(R"({"weight_map":{}})", "f"); }, "weight_map");
  expect_refused([] { parse_safetensors_index("{}", "f"); }, "'weight_map' is missing");
}

}  // namespace
}  // namespace graft::models::io
