#include <algorithm>

#include "kernels/adamw8/adamw8_step.h"
#include "kernels/block.cuh"

namespace graft::kernels::cuda {
namespace {

constexpr int kThreads = 256;  // one an element of a block of moments
constexpr int kPiecesALaunch = 64;

struct Table {
  AdamW8Piece pieces[kPiecesALaunch];
};

/// @return the block's absmax; NaN if an element is
__device__ float encode(const ByteMap& map, float value, uint8_t* code) {
  const float magnitude = __uint_as_float(__float_as_uint(value) & 0x7fffffffu);
  const float absmax = __uint_as_float(block_reduce(
      __float_as_uint(magnitude), 0u, [](unsigned a, unsigned b) { return a > b ? a : b; }));
  if (code != nullptr) *code = map.code(value * encoding_factor(absmax));
  return absmax;
}

/// One thread block a piece, its blocks of moments one after the other.
__global__ void adamw_8bit_kernel(const __grid_constant__ Table table, const AdamWStep step,
                                  const __grid_constant__ MomentMaps maps) {
  __shared__ MomentMaps shared;  // arguments are read fast only where all threads read the same
  const auto* from = reinterpret_cast<const float*>(&maps);
  auto* to = reinterpret_cast<float*>(&shared);
  for (int i = threadIdx.x; i < int(sizeof(MomentMaps) / sizeof(float)); i += kThreads) {
    to[i] = from[i];
  }
  __syncthreads();
  const AdamW8Piece& piece = table.pieces[blockIdx.x];
  for (int64_t block = 0; block * kThreads < piece.size; ++block) {
    const int64_t i = block * kThreads + threadIdx.x;
    const bool inside = i < piece.size;
    float m = 0, v = 0;
    if (inside) {
      m = shared.first.values[piece.first_codes[i]] * piece.first_absmax[block];
      v = shared.second.values[piece.second_codes[i]] * piece.second_absmax[block];
      step_element(piece.parameter[i], piece.gradient[i], m, v, step);
    }
    // block_reduce waits for all threads: nobody reads an absmax after it is written.
    const float m_absmax = encode(shared.first, m, inside ? piece.first_codes + i : nullptr);
    const float v_absmax = encode(shared.second, v, inside ? piece.second_codes + i : nullptr);
    if (threadIdx.x == 0) {
      piece.first_absmax[block] = m_absmax;
      piece.second_absmax[block] = v_absmax;
    }
  }
}

}  // namespace

void adamw_8bit(const AdamW8Piece* pieces, int64_t num_pieces, const AdamWStep& step,
                const MomentMaps& maps, Stream stream) {
  for (int64_t first = 0; first < num_pieces; first += kPiecesALaunch) {
    Table table{};
    const int64_t count = std::min<int64_t>(kPiecesALaunch, num_pieces - first);
    std::copy_n(pieces + first, count, table.pieces);
    adamw_8bit_kernel<<<count, kThreads, 0, stream>>>(table, step, maps);
    CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace graft::kernels::cuda
