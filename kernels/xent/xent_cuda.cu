#include "kernels/block.cuh"
#include "kernels/device.h"

namespace graft::kernels::cuda {
namespace {

constexpr int kThreads = 512;  // one block a row

template <class T>
__global__ void softmax_loss_kernel(const T* logits, const int64_t* labels, int64_t ignored,
                                    float* losses, T* d_logits, int64_t vocabulary) {
  const T* in = logits + blockIdx.x * vocabulary;
  T* out = d_logits == nullptr ? nullptr : d_logits + blockIdx.x * vocabulary;
  const int64_t label = labels[blockIdx.x];
  if (label == ignored) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0;
    if (out == nullptr) return;
    for (int64_t i = threadIdx.x; i < vocabulary; i += kThreads) out[i] = narrow<T>(0);
    return;
  }
  float most = -INFINITY;
  for (int64_t i = threadIdx.x; i < vocabulary; i += kThreads) most = fmaxf(most, widen(in[i]));
  most = block_max(most);
  float total = 0;
  for (int64_t i = threadIdx.x; i < vocabulary; i += kThreads) total += expf(widen(in[i]) - most);
  const float log_sum = logf(block_sum(total));
  if (threadIdx.x == 0) losses[blockIdx.x] = log_sum - (widen(in[label]) - most);
  if (out == nullptr) return;
  __syncthreads();  // in may be out: the target has been read
  for (int64_t i = threadIdx.x; i < vocabulary; i += kThreads) {
    out[i] = narrow<T>(expf(widen(in[i]) - most - log_sum) - (i == label ? 1.0F : 0.0F));
  }
}

}  // namespace

template <class T>
void softmax_loss(const T* logits, const int64_t* labels, int64_t ignored, float* losses,
                  T* d_logits, int64_t rows, int64_t vocabulary, Stream stream) {
  if (rows == 0) return;
  softmax_loss_kernel<<<rows, kThreads, 0, stream>>>(logits, labels, ignored, losses, d_logits,
                                                     vocabulary);
  CUDA_CHECK(cudaGetLastError());
}

template void softmax_loss(const float*, const int64_t*, int64_t, float*, float*, int64_t, int64_t,
                           Stream);
template void softmax_loss(const Bfloat16*, const int64_t*, int64_t, float*, Bfloat16*, int64_t,
                           int64_t, Stream);

}  // namespace graft::kernels::cuda
