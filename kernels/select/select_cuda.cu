#include <algorithm>

#include "kernels/block.cuh"
#include "kernels/device.h"

namespace graft::kernels::cuda {
namespace {

constexpr int kThreads = 256, kMostBlocks = 1024, kMostCounts = 2048;

/// Counts in shared memory, then adds once a block: integers, so the order does not matter.
__global__ void digit_counts_kernel(const float* scores, int64_t size, int shift, int bits,
                                    uint32_t prefix, unsigned long long* counts) {
  __shared__ unsigned int mine[kMostCounts];
  const uint32_t num = uint32_t(1) << bits;
  for (uint32_t i = threadIdx.x; i < num; i += kThreads) mine[i] = 0;
  __syncthreads();
  const int above = shift + bits;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += stride) {
    const uint32_t key = __float_as_uint(scores[i] + 0.0f);
    if (above < 32 && (key ^ prefix) >> above != 0) continue;
    atomicAdd(&mine[(key >> shift) & (num - 1)], 1u);
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < num; i += kThreads) {
    if (mine[i] != 0) atomicAdd(&counts[i], (unsigned long long)(mine[i]));
  }
}

}  // namespace

void digit_counts(const float* scores, int64_t size, int shift, int bits, uint32_t prefix,
                  int64_t* counts, Stream stream) {
  if (size == 0) return;
  const int64_t blocks = std::min<int64_t>(kMostBlocks, (size + kThreads - 1) / kThreads);
  digit_counts_kernel<<<blocks, kThreads, 0, stream>>>(
      scores, size, shift, bits, prefix, reinterpret_cast<unsigned long long*>(counts));
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace graft::kernels::cuda
