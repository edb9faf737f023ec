#include "models/io/gguf_dequantize.h"

#include <bit>
#include <cstring>

#include "configs/check.h"

namespace graft::models::io {
namespace {

template <class T>
T load(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

float bfloat16(const uint8_t* bytes) {
  return std::bit_cast<float>(static_cast<uint32_t>(load<uint16_t>(bytes)) << 16);
}

/// Exact for all values, subnormals too: the float whose exponent field is the half's is 2^112
/// times too small.
float half(const uint8_t* bytes) {
  const uint32_t bits = load<uint16_t>(bytes);
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  if ((bits & 0x7c00u) == 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | magnitude);
  return std::bit_cast<float>(sign |
                              std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f));
}

// The classic formats: 32 elements; element j is the low nibble of byte j, element j + 16 the high
// one.

void q4_0(const uint8_t* block, float* out) {
  const float d = half(block);
  for (int j = 0; j < 16; ++j) {
    out[j] = d * static_cast<float>((block[2 + j] & 15) - 8);
    out[j + 16] = d * static_cast<float>((block[2 + j] >> 4) - 8);
  }
}

void q4_1(const uint8_t* block, float* out) {
  const float d = half(block), m = half(block + 2);
  for (int j = 0; j < 16; ++j) {
    out[j] = d * static_cast<float>(block[4 + j] & 15) + m;
    out[j + 16] = d * static_cast<float>(block[4 + j] >> 4) + m;
  }
}

/// Element j of a 5-bit block: its nibble and, from the u32 of high bits, bit j.
int five_bits(const uint8_t* nibbles, uint32_t high, int j) {
  const int nibble = j < 16 ? nibbles[j] & 15 : nibbles[j - 16] >> 4;
  return nibble | static_cast<int>((high >> j & 1) << 4);
}

void q5_0(const uint8_t* block, float* out) {
  const float d = half(block);
  const auto high = load<uint32_t>(block + 2);
  for (int j = 0; j < 32; ++j) out[j] = d * static_cast<float>(five_bits(block + 6, high, j) - 16);
}

void q5_1(const uint8_t* block, float* out) {
  const float d = half(block), m = half(block + 2);
  const auto high = load<uint32_t>(block + 4);
  for (int j = 0; j < 32; ++j) out[j] = d * static_cast<float>(five_bits(block + 8, high, j)) + m;
}

void q8_0(const uint8_t* block, float* out) {
  const float d = half(block);
  for (int j = 0; j < 32; ++j) out[j] = d * static_cast<float>(static_cast<int8_t>(block[2 + j]));
}

// The K formats: 256 elements in sub-blocks with scales of their own.

struct ScaleMin {
  float scale, min;
};

/// Sub-block j (of 8) of Q4_K and Q5_K, whose 6-bit scales and minima are packed into 12 bytes: of
/// the first four in the low 6 bits of bytes 0-3 and 4-7; of the last four as nibbles of bytes 8-11
/// with their top 2 bits in bytes 0-7.
ScaleMin scale_min(const uint8_t* block, int j) {
  const float d = half(block), dmin = half(block + 2);
  const uint8_t* packed = block + 4;
  const int k = j % 4;
  const int scale = j < 4 ? packed[k] & 63 : (packed[8 + k] & 15) | (packed[k] >> 2 & 48);
  const int min = j < 4 ? packed[4 + k] & 63 : (packed[8 + k] >> 4) | (packed[4 + k] >> 2 & 48);
  return {d * static_cast<float>(scale), dmin * static_cast<float>(min)};
}

void q4_k(const uint8_t* block, float* out) {
  for (int j = 0; j < 8; ++j) {
    const ScaleMin s = scale_min(block, j);
    const uint8_t* nibbles = block + 16 + j / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      out[32 * j + i] = s.scale * static_cast<float>(nibbles[i] >> (j % 2 * 4) & 15) - s.min;
    }
  }
}

void q5_k(const uint8_t* block, float* out) {
  for (int j = 0; j < 8; ++j) {
    const ScaleMin s = scale_min(block, j);
    const uint8_t* high = block + 16;
    const uint8_t* nibbles = block + 48 + j / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      const int q = (nibbles[i] >> (j % 2 * 4) & 15) | (high[i] >> j & 1) << 4;
      out[32 * j + i] = s.scale * static_cast<float>(q) - s.min;
    }
  }
}

void q6_k(const uint8_t* block, float* out) {
  const float d = half(block + 208);
  for (int j = 0; j < 256; ++j) {
    const int half_index = j / 128, within = j % 128;
    const int nibble = block[half_index * 64 + within % 64] >> (within / 64 * 4) & 15;
    const int high = block[128 + half_index * 32 + within % 32] >> (within / 32 * 2) & 3;
    const auto scale = static_cast<float>(static_cast<int8_t>(block[192 + j / 16]));
    out[j] = d * scale * static_cast<float>((nibble | high << 4) - 32);
  }
}

template <class Block>
void for_each_block(GgmlType type, const std::byte* blocks, int64_t num_blocks, float* out,
                    Block block) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  const auto* bytes = reinterpret_cast<const uint8_t*>(blocks);
  for (int64_t i = 0; i < num_blocks; ++i)
    block(bytes + i * info.block_bytes, out + i * info.block_elems);
}

}  // namespace

void dequantize_ggml(GgmlType type, const std::byte* blocks, int64_t num_blocks, float* values) {
  const auto each = [&](auto block) { for_each_block(type, blocks, num_blocks, values, block); };
  switch (type) {
    case GgmlType::kF32:
      return each([](const uint8_t* b, float* v) { *v = load<float>(b); });
    case GgmlType::kF16:
      return each([](const uint8_t* b, float* v) { *v = half(b); });
    case GgmlType::kBF16:
      return each([](const uint8_t* b, float* v) { *v = bfloat16(b); });
    case GgmlType::kQ40:
      return each(q4_0);
    case GgmlType::kQ41:
      return each(q4_1);
    case GgmlType::kQ50:
      return each(q5_0);
    case GgmlType::kQ51:
      return each(q5_1);
    case GgmlType::kQ80:
      return each(q8_0);
    case GgmlType::kQ4K:
      return each(q4_k);
    case GgmlType::kQ5K:
      return each(q5_k);
    case GgmlType::kQ6K:
      return each(q6_k);
  }
  GRAFT_ASSERT(false, "ggml type ", static_cast<uint32_t>(type));
}

}  // namespace graft::models::io
