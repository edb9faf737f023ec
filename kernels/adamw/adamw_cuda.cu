#include <algorithm>

#include "kernels/adamw/adamw_step.h"
#include "kernels/block.cuh"

namespace graft::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiecesALaunch =
    64;  // a table of pieces travels as a kernel argument: no copy, no allocation

struct Table {
  AdamWPiece pieces[kPiecesALaunch];
};

/// One block a piece.
__global__ void adamw_kernel(const Table table, const AdamWStep step) {
  const AdamWPiece& piece = table.pieces[blockIdx.x];
  for (int64_t i = threadIdx.x; i < piece.size; i += kThreads) {
    step_element(piece.parameter[i], piece.gradient[i], piece.first_moment[i],
                 piece.second_moment[i], step);
  }
}

__global__ void sum_of_squares_kernel(const float* values, int64_t size, int64_t piece,
                                      double* sums) {
  const int64_t first = blockIdx.x * piece, last = min(first + piece, size);
  double squares = 0;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    squares += double(values[i]) * double(values[i]);
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) sums[blockIdx.x] = squares;
}

}  // namespace

void adamw(const AdamWPiece* pieces, int64_t num_pieces, const AdamWStep& step, Stream stream) {
  for (int64_t first = 0; first < num_pieces; first += kPiecesALaunch) {
    Table table;
    const int64_t count = std::min<int64_t>(kPiecesALaunch, num_pieces - first);
    std::copy_n(pieces + first, count, table.pieces);
    adamw_kernel<<<count, kThreads, 0, stream>>>(table, step);
    CUDA_CHECK(cudaGetLastError());
  }
}

void sum_of_squares(const float* values, int64_t size, int64_t piece, double* sums, Stream stream) {
  if (size == 0) return;
  sum_of_squares_kernel<<<(size + piece - 1) / piece, kThreads, 0, stream>>>(values, size, piece,
                                                                             sums);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace graft::kernels::cuda
