#include <bit>
#include <cstdint>

namespace graft::kernels::cpu {

void digit_counts(const float* scores, int64_t size, int shift, int bits, uint32_t prefix,
                  int64_t* counts) {
  const int above = shift + bits;  // 32 for the highest digit, which has no prefix
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t key = std::bit_cast<uint32_t>(scores[i] + 0.0F);
    if (above < 32 && (key ^ prefix) >> above != 0) continue;
    ++counts[(key >> shift) & mask];
  }
}

}  // namespace graft::kernels::cpu
