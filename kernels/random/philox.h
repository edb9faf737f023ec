// The arithmetic of kernels/random, shared by both devices: Philox 4x32-10 (Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3") and what four of its words become. Element i uses
// word i % 4 of block i / 4.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/device.h"
#include "kernels/random/key.h"

namespace graft::kernels::philox {

struct Words {
  uint32_t v[4];
};

struct Floats {
  float v[4];
};

/// Ten rounds of Philox 4x32 on a 128-bit counter under a 64-bit key.
__host__ __device__ inline Words rounds10(Words counter, uint32_t key0, uint32_t key1) {
  Words c = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c.v[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c.v[2];
    c = {{uint32_t(product1 >> 32) ^ c.v[1] ^ key0, uint32_t(product1),
          uint32_t(product0 >> 32) ^ c.v[3] ^ key1, uint32_t(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

/// The words of elements 4 * block ... 4 * block + 3 of a key's sequence.
__host__ __device__ inline Words words(Key key, uint64_t block) {
  return rounds10(
      {{uint32_t(block), uint32_t(block >> 32), uint32_t(key.stream), uint32_t(key.stream >> 32)}},
      uint32_t(key.seed), uint32_t(key.seed >> 32));
}

/// 24 bits of a word as a float in [0, 1): exact, so equal on every device.
__host__ __device__ inline float unit(uint32_t word) { return float(word >> 8) * 0x1p-24f; }

struct Uniform {
  __host__ __device__ Floats operator()(Words w) const {
    return {{unit(w.v[0]), unit(w.v[1]), unit(w.v[2]), unit(w.v[3])}};
  }
};

/// Box and Muller: words 0, 1 give elements 0, 1; words 2, 3 give elements 2, 3.
struct Normal {
  __host__ __device__ Floats operator()(Words w) const {
    Floats out;
    for (int i = 0; i < 4; i += 2) {
      const float radius =
          sqrtf(-2.0f * logf(unit(w.v[i]) + 0x1p-24f));  // of (0, 1]: log is finite
      const float angle = 6.2831853071795865f * unit(w.v[i + 1]);
      out.v[i] = radius * cosf(angle);
      out.v[i + 1] = radius * sinf(angle);
    }
    return out;
  }
};

/// 0 with the given probability, else `kept`.
struct Dropout {
  float probability;
  float kept;
  __host__ __device__ Floats operator()(Words w) const {
    Floats out;
    for (int i = 0; i < 4; ++i) out.v[i] = unit(w.v[i]) < probability ? 0.0f : kept;
    return out;
  }
};

}  // namespace graft::kernels::philox

namespace graft::kernels::cpu {

/// out[begin, end) = elements offset + begin ... of the key's sequence.
template <class Draw>
void fill(float* out, int64_t begin, int64_t end, Key key, uint64_t offset, Draw draw);

}  // namespace graft::kernels::cpu

namespace graft::kernels::cuda {

/// out[0, n) = elements offset ... offset + n of the key's sequence.
template <class Draw>
void fill(float* out, int64_t n, Key key, uint64_t offset, Draw draw, Stream stream);

}  // namespace graft::kernels::cuda
