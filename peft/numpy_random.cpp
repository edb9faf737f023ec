#include "peft/numpy_random.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <numeric>
#include <unordered_set>

#include "configs/check.h"

namespace graft::peft {
namespace {

/// SeedSequence's mixing of a word into a pool; `constant` goes on with each call.
struct Hash {
  uint32_t constant, factor;
  uint32_t operator()(uint32_t value) {
    value ^= constant;
    constant *= factor;
    value *= constant;
    return value ^ (value >> 16);
  }
};

uint32_t mix(uint32_t x, uint32_t y) {
  const uint32_t mixed = 0xca01f9ddU * x - 0x4973f715U * y;
  return mixed ^ (mixed >> 16);
}

}  // namespace

NumpyGenerator::NumpyGenerator(uint32_t seed) {
  Hash into{0x43b0d7e5U, 0x931e8875U};
  std::array<uint32_t, 4> pool{};
  for (size_t i = 0; i < pool.size(); ++i) pool[i] = into(i == 0 ? seed : 0);
  for (size_t from = 0; from < pool.size(); ++from) {
    for (size_t to = 0; to < pool.size(); ++to) {
      if (from != to) pool[to] = mix(pool[to], into(pool[from]));
    }
  }
  Hash out{0x8b51f9ddU, 0x58f38dedU};
  std::array<uint64_t, 4> words{};
  for (size_t i = 0; i < 2 * words.size(); ++i)
    words[i / 2] |= static_cast<uint64_t>(out(pool[i % pool.size()])) << (i % 2 * 32);
  increment_ = (Wide{words[2]} << 64U | words[3]) << 1U | 1U;
  next64();
  state_ += Wide{words[0]} << 64U | words[1];
  next64();
}

uint64_t NumpyGenerator::next64() {
  constexpr Wide kFactor = Wide{2549297995355413924U} << 64U | 4865540595714422341U;
  state_ = state_ * kFactor + increment_;
  const auto folded = static_cast<uint64_t>(state_ >> 64U) ^ static_cast<uint64_t>(state_);
  return std::rotr(folded, static_cast<int>(state_ >> 122U));
}

uint32_t NumpyGenerator::next32() {
  if (half_) {
    const uint32_t half = *half_;
    half_.reset();
    return half;
  }
  const uint64_t both = next64();
  half_ = static_cast<uint32_t>(both >> 32U);
  return static_cast<uint32_t>(both);
}

int64_t NumpyGenerator::bounded(int64_t most) {
  if (most == 0) return 0;
  const uint64_t count = static_cast<uint64_t>(most) + 1;
  uint64_t product = next32() * count;
  const uint64_t uneven = (uint64_t{1} << 32U) % count;
  while (static_cast<uint32_t>(product) < uneven) product = next32() * count;
  return static_cast<int64_t>(product >> 32U);
}

int64_t NumpyGenerator::masked(int64_t most) {
  const uint64_t mask = std::bit_ceil(static_cast<uint64_t>(most) + 1) - 1;
  int64_t value = 0;
  do value = static_cast<int64_t>(next32() & mask);
  while (value > most);
  return value;
}

std::vector<int64_t> NumpyGenerator::choice(int64_t n, int64_t count) {
  std::vector<int64_t> chosen;
  if (n > 10000 && count > n / 50) {  // the tail of a shuffle
    chosen.resize(static_cast<size_t>(n));
    std::iota(chosen.begin(), chosen.end(), 0);
    for (int64_t i = n - 1; i >= std::max<int64_t>(n - count, 1); --i)
      std::swap(chosen[static_cast<size_t>(i)], chosen[static_cast<size_t>(bounded(i))]);
    chosen.erase(chosen.begin(), chosen.end() - count);
    return chosen;
  }
  std::unordered_set<int64_t> seen;  // Floyd's algorithm
  for (int64_t most = n - count; most < n; ++most) {
    const int64_t value = bounded(most);
    chosen.push_back(seen.insert(value).second ? value : most);
    seen.insert(chosen.back());
  }
  for (int64_t i = count - 1; i > 0; --i)
    std::swap(chosen[static_cast<size_t>(i)], chosen[static_cast<size_t>(bounded(i))]);
  return chosen;
}

void NumpyGenerator::shuffle(std::vector<int64_t>& values) {
  GRAFT_ASSERT(values.size() <= std::numeric_limits<uint32_t>::max(), values.size());
  for (size_t i = values.size(); i-- > 1;)
    std::swap(values[i], values[static_cast<size_t>(masked(static_cast<int64_t>(i)))]);
}

}  // namespace graft::peft
