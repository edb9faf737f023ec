#include <algorithm>

#include "kernels/random/philox.h"

namespace graft::kernels::cuda {
namespace {

/// One thread draws one Philox block: up to four elements.
template <class Draw>
__global__ void fill_kernel(float* out, uint64_t first, uint64_t last, Key key, Draw draw) {
  const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t block = first / 4 + uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
       block * 4 < last; block += stride) {
    const philox::Floats drawn = draw(philox::words(key, block));
    for (int lane = 0; lane < 4; ++lane) {
      const uint64_t i = block * 4 + lane;
      if (i >= first && i < last) out[i - first] = drawn.v[lane];
    }
  }
}

}  // namespace

template <class Draw>
void fill(float* out, int64_t n, Key key, uint64_t offset, Draw draw, Stream stream) {
  if (n == 0) return;
  constexpr int kThreads = 256;
  const int64_t num_blocks = std::min<int64_t>((n / 4 + kThreads + 1) / kThreads, 4096);
  fill_kernel<<<num_blocks, kThreads, 0, stream>>>(out, offset, offset + n, key, draw);
  CUDA_CHECK(cudaGetLastError());
}

template void fill(float*, int64_t, Key, uint64_t, philox::Uniform, Stream);
template void fill(float*, int64_t, Key, uint64_t, philox::Normal, Stream);
template void fill(float*, int64_t, Key, uint64_t, philox::Dropout, Stream);

}  // namespace graft::kernels::cuda
