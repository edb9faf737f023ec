#include <algorithm>

#include "kernels/random/philox.h"

namespace graft::kernels::cpu {

template <class Draw>
void fill(float* out, int64_t begin, int64_t end, Key key, uint64_t offset, Draw draw) {
  const uint64_t first = offset + begin, last = offset + end;
  for (uint64_t block = first / 4; block * 4 < last; ++block) {
    const philox::Floats drawn = draw(philox::words(key, block));
    const uint64_t block_end = std::min(last, block * 4 + 4);
    for (uint64_t i = std::max(first, block * 4); i < block_end; ++i) {
      out[i - offset] = drawn.v[i % 4];
    }
  }
}

template void fill(float*, int64_t, int64_t, Key, uint64_t, philox::Uniform);
template void fill(float*, int64_t, int64_t, Key, uint64_t, philox::Normal);
template void fill(float*, int64_t, int64_t, Key, uint64_t, philox::Dropout);

}  // namespace graft::kernels::cpu
