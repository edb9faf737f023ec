// models/io's GGUF reader and writer against PyPI gguf 0.19.0 (tests/golden/gguf_blocks.json), a
// real model (tests/golden/smollm2_gguf.json), and files that lie.
#include <limits>

#include "models/io/gguf_dequantize.h"
#include "models/io/gguf_header.h"
#include "models/io/gguf_source.h"
#include "models/io/gguf_writer.h"
#include "tests/models/io_testing.h"

namespace graft::models::io {
namespace {

/// The metadata and tensors of the golden file, in its order.
const std::vector<std::pair<std::string, GgufValue>> kSmallMetadata = {
    {"general.architecture", std::string("llama")},
    {"k.u8", uint8_t{200}},
    {"k.i8", int8_t{-100}},
    {"k.u16", uint16_t{60000}},
    {"k.i16", int16_t{-30000}},
    {"k.u32", uint32_t{4000000000}},
    {"k.i32", int32_t{-2000000000}},
    {"k.f32", 0.1f},
    {"k.bool", true},
    {"k.string", std::string("h\xc3\xa9llo")},
    {"k.strings", GgufArray(std::vector<std::string>{"a", "", "b c"})},
    {"k.ints", GgufArray(std::vector<int32_t>{1, -2, 3})},
    {"k.floats", GgufArray(std::vector<float>{0.5f, -0.25f})},
    {"k.u64", uint64_t{1} << 63},
    {"k.i64", -(int64_t{1} << 62)},
    {"k.f64", 0.1},
};

std::vector<std::pair<std::string, at::Tensor>> small_tensors() {
  return {{"a.weight", at::arange(6).to(at::kFloat).reshape({2, 3})},
          {"b.weight", at::arange(8).to(at::kHalf).reshape({4, 2})},
          {"c.weight", at::arange(3).to(at::kFloat)}};
}

std::string small_file() { return from_hex(golden("gguf_blocks.json")["file"]); }

GgufHeader parse(const std::string& file) { return parse_gguf_header(as_span(file), "f"); }

void expect_refused_file(const std::string& file, const std::string& words) {
  expect_refused([&] { parse(file); }, words);
}

std::string text(const std::string& value) { return raw<uint64_t>(value.size()) + value; }

/// A file put together by hand, piece by piece.
struct Pieces {
  std::string magic = "GGUF";
  uint32_t version = 3;
  uint64_t num_tensors = 0;
  uint64_t num_values = 0;
  std::string metadata;
  std::string records;
  size_t data_bytes = 0;

  Pieces& value(const std::string& key, uint32_t type, const std::string& bytes) {
    ++num_values;
    metadata += text(key) + raw(type) + bytes;
    return *this;
  }
  Pieces& tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                 uint64_t offset) {
    ++num_tensors;
    records += text(name) + raw<uint32_t>(dims.size());
    for (const uint64_t size : dims) records += raw(size);
    records += raw(type) + raw(offset);
    return *this;
  }
  Pieces& data(size_t bytes) {
    data_bytes = bytes;
    return *this;
  }
  std::string file(size_t alignment = 32) const {
    std::string out =
        magic + raw(version) + raw(num_tensors) + raw(num_values) + metadata + records;
    out.resize((out.size() + alignment - 1) / alignment * alignment);
    return out + std::string(data_bytes, '\0');
  }
};

TEST(GgufDequantize, GivesTheBitsOfTheReferenceForEveryType) {
  const nlohmann::json types = golden("gguf_blocks.json")["types"];
  ASSERT_EQ(types.size(), 10u);
  for (uint32_t id = 1; id <= 30; ++id) {
    const GgmlTypeInfo* type = find_ggml_type(id);
    if (type == nullptr) continue;
    SCOPED_TRACE(type->name);
    const nlohmann::json& expected = types.at(std::string(type->name));
    const std::string blocks = from_hex(expected["blocks"]);
    const auto num_blocks = static_cast<int64_t>(blocks.size()) / type->block_bytes;
    const at::Tensor values = at::empty({num_blocks * type->block_elems});
    dequantize_ggml(type->type, as_span(blocks).data(), num_blocks,
                    values.mutable_data_ptr<float>());
    EXPECT_EQ(bytes_of(values), from_hex(expected["values"]));
  }
}

TEST(GgufDequantize, KeepsInfinityAndNanOfHalves) {
  const std::string halves = raw<uint16_t>(0x7c00) + raw<uint16_t>(0xfc00) + raw<uint16_t>(0x7e00);
  float values[3];
  dequantize_ggml(GgmlType::kF16, as_span(halves).data(), 3, values);
  EXPECT_EQ(values[0], std::numeric_limits<float>::infinity());
  EXPECT_EQ(values[1], -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(values[2]));
}

TEST(GgufWriter, WritesTheBytesOfTheReference) {
  const TestFolder folder;
  const std::string path = folder.path() + "/small.gguf";
  write_gguf(path, kSmallMetadata, small_tensors());
  EXPECT_EQ(read_bytes(path), small_file());
}

TEST(GgufWriter, RefusesWhatItCannotWrite) {
  const TestFolder folder;
  const auto write = [&](const std::string& name, const at::Tensor& tensor) {
    write_gguf(folder.path() + "/a.gguf", {}, {{name, tensor}});
  };
  expect_refused([&] { write("a", at::ones({2}, at::kDouble)); }, "is not written to GGUF",
                 ExitCode::kUsage);
  expect_refused([&] { write("a", at::ones({})); }, "0 dimensions", ExitCode::kUsage);
  expect_refused([&] { write("a", at::ones({1, 1, 1, 1, 1})); }, "5 dimensions", ExitCode::kUsage);
  expect_refused([&] { write(std::string(65, 'a'), at::ones({2})); }, "at most 64",
                 ExitCode::kUsage);
  const auto twice = [&] {
    write_gguf(folder.path() + "/a.gguf", {}, {{"a", at::ones({1})}, {"a", at::ones({1})}});
  };
  expect_refused(twice, "the name is taken", ExitCode::kUsage);
}

TEST(GgufSource, ReadsAFileOfTheReference) {
  const TestFolder folder;
  GgufSource source(folder.write("small.gguf", small_file()));
  EXPECT_EQ(source.metadata().values(),
            GgufMetadata::Map(kSmallMetadata.begin(), kSmallMetadata.end()));
  ASSERT_EQ(source.tensors().size(), 3u);
  for (const auto& [name, expected] : small_tensors()) {
    EXPECT_EQ(source.find(name)->shape, expected.sizes().vec());
    EXPECT_EQ(source.read(name).scalar_type(), expected.scalar_type());
    EXPECT_TRUE(at::equal(source.read(name), expected)) << name;
  }
  EXPECT_EQ(source.find("b.weight")->dtype, "F16");
  EXPECT_FALSE(source.read_four_bit("a.weight").has_value());
  expect_refused([&] { source.read("none"); }, "no tensor 'none'");
}

TEST(GgufSource, ReadsARealModelBitForBit) {
  const char* path = std::getenv("GRAFT_SMOLLM2");
  if (path == nullptr)
    GTEST_SKIP() << "GRAFT_SMOLLM2 is not set: the path of SmolLM2-135M-Instruct.Q4_1.gguf";
  const nlohmann::json expected = golden("smollm2_gguf.json");
  GgufSource source(path);
  EXPECT_EQ(source.tensors().size(), expected["file"]["tensors"].get<size_t>());
  const std::string file = read_bytes(path);
  const GgufHeader header = parse(file);
  ASSERT_EQ(expected["dequantised"].size(), 6u);
  for (const auto& [name, numbers] : expected["dequantised"].items()) {
    SCOPED_TRACE(name);
    const SourceTensor* listed = source.find(name);
    ASSERT_NE(listed, nullptr);
    EXPECT_EQ(listed->dtype, numbers["type"]);
    const auto dims = numbers["gguf_dims"].get<std::vector<int64_t>>();
    EXPECT_EQ(listed->shape, std::vector<int64_t>(dims.rbegin(), dims.rend()));
    for (const GgufTensor& tensor : header.tensors) {
      if (tensor.name != name) continue;
      const std::string_view stored = std::string_view(file).substr(tensor.offset, tensor.bytes);
      EXPECT_EQ(crc32(stored), numbers["raw_crc32"].get<uint32_t>());
    }
    EXPECT_EQ(crc32(bytes_of(source.read(name))), numbers["dequant_f32_crc32"].get<uint32_t>());
  }
}

TEST(GgufSource, ReadsTheMetadataOfARealModel) {
  const char* path = std::getenv("GRAFT_SMOLLM2");
  if (path == nullptr)
    GTEST_SKIP() << "GRAFT_SMOLLM2 is not set: the path of SmolLM2-135M-Instruct.Q4_1.gguf";
  const nlohmann::json expected = golden("smollm2_gguf.json");
  const GgufSource source(path);
  const GgufMetadata& metadata = source.metadata();
  for (const auto& [key, value] : expected["metadata"].items()) {
    SCOPED_TRACE(key);
    if (value.is_boolean()) {
      EXPECT_EQ(metadata.get_bool(key), value.get<bool>());
    } else if (value.is_number_integer()) {
      EXPECT_EQ(metadata.get_int(key), value.get<int64_t>());
    } else if (value.is_number()) {
      EXPECT_EQ(metadata.get_float(key), value.get<double>());
    } else if (value.is_string()) {
      EXPECT_EQ(metadata.get_string(key), value.get<std::string>());
    } else {
      EXPECT_EQ(metadata.get_strings(key), value.get<std::vector<std::string>>());
    }
  }
  EXPECT_EQ(metadata.get_strings("tokenizer.ggml.tokens").size(),
            expected["file"]["vocab"].get<size_t>());
  EXPECT_EQ(metadata.get_strings("tokenizer.ggml.merges").size(),
            expected["file"]["merges"].get<size_t>());
  EXPECT_EQ(metadata.get_ints("tokenizer.ggml.token_type")[16], 3);
}

TEST(GgufMetadata, TakesIntegersOfAnyWidthAndNothingElse) {
  const GgufMetadata metadata("f", GgufMetadata::Map(kSmallMetadata.begin(), kSmallMetadata.end()));
  EXPECT_EQ(metadata.get_int("k.u8"), 200);
  EXPECT_EQ(metadata.get_int("k.i16"), -30000);
  EXPECT_EQ(metadata.get_int("k.u32"), 4000000000);
  EXPECT_EQ(metadata.get_int("k.i64"), -(int64_t{1} << 62));
  EXPECT_EQ(metadata.get_float("k.f32"), 0.1f);
  EXPECT_EQ(metadata.get_float("k.f64"), 0.1);
  EXPECT_EQ(metadata.get_ints("k.ints"), (std::vector<int64_t>{1, -2, 3}));
  EXPECT_EQ(metadata.get_floats("k.floats"), (std::vector<float>{0.5f, -0.25f}));
  expect_refused([&] { metadata.get_int("k.u64"); }, "'k.u64' = 9223372036854775808 is too large");
  expect_refused([&] { metadata.get_int("k.bool"); }, "not an integer");
  expect_refused([&] { metadata.get_int("k.f32"); }, "not an integer");
  expect_refused([&] { metadata.get_float("k.u8"); }, "not a number with a fraction");
  expect_refused([&] { metadata.get_string("k.strings"); }, "not a string");
  expect_refused([&] { metadata.get_strings("k.string"); }, "not a list of strings");
  expect_refused([&] { metadata.get_strings("k.ints"); }, "not a list of strings");
  expect_refused([&] { metadata.get_ints("k.strings"); }, "not a list of integers");
  expect_refused([&] { metadata.get_int("none"); }, "f: metadata 'none' is missing");
}

TEST(GgufHeader, ReadsVersionsTwoAndThree) {
  Pieces pieces;
  EXPECT_EQ(parse(pieces.file()).version, 3u);
  pieces.version = 2;
  EXPECT_EQ(parse(pieces.file()).version, 2u);
  for (const uint32_t version : {0u, 1u, 4u, 0x03000000u}) {
    pieces.version = version;
    expect_refused_file(pieces.file(), "is not supported");
  }
  pieces.magic = "GGML";
  expect_refused_file(pieces.file(), "not a GGUF file");
}

TEST(GgufHeader, RefusesCountsThatLie) {
  Pieces pieces;
  pieces.num_tensors = UINT64_MAX;
  expect_refused_file(pieces.file(), "more than 100000");
  pieces.num_tensors = 1;
  expect_refused_file(pieces.file(24), "passes the end");
  pieces.num_tensors = 0;
  pieces.num_values = 1;
  expect_refused_file(pieces.file(24), "passes the end");
}

TEST(GgufHeader, RefusesLengthsThatLie) {
  for (const uint64_t length : {uint64_t{1000}, uint64_t{1} << 32, UINT64_MAX, UINT64_MAX - 8}) {
    expect_refused_file(Pieces().value("k", 8, raw(length)).file(), "passes the end");
    expect_refused_file(Pieces().value("k", 9, raw<uint32_t>(8) + raw(length)).file(),
                        "passes the end");
    expect_refused_file(Pieces().value("k", 9, raw<uint32_t>(12) + raw(length)).file(),
                        "passes the end");
  }
}

TEST(GgufHeader, RefusesValuesOfNoType) {
  expect_refused_file(Pieces().value("k", 13, "").file(), "unknown metadata type 13");
  expect_refused_file(Pieces().value("k", 9, raw<uint32_t>(13) + raw<uint64_t>(0)).file(),
                      "unknown metadata type 13");
  expect_refused_file(Pieces().value("k", 9, raw<uint32_t>(9) + raw<uint64_t>(0)).file(),
                      "list of lists");
  EXPECT_TRUE(parse(Pieces().value("k", 7, "\x01").file()).metadata.get_bool("k"));
  expect_refused_file(Pieces().value("k", 7, "\x02").file(), "a bool holds 2");
  expect_refused_file(Pieces().value("k", 9, raw<uint32_t>(7) + raw<uint64_t>(1) + "\x02").file(),
                      "a bool holds 2");
}

TEST(GgufHeader, RefusesNamesGivenTwice) {
  expect_refused_file(Pieces().value("k", 0, "a").value("k", 0, "b").file(),
                      "duplicate metadata key 'k'");
  expect_refused_file(Pieces().tensor("a", {8}, 0, 0).tensor("a", {8}, 0, 32).data(64).file(),
                      "'a' appears twice");
}

TEST(GgufHeader, RefusesBadAlignments) {
  const auto aligned = [](uint32_t type, const std::string& bytes) {
    return Pieces().value("general.alignment", type, bytes).tensor("a", {1}, 0, 0).data(4).file(64);
  };
  EXPECT_EQ(parse(aligned(4, raw<uint32_t>(64))).tensors[0].offset % 64, 0u);
  for (const uint32_t bad : {0u, 1u, 4u, 24u, 33u}) {
    expect_refused_file(aligned(4, raw(bad)), "general.alignment must be a u32 power of two");
  }
  expect_refused_file(aligned(10, raw<uint64_t>(64)), "general.alignment must be");
  expect_refused_file(aligned(6, raw<float>(64)), "general.alignment must be");
  expect_refused_file(aligned(4, raw<uint32_t>(1u << 31)), "past the end");
}

TEST(GgufHeader, RefusesTensorsOfNoShape) {
  const auto with = [](const std::vector<uint64_t>& dims, uint32_t type = 0) {
    return Pieces().tensor("a", dims, type, 0).data(4096).file();
  };
  EXPECT_EQ(parse(with({4, 3, 2, 1})).tensors[0].shape, (std::vector<int64_t>{1, 2, 3, 4}));
  expect_refused_file(with({}), "0 dimensions");
  expect_refused_file(with({1, 1, 1, 1, 1}), "5 dimensions");
  expect_refused_file(with({0}), "dimension 0 is 0");
  expect_refused_file(with({4, UINT64_MAX}), "dimension 1 is -1");
  expect_refused_file(with({uint64_t{1} << 32, uint64_t{1} << 32}), "overflows");
  expect_refused_file(with({uint64_t{1} << 61, 2}), "overflows");
  expect_refused_file(with({31}, 3), "rows of 31 are not whole blocks of 32 (Q4_1)");
  expect_refused_file(with({128}, 14), "not whole blocks of 256 (Q6_K)");
  expect_refused_file(with({256}, 10), "ggml type 10 is not supported");
  expect_refused_file(with({256}, 4), "ggml type 4 is not supported");
  expect_refused_file(with({256}, UINT32_MAX), "is not supported");
  expect_refused_file(Pieces().tensor(std::string(65, 'a'), {1}, 0, 0).data(4).file(),
                      "a tensor name of 65 bytes");
  expect_refused_file(Pieces().tensor("", {1}, 0, 0).data(4).file(), "a tensor name of 0 bytes");
}

TEST(GgufHeader, RefusesTensorsOutOfPlace) {
  const auto two = [](uint64_t first, uint64_t second, size_t data_bytes) {
    return Pieces().tensor("a", {9}, 0, first).tensor("b", {8}, 0, second).data(data_bytes).file();
  };
  EXPECT_EQ(parse(two(0, 64, 96)).tensors[1].bytes, 32u);
  expect_refused_file(two(0, 64, 95), "past the end");
  expect_refused_file(two(0, 32, 96), "the one before it ends at 64");
  expect_refused_file(two(0, 36, 96), "the one before it ends at 64");
  expect_refused_file(two(0, 0, 96), "the one before it ends at 64");
  expect_refused_file(two(0, 96, 128), "the one before it ends at 64");
  expect_refused_file(two(0, UINT64_MAX - 31, 96), "the one before it ends at 64");
  expect_refused_file(two(32, 64, 96), "the one before it ends at 0");
}

TEST(GgufSource, SurvivesDamageAnywhere) {
  const TestFolder folder;
  const int refused = count_refusals(small_file(), [&](const std::string& bytes) {
    GgufSource source(folder.write("a.gguf", bytes));
    for (const SourceTensor& tensor : source.tensors()) source.read(tensor.name);
  });
  EXPECT_GT(refused, 250);
}

TEST(GgufSource, RefusesToReadWhatWasCutOffSinceItWasOpened) {
  const TestFolder folder;
  const std::string path = folder.path() + "/a.gguf";
  write_gguf(path, {}, {{"a.weight", at::ones({1 << 20})}});
  GgufSource source(path);
  std::filesystem::resize_file(path, 1 << 20);
  expect_refused([&] { source.read("a.weight"); }, path + ": ends at byte 1048576");
}

}  // namespace
}  // namespace graft::models::io
