// Eight elements a thread: one 4-byte load of codes, one or two 16-byte stores. Code books travel
// as kernel arguments and are copied to shared memory, where sixteen values lie in sixteen banks
// and no lookup conflicts.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/nf4/code_books.h"

namespace graft::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kElemsPerThread = 8;

struct NestedValues {
  float v[256];
};

__device__ void assign(float& out, float value) { out = value; }
__device__ void assign(__nv_bfloat16& out, float value) { out = __float2bfloat16_rn(value); }
__device__ void assign(__half& out, float value) { out = __float2half_rn(value); }

template <class T>
struct alignas(16) Pack {
  T v[kElemsPerThread];
};

/// Launched with at least one thread for every eight elements. `aligned`: codes to 4 bytes, out
/// to 16.
template <class T, bool aligned>
__global__ void dequantize_kernel(FourBitView view, CodeBook book, NestedValues nested, T* out) {
  __shared__ float values[16], nested_values[256];
  nested_values[threadIdx.x] = nested.v[threadIdx.x];
  if (threadIdx.x < 16) values[threadIdx.x] = book.values[threadIdx.x];
  __syncthreads();

  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kElemsPerThread;
  if (first >= view.num_elems) return;
  const int64_t block = first / kBlockElems;
  float scale;
  if (view.absmax) {
    scale = view.absmax[block];
  } else {  // two roundings, as the format defines: never one fused multiply-add
    scale = __fadd_rn(__fmul_rn(nested_values[view.nested_codes[block]],
                                view.nested_absmax[block / kNestedBlockElems]),
                      view.nested_offset);
  }
  const int count = int(min(int64_t(kElemsPerThread), view.num_elems - first));
  const uint8_t* from = view.codes + first / 2;
  uint32_t codes = 0;
  if (aligned && count == kElemsPerThread) {
    codes = *reinterpret_cast<const uint32_t*>(from);
  } else {
    for (int i = 0; i < (count + 1) / 2; ++i) codes |= uint32_t(from[i]) << (8 * i);
  }
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kElemsPerThread; ++i) {
    const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);
    assign(pack.v[i], __fmul_rn(values[codes >> shift & 15], scale));
  }
  if (aligned && count == kElemsPerThread) {
    *reinterpret_cast<Pack<T>*>(out + first) = pack;
  } else {
    for (int i = 0; i < count; ++i) out[first + i] = pack.v[i];
  }
}

template <class T>
void dequantize_as(const FourBitView& view, T* out, Stream stream) {
  NestedValues nested{};
  if (view.nested_values) std::copy_n(view.nested_values, 256, nested.v);
  const int64_t per_block = kThreads * kElemsPerThread;
  const int64_t num_blocks = (view.num_elems + per_block - 1) / per_block;
  if (num_blocks == 0) return;
  const bool aligned = reinterpret_cast<uintptr_t>(view.codes) % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(out) % alignof(Pack<T>) == 0;
  const auto kernel = aligned ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
  kernel<<<num_blocks, kThreads, 0, stream>>>(view, *view.book, nested, out);
  CUDA_CHECK(cudaGetLastError());
}

/// One warp a block of 64, two elements a lane.
__global__ void quantize_kernel(const float* values, int64_t n, CodeBook book, uint8_t* codes,
                                float* absmax) {
  const int64_t block = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int64_t first = block * kBlockElems;
  if (first >= n) return;
  const bool full = first + kBlockElems <= n;
  const int64_t i = first + 2 * (threadIdx.x % 32);
  const float even = i < n ? values[i] : 0.0f, odd = i + 1 < n ? values[i + 1] : 0.0f;
  const uint32_t mine =
      max(__float_as_uint(even) & 0x7fffffffu, __float_as_uint(odd) & 0x7fffffffu);
  const float largest = __uint_as_float(__reduce_max_sync(0xffffffffu, mine));
  const float divisor = largest > kSmallestAbsmax ? largest : kSmallestAbsmax;
  const float factor = __fdiv_rn(1.0f, divisor);
  const auto encode = [&](float value) {
    const float scaled = full ? __fmul_rn(value, factor) : __fdiv_rn(value, divisor);
    return book.by_rank[book.rank(scaled)];
  };
  if (i < n) codes[i / 2] = uint8_t(encode(even) << 4 | encode(odd));
  if (threadIdx.x % 32 == 0) absmax[block] = full ? largest : divisor;
}

}  // namespace

void dequantize(const FourBitView& view, void* out, Element type, Stream stream) {
  switch (type) {
    case Element::kFloat32:
      return dequantize_as(view, static_cast<float*>(out), stream);
    case Element::kBfloat16:
      return dequantize_as(view, static_cast<__nv_bfloat16*>(out), stream);
    case Element::kFloat16:
      return dequantize_as(view, static_cast<__half*>(out), stream);
  }
}

void quantize(const float* values, int64_t n, const CodeBook& book, uint8_t* codes, float* absmax,
              Stream stream) {
  const int64_t num_warps = (n + kBlockElems - 1) / kBlockElems;
  const int64_t num_blocks = (num_warps * 32 + kThreads - 1) / kThreads;
  quantize_kernel<<<num_blocks, kThreads, 0, stream>>>(values, n, book, codes, absmax);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace graft::kernels::cuda
