#include <algorithm>

#include "kernels/adamw8/adamw8_step.h"
#include "kernels/magnitude.h"

namespace graft::kernels::cpu {
namespace {

constexpr int64_t kBlock = 256;

void decode(const ByteMap& map, const uint8_t* codes, float absmax, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = map.values[codes[i]] * absmax;
}

/// @return the block's absmax
float encode(const CodeTable& table, const float* values, int64_t count, uint8_t* codes) {
  const float absmax = largest_magnitude(values, count);
  const float factor = encoding_factor(absmax);
  for (int64_t i = 0; i < count; ++i) {
    const float x = values[i] * factor;
    const uint32_t bits = bits_of(x), sign = bits >> 31, high = (bits & 0x7fffffffu) >> 16;
    const uint32_t key =
        std::min(std::max(high, CodeTable::kLowest) - CodeTable::kLowest, CodeTable::kKeys - 1) +
        sign * CodeTable::kKeys;
    codes[i] = static_cast<uint8_t>(table.below[key] + (table.midpoint[key] < x ? 1 : 0));
  }
  return absmax;
}

}  // namespace

void adamw_8bit(const AdamW8Piece& piece, const AdamWStep& step, const MomentMaps& maps,
                const MomentTables& tables) {
  float m[kBlock], v[kBlock];
  for (int64_t first = 0; first < piece.size; first += kBlock) {
    const int64_t block = first / kBlock, count = std::min(kBlock, piece.size - first);
    float &m_absmax = piece.first_absmax[block], &v_absmax = piece.second_absmax[block];
    decode(maps.first, piece.first_codes + first, m_absmax, count, m);
    decode(maps.second, piece.second_codes + first, v_absmax, count, v);
    adamw({piece.parameter + first, piece.gradient + first, m, v, count}, step);
    m_absmax = encode(tables.first, m, count, piece.first_codes + first);
    v_absmax = encode(tables.second, v, count, piece.second_codes + first);
  }
}

}  // namespace graft::kernels::cpu
