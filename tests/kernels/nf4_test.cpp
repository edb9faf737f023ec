// kernels/nf4 against bytes that bitsandbytes 0.50.2 wrote (tests/golden/bnb_4bit.json) and, where
// those end, against the same arithmetic composed from LibTorch calls.
#include "kernels/nf4/nf4.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "configs/check.h"

namespace graft::kernels {
namespace {

const nlohmann::json& golden() {
  static const nlohmann::json file =
      nlohmann::json::parse(std::ifstream(GRAFT_SOURCE_DIR "/tests/golden/bnb_4bit.json"));
  return file;
}

/// The generated weights of the golden files: an LCG seeded by the FNV-1a hash of the name.
at::Tensor fill(const std::string& name, at::IntArrayRef shape, double scale) {
  uint32_t x = 2166136261u;
  for (const unsigned char c : name) x = (x ^ c) * 16777619u;
  at::Tensor out = at::empty(shape);
  float* values = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < out.numel(); ++i) {
    x = 1664525u * x + 1013904223u;
    values[i] = static_cast<float>(((x >> 8) / 16777216.0 - 0.5) * 2.0 * scale);
  }
  return out;
}

/// CRC-32 of zlib, over the bytes of a tensor.
uint32_t crc32(const at::Tensor& t) {
  const auto* data = static_cast<const uint8_t*>(t.const_data_ptr());
  uint32_t crc = 0xffffffffu;
  for (size_t i = 0; i < t.nbytes(); ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320u : 0u);
  }
  return ~crc;
}

std::string hex(const at::Tensor& t) {
  std::string text;
  const auto* data = static_cast<const uint8_t*>(t.const_data_ptr());
  for (size_t i = 0; i < t.nbytes(); ++i) {
    text += "0123456789abcdef"[data[i] >> 4];
    text += "0123456789abcdef"[data[i] & 15];
  }
  return text;
}

at::Tensor dequantized(const FourBitCodes& q, at::IntArrayRef shape,
                       at::ScalarType type = at::kFloat) {
  at::Tensor out = at::empty(shape, type);
  dequantize(q, out);
  return out;
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.view(at::kByte).equal(b.view(at::kByte));
}

/// The formula of the format in LibTorch calls: values[code] * (map[q] * nested_absmax + offset).
at::Tensor composed(const FourBitCodes& q, const at::Tensor& quant_map, int64_t n) {
  const at::Tensor codes = at::stack({q.codes.bitwise_right_shift(4), q.codes.bitwise_and(15)}, 1);
  at::Tensor absmax = q.absmax;
  if (q.nested_absmax.defined()) {
    const at::Tensor outer = q.nested_absmax.repeat_interleave(256).slice(0, 0, absmax.numel());
    absmax = dynamic_map().index({absmax.to(at::kInt)}) * outer + q.nested_offset;
  }
  return quant_map.index({codes.view({-1}).slice(0, 0, n).to(at::kInt)}) *
         absmax.repeat_interleave(64).slice(0, 0, n);
}

at::Tensor quant_map(FourBitType type) {
  const auto& values = golden()[type == FourBitType::kNf4 ? "nf4" : "fp4"];
  return at::tensor(values.get<std::vector<float>>());
}

struct Case {
  nlohmann::json expected;
  FourBitType type;
  Scales scales;
  at::Tensor weight;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto& c : golden()["cases"]) {
    const auto shape = c["shape"].get<std::vector<int64_t>>();
    all.push_back({c, c["quant_type"] == "nf4" ? FourBitType::kNf4 : FourBitType::kFp4,
                   c["double_quant"] ? Scales::kNested : Scales::kPlain,
                   fill(c["name"], shape, c["scale"])
                       .to(c["dtype"] == "bfloat16" ? at::kBFloat16 : at::kFloat)});
  }
  return all;
}

TEST(Nf4, QuantizesToTheBytesOfBitsandbytes) {
  ASSERT_GE(cases().size(), 10u);
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.expected.dump().substr(0, 120));
    const FourBitCodes q = quantize(c.weight, c.type, c.scales);
    EXPECT_EQ(hex(q.codes).substr(0, 64), c.expected["packed_first32_hex"]);
    EXPECT_EQ(crc32(q.codes), c.expected["packed_crc32"]);
    EXPECT_EQ(crc32(q.absmax), c.expected["absmax_crc32"]);
    if (c.scales == Scales::kNested) {
      EXPECT_EQ(hex(q.absmax), c.expected["absmax_u8_hex"]);
      EXPECT_EQ(q.nested_offset, c.expected["nested_offset"].get<float>());
      const auto nested = c.expected["nested_absmax"].get<std::vector<float>>();
      EXPECT_TRUE(q.nested_absmax.equal(at::tensor(nested)));
    }
  }
}

TEST(Nf4, DequantizesToTheValuesOfBitsandbytes) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.expected.dump().substr(0, 120));
    const FourBitCodes q = quantize(c.weight, c.type, c.scales);
    const at::Tensor out = dequantized(q, c.weight.sizes());
    EXPECT_EQ(crc32(out), c.expected["dequant_f32_crc32"]);
    const double error = (out - c.weight.to(at::kFloat)).abs().max().item<double>();
    EXPECT_NEAR(error, c.expected["max_abs_error"].get<double>(), 1e-7);
  }
}

TEST(Nf4, HasTheDynamicMapOfBitsandbytes) {
  EXPECT_EQ(hex(dynamic_map()), golden()["dynamic_map_f32_hex"]);
}

TEST(Nf4, KnowsItsCodeBooksAndRefusesOthers) {
  for (const FourBitType type : {FourBitType::kNf4, FourBitType::kFp4}) {
    EXPECT_EQ(four_bit_type(quant_map(type)), type);
  }
  EXPECT_THROW(four_bit_type(quant_map(FourBitType::kNf4) * 1.001), Error);
  EXPECT_THROW(four_bit_type(at::ones({15})), Error);
}

// 64-element blocks that cross rows, a short last block, an odd count, several nested blocks.
const std::vector<std::vector<int64_t>> kShapes = {{96, 160}, {33, 17}, {7, 9},   {1, 1},
                                                   {1, 64},   {3, 65},  {300, 80}};

TEST(Nf4, DecodesEveryShapeTypeAndScaleLikeTheComposedFormula) {
  for (const auto& shape : kShapes) {
    for (const FourBitType type : {FourBitType::kNf4, FourBitType::kFp4}) {
      for (const Scales scales : {Scales::kPlain, Scales::kNested}) {
        const FourBitCodes q = quantize(fill("shape", shape, 0.3), type, scales);
        const int64_t n = shape[0] * shape[1];
        const at::Tensor expected = composed(q, quant_map(type), n);
        for (const at::ScalarType out : {at::kFloat, at::kBFloat16, at::kHalf}) {
          EXPECT_TRUE(same_bits(dequantized(q, {n}, out), expected.to(out))) << n << " " << out;
        }
      }
    }
  }
}

TEST(Nf4, RoundsToHalfPrecisionLikeLibTorchAtEveryMagnitude) {
  // A block for each power of two: half precision goes subnormal, to zero and to infinity on the
  // way.
  const at::Tensor absmax = at::pow(2.0, at::arange(-40, 20, at::kFloat)) * 1.37f;
  FourBitCodes q;
  q.codes = at::arange(256, at::kByte).slice(0, 0, 32).repeat({absmax.numel()});
  for (int64_t i = 0; i < q.codes.numel(); ++i) q.codes[i] = (i * 37 + i / 32) % 256;
  q.absmax = absmax;
  const int64_t n = 64 * absmax.numel();
  const at::Tensor expected = composed(q, quant_map(FourBitType::kNf4), n);
  EXPECT_TRUE(same_bits(dequantized(q, {n}, at::kHalf), expected.to(at::kHalf)));
  EXPECT_TRUE(same_bits(dequantized(q, {n}, at::kBFloat16), expected.to(at::kBFloat16)));
}

TEST(Nf4, DecodesAShortBlockToTheBitsOfAFullOne) {
  // Full blocks go through vector instructions, short ones through the plain loop.
  const FourBitCodes q = quantize(fill("short", {1, 64}, 1.0), FourBitType::kNf4, Scales::kPlain);
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor full = dequantized(q, {64}, type);
    for (int64_t n = 1; n < 64; ++n) {
      FourBitCodes piece = q;
      piece.codes = q.codes.slice(0, 0, (n + 1) / 2);
      EXPECT_TRUE(same_bits(dequantized(piece, {n}, type), full.slice(0, 0, n)));
    }
  }
}

TEST(Nf4, DoesNotDependOnTheNumberOfThreads) {
  // Large enough for several threads, for streaming stores and for a mean that LibTorch would
  // split.
  const at::Tensor w = fill("threads", {4099, 2048}, 0.1);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const FourBitCodes one = quantize(w, FourBitType::kNf4, Scales::kNested);
  const at::Tensor one_out = dequantized(one, w.sizes());
  at::set_num_threads(2);
  const FourBitCodes two = quantize(w, FourBitType::kNf4, Scales::kNested);
  const at::Tensor two_out = dequantized(two, w.sizes());
  at::set_num_threads(threads);
  EXPECT_TRUE(one.codes.equal(two.codes));
  EXPECT_TRUE(one.absmax.equal(two.absmax));
  EXPECT_TRUE(one.nested_absmax.equal(two.nested_absmax));
  EXPECT_EQ(one.nested_offset, two.nested_offset);
  EXPECT_TRUE(same_bits(one_out, two_out));
  EXPECT_TRUE(same_bits(one_out.view({-1}), composed(one, quant_map(one.type), w.numel())));
}

TEST(Nf4, ReadsViewsAtAnyByteOffsetOfABuffer) {
  const at::Tensor w = fill("views", {96, 160}, 0.5);
  for (const Scales scales : {Scales::kPlain, Scales::kNested}) {
    const FourBitCodes q = quantize(w, FourBitType::kNf4, scales);
    const at::Tensor buffer = at::empty({100'000}, at::kByte);
    int64_t next = 4;
    const auto place = [&](const at::Tensor& t, int64_t alignment) {
      if (!t.defined()) return t;
      next += alignment - next % alignment + (alignment == 1 ? 2 : 0);
      at::Tensor view = buffer.slice(0, next, next + int64_t(t.nbytes()));
      view.copy_(t.view(at::kByte));
      next += view.numel();
      return view;
    };
    FourBitCodes views = q;
    views.codes = place(q.codes, 1);
    views.absmax = place(q.absmax, scales == Scales::kNested ? 1 : 4);
    views.nested_absmax = place(q.nested_absmax, 4);
    EXPECT_NE(reinterpret_cast<uintptr_t>(views.codes.const_data_ptr()) % 4, 0u);
    EXPECT_TRUE(same_bits(dequantized(views, w.sizes()), dequantized(q, w.sizes())));
  }
}

TEST(Nf4, WritesIntoUnalignedViews) {
  const at::Tensor w = fill("unaligned", {4099, 2048}, 0.5);
  const FourBitCodes q = quantize(w, FourBitType::kNf4, Scales::kNested);
  const at::Tensor buffer = at::full({w.numel() + 3}, 7.0f);
  dequantize(q, buffer.slice(0, 1, 1 + w.numel()));
  EXPECT_TRUE(same_bits(buffer.slice(0, 1, 1 + w.numel()), dequantized(q, {w.numel()})));
  EXPECT_EQ(buffer[0].item<float>(), 7.0f);
  EXPECT_EQ(buffer[w.numel() + 1].item<float>(), 7.0f);
}

TEST(Nf4, UsesTheNestedValuesOfTheFile) {
  const at::Tensor w = fill("custom", {64, 64}, 0.5);
  FourBitCodes q = quantize(w, FourBitType::kNf4, Scales::kNested);
  const at::Tensor plain = dequantized(q, w.sizes());
  q.nested_values = dynamic_map().clone();
  EXPECT_TRUE(same_bits(dequantized(q, w.sizes()), plain));
  q.nested_values.zero_();  // every absmax is then the offset
  q.absmax.zero_();
  const at::Tensor expected = composed(q, quant_map(q.type), w.numel());
  FourBitCodes flat = q;
  flat.nested_absmax = at::Tensor();
  flat.absmax = at::full({64}, q.nested_offset);
  EXPECT_TRUE(same_bits(dequantized(q, w.sizes()), dequantized(flat, w.sizes())));
}

TEST(Nf4, EncodesAnAllZeroBlockAsSevens) {
  at::Tensor w = fill("zeros", {4, 64}, 0.5);
  w[2].zero_();
  const FourBitCodes q = quantize(w, FourBitType::kNf4, Scales::kPlain);
  EXPECT_TRUE((q.codes.slice(0, 64, 96) == 0x77).all().item<bool>());
  EXPECT_EQ(q.absmax[2].item<float>(), 0.0f);
  EXPECT_TRUE((dequantized(q, w.sizes())[2] == 0).all().item<bool>());
  const at::Tensor zeros = at::zeros({64, 64});
  const FourBitCodes nested = quantize(zeros, FourBitType::kNf4, Scales::kNested);
  EXPECT_TRUE(dequantized(nested, {64, 64}).equal(zeros));
}

TEST(Nf4, EncodesItsOwnValuesExactly) {
  const at::Tensor values = quant_map(FourBitType::kNf4).repeat({4, 8}) * 0.25f;
  const FourBitCodes q = quantize(values, FourBitType::kNf4, Scales::kPlain);
  EXPECT_TRUE(dequantized(q, values.sizes()).equal(values));
}

TEST(Nf4, RefusesWhatItCannotQuantize) {
  const auto nf4 = [](const at::Tensor& w) { quantize(w, FourBitType::kNf4, Scales::kPlain); };
  EXPECT_THROW(nf4(at::ones({4, 64}, at::kHalf)), Error);
  EXPECT_THROW(nf4(at::empty({0, 64})), Error);
  for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    at::Tensor w = at::ones({4, 64});
    w[1][3] = bad;
    EXPECT_THROW(nf4(w), Error);
  }
}

TEST(Nf4, NestsScalesFromTheSmallestToTheLargestFloats) {
  // bitsandbytes divides by no less than 1e-38: centred scales below it stay near the zero code.
  at::Tensor tiny = at::full({8, 64}, 1e-39f);
  tiny[3] = 0;
  const FourBitCodes q = quantize(tiny, FourBitType::kNf4, Scales::kNested);
  EXPECT_LE((dequantized(q, tiny.sizes()) - tiny).abs().max().item<float>(), 1e-39f);
  at::Tensor mixed = at::full({8, 64}, 1e-3f);
  mixed[0] = 3e38f;
  const at::Tensor back =
      dequantized(quantize(mixed, FourBitType::kNf4, Scales::kNested), mixed.sizes());
  EXPECT_NEAR(back[0][0].item<float>() / 3e38f, 1, 0.01);
  // Eight scales of 3e38 have no mean in float32.
  try {
    quantize(at::full({8, 64}, 3e38f), FourBitType::kNf4, Scales::kNested);
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kData);
  }
}

TEST(Nf4, RefusesDataThatDoesNotFitTogether) {
  const FourBitCodes good = quantize(at::ones({4, 64}), FourBitType::kNf4, Scales::kNested);
  const auto expect_refused = [](const FourBitCodes& q, const at::Tensor& out) {
    try {
      dequantize(q, out);
      ADD_FAILURE() << "accepted";
    } catch (const Error& error) {
      EXPECT_NE(error.code(), ExitCode::kBug);
    }
  };
  expect_refused(good, at::empty({5, 64}));
  expect_refused(good, at::empty({4, 64}, at::kDouble));
  expect_refused(good, at::empty({64, 4}).t());
  FourBitCodes bad = good;
  bad.absmax = good.absmax.slice(0, 0, 3);
  expect_refused(bad, at::empty({4, 64}));
  bad = good;
  bad.nested_absmax = at::ones({1}, at::kBFloat16);
  expect_refused(bad, at::empty({4, 64}));
  bad.nested_absmax = at::zeros({8}, at::kByte).slice(0, 1, 5);
  expect_refused(bad, at::empty({4, 64}));
  bad = good;
  bad.nested_values = at::ones({255});
  expect_refused(bad, at::empty({4, 64}));
  bad = good;
  bad.codes = good.codes.to(at::kInt);
  expect_refused(bad, at::empty({4, 64}));
}

}  // namespace
}  // namespace graft::kernels
