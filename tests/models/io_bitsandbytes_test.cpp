// models/io/bitsandbytes against files and matrices of bitsandbytes 0.50.2
// (tests/golden/bnb_files.json).
#include "models/io/bitsandbytes.h"

#include "models/io/safetensors_source.h"
#include "tests/models/io_testing.h"

namespace graft::models::io {
namespace {

constexpr const char* kState = "up.weight.quant_state.bitsandbytes__nf4";
constexpr const char* kPlain =
    R"({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 64]})";

QuantState parse(const std::string& text) { return parse_quant_state(text, kState, "f"); }

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  return text.replace(text.find(from), from.size(), to);
}

at::Tensor text_tensor(const std::string& text) {
  at::Tensor tensor = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
  std::copy(text.begin(), text.end(), tensor.mutable_data_ptr<uint8_t>());
  return tensor;
}

/// The tensors of the golden's first case, which is nested, to be damaged.
std::map<std::string, at::Tensor> nested_parts(const TestFolder& folder) {
  const SafetensorsFile file(
      folder.write("golden.safetensors", from_hex(golden("bnb_files.json")["cases"][0]["file"])));
  std::map<std::string, at::Tensor> parts;
  for (const auto& entry : file.entries()) parts[entry.name] = file.read(entry.name);
  return parts;
}

SafetensorsSource open(const TestFolder& folder, const std::map<std::string, at::Tensor>& parts) {
  const std::string path = folder.path() + "/damaged.safetensors";
  write_safetensors(path, NamedTensors(parts.begin(), parts.end()), {});
  return SafetensorsSource(path);
}

TEST(BitsAndBytes, ReadsTheMatricesOfTheReference) {
  const TestFolder folder;
  const nlohmann::json cases = golden("bnb_files.json")["cases"];
  ASSERT_EQ(cases.size(), 3u);
  for (const auto& c : cases) {
    SCOPED_TRACE(c["name"]);
    SafetensorsSource source(folder.write("model.safetensors", from_hex(c["file"])));
    ASSERT_EQ(source.tensors().size(), 1u);
    const SourceTensor& listed = *source.find("up.weight");
    EXPECT_EQ(listed.shape, c["shape"].get<std::vector<int64_t>>());
    EXPECT_EQ(listed.dtype, c["quant_type"]);
    const at::Tensor dense = source.read("up.weight");
    EXPECT_EQ(dense.dtype().name(), at::empty({}, c["dtype"] == "float32"    ? at::kFloat
                                                  : c["dtype"] == "bfloat16" ? at::kBFloat16
                                                                             : at::kHalf)
                                        .dtype()
                                        .name());
    EXPECT_EQ(dense.sizes(), listed.shape);
    EXPECT_EQ(bytes_of(dense), from_hex(c["dense"]));
    const FourBit codes = *source.read_four_bit("up.weight");
    EXPECT_EQ(codes.nested(), c["nested"].get<bool>());
    EXPECT_EQ(codes.codes.numel(), dense.numel() / 2);
    EXPECT_EQ(bytes_of(dequantize(codes, dense.scalar_type())), from_hex(c["dense"]));
  }
}

TEST(BitsAndBytes, CountsTheBytesOfAllParts) {
  const TestFolder folder;
  const SafetensorsSource source = open(folder, nested_parts(folder));
  EXPECT_EQ(source.find("up.weight")->file_bytes, 192 + 6 + 16 * 4 + 4 + 256 * 4);
}

TEST(BitsAndBytes, AcceptsASecondLevelInBfloat16) {
  const TestFolder folder;
  auto parts = nested_parts(folder);
  SafetensorsSource reference = open(folder, parts);
  const FourBit expected = *reference.read_four_bit("up.weight");
  parts["up.weight.nested_absmax"] = parts["up.weight.nested_absmax"].to(at::kBFloat16);
  SafetensorsSource source = open(folder, parts);
  const FourBit codes = *source.read_four_bit("up.weight");
  EXPECT_EQ(codes.nested_absmax.scalar_type(), at::kFloat);
  EXPECT_TRUE(
      at::equal(codes.nested_absmax, expected.nested_absmax.to(at::kBFloat16).to(at::kFloat)));
}

TEST(BitsAndBytes, LeavesOtherTensorsDense) {
  const TestFolder folder;
  auto parts = nested_parts(folder);
  parts["norm.weight"] = at::ones({3});
  SafetensorsSource source = open(folder, parts);
  EXPECT_EQ(source.tensors().size(), 2u);
  EXPECT_FALSE(source.read_four_bit("norm.weight").has_value());
  EXPECT_TRUE(at::equal(source.read("norm.weight"), at::ones({3})));
  expect_refused([&] { source.read("up.weight.absmax"); }, "no tensor");
}

TEST(BitsAndBytes, RefusesPartsThatDoNotFit) {
  const TestFolder folder;
  const auto damaged = [&](const std::string& part, const at::Tensor& tensor,
                           const std::string& words) {
    auto parts = nested_parts(folder);
    parts["up.weight" + part] = tensor;
    SafetensorsSource source = open(folder, parts);
    expect_refused([&] { source.read_four_bit("up.weight"); }, words);
    expect_refused([&] { source.read("up.weight"); }, words);
  };
  damaged(".absmax", at::zeros({1, 6}, at::kByte), "two-dimensional absmax");
  damaged(".absmax", at::zeros({5}, at::kByte), "expected [6]");
  damaged(".absmax", at::zeros({6}), "is not one bitsandbytes writes");
  damaged(".nested_absmax", at::zeros({2}), "expected [1]");
  damaged(".nested_quant_map", at::zeros({255}), "expected [256]");
  damaged(".quant_map", at::linspace(-1, 1, 16), "quant_map");
  damaged("", at::zeros({191, 1}, at::kByte), "191 bytes of codes, expected 192");
}

TEST(BitsAndBytes, RefusesAMatrixWithAPartMissing) {
  const TestFolder folder;
  for (const char* part : {"", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"}) {
    auto parts = nested_parts(folder);
    parts.erase(std::string("up.weight") + part);
    expect_refused([&] { open(folder, parts); }, "which is missing");
  }
}

TEST(BitsAndBytes, RefusesTwoStatesOfOneMatrix) {
  const TestFolder folder;
  auto parts = nested_parts(folder);
  parts["up.weight.quant_state.bitsandbytes__fp4"] = text_tensor(
      R"({"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [6, 64]})");
  expect_refused([&] { open(folder, parts); }, "a second quantisation state");
}

TEST(QuantState, ReadsTheJsonOfTheReference) {
  const QuantState state = parse(
      R"({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128],)"
      R"( "nested_blocksize": 256, "nested_dtype": "bfloat16", "nested_offset": 0.05335426330566406})");
  EXPECT_EQ(state.shape, (std::vector<int64_t>{64, 128}));
  EXPECT_EQ(state.dtype, at::kBFloat16);
  EXPECT_TRUE(state.nested);
  EXPECT_EQ(state.nested_offset, 0.05335426330566406f);
  EXPECT_FALSE(parse(kPlain).nested);
}

TEST(QuantState, RefusesWhatItDoesNotUnderstand) {
  expect_refused([] { parse(replaced(kPlain, "}", ", \"zero\": 1}")); }, "unknown key 'zero'");
  expect_refused([] { parse(replaced(kPlain, "64,", "128,")); },
                 "blocksize 128 is not supported (64 is)");
  expect_refused([] { parse(replaced(kPlain, "\"nf4\"", "\"fp4\"")); },
                 "disagrees with the tensor's name");
  expect_refused([] { parse(replaced(kPlain, "float32", "float64")); }, "dtype \"float64\"");
  expect_refused([] { parse(replaced(kPlain, "\"float32\"", "7")); }, "dtype 7");
  for (const char* shape : {"[4]", "[4, 64, 1]", "7", "{}"}) {
    expect_refused([&] { parse(replaced(kPlain, "[4, 64]", shape)); }, "expected [out, in]");
  }
  for (const char* shape : {"[0, 64]", "[-4, 64]", "[4.0, 64]", "[4, 4294967296]"}) {
    expect_refused([&] { parse(replaced(kPlain, "[4, 64]", shape)); }, "out of range");
  }
  expect_refused([] { parse("[]"); }, "expected a JSON object");
  expect_refused([] { parse(""); }, "not valid JSON");
  expect_refused([] { parse_quant_state(kPlain, "up.weight.quant_state.bitsandbytes__int8", "f"); },
                 "'int8' is not supported");
}

TEST(QuantState, RefusesHalfANestedState) {
  const std::string nested =
      replaced(kPlain, "}",
               R"(, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5})");
  EXPECT_TRUE(parse(nested).nested);
  expect_refused([&] { parse(replaced(nested, R"(, "nested_offset": 0.5)", "")); }, "but not all");
  expect_refused([&] { parse(replaced(nested, R"( "nested_dtype": "float32",)", "")); },
                 "but not all");
  expect_refused([&] { parse(replaced(nested, "256", "128")); },
                 "nested_blocksize 128 is not supported");
  expect_refused([&] { parse(replaced(nested, "0.5", "\"0.5\"")); }, "must be a number");
  expect_refused([&] { parse(replaced(nested, "0.5", "1e300")); }, "too large");
  expect_refused([&] { parse(replaced(nested, R"(_dtype": "float32")", R"(_dtype": "int8")")); },
                 "nested_dtype");
}

TEST(BitsAndBytes, SurvivesDamageAnywhere) {
  const TestFolder folder;
  const std::string file = from_hex(golden("bnb_files.json")["cases"][1]["file"]);
  const int refused = count_refusals(file, [&](const std::string& bytes) {
    SafetensorsSource source(folder.write("model.safetensors", bytes));
    for (const SourceTensor& tensor : source.tensors()) source.read(tensor.name);
  });
  EXPECT_GT(refused, 500);
}

}  // namespace
}  // namespace graft::models::io
