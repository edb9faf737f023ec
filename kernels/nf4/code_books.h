// The code books of bitsandbytes' 4-bit formats and the layout that both back ends of kernels/nf4
// read: raw pointers, no LibTorch. Blocks of 64 run over the flattened matrix, nested blocks of 256
// over its absmax values.
#pragma once

#include <cstdint>

#include "kernels/device.h"

namespace graft::kernels {

constexpr int64_t kBlockElems = 64;
constexpr int64_t kNestedBlockElems = 256;
/// How many blocks hold `elems` elements, the last one perhaps not full.
constexpr int64_t blocks_of(int64_t elems, int64_t block) { return (elems + block - 1) / block; }
constexpr float kSmallestAbsmax =
    1e-38f;  // bitsandbytes divides by no less, so an all-zero block encodes zeros

/// Sixteen values, and what encodes x in [-1, 1]: by_rank[rank(x)] is the code of the nearest
/// value.
struct CodeBook {
  float values[16];
  uint8_t by_rank[16];
  float thresholds[15];

  /// How many thresholds (midpoints of neighbouring values) are below x: a tie takes the lower
  /// value.
  __host__ __device__ int rank(float x) const {
    int rank = 0;
    for (int i = 0; i < 15; ++i) rank += thresholds[i] < x;
    return rank;
  }
};

constexpr CodeBook make_code_book(const float (&values)[16], const uint8_t (&by_rank)[16]) {
  CodeBook book{};
  for (int i = 0; i < 16; ++i) {
    book.values[i] = values[i];
    book.by_rank[i] = by_rank[i];
  }
  for (int i = 0; i < 15; ++i) {
    book.thresholds[i] = (values[by_rank[i]] + values[by_rank[i + 1]]) / 2;
  }
  return book;
}

/// Normal float: quantiles of N(0, 1) scaled to [-1, 1] (arXiv:2305.14314, appendix E).
constexpr CodeBook kNf4Book = make_code_book(
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});

/// Sign, two exponent bits, one mantissa bit, scaled to [-1, 1]; code 8 is a second zero.
constexpr CodeBook kFp4Book = make_code_book(
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12, 0.0f,
     -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12},
    {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3});

/// A quantised matrix as raw bytes. Two codes a byte, the high nibble first; float data is 4-byte
/// aligned.
struct FourBitView {
  const uint8_t* codes;         ///< [ceil(num_elems / 2)], any alignment
  const float* absmax;          ///< [num_blocks()]; null: nested
  const uint8_t* nested_codes;  ///< [num_blocks()]
  const float* nested_absmax;   ///< [ceil(num_blocks() / 256)]
  float nested_offset;
  const float* nested_values;  ///< [256], always on the host
  const CodeBook* book;        ///< on the host
  int64_t num_elems;

  int64_t num_blocks() const { return blocks_of(num_elems, kBlockElems); }
};

enum class Element { kFloat32, kBfloat16, kFloat16 };
enum class Stores {
  kCached,
  kStreaming,  ///< past the caches; needs 64-byte alignment
};

namespace cpu {

/// Writes the elements of blocks [begin, end) to their places in `out` [num_elems].
void dequantize(const FourBitView& view, void* out, Element type, Stores stores, int64_t begin,
                int64_t end);

/// Encodes blocks [begin, end) of `values` [n] into `codes` [ceil(n / 2)] and `absmax` [ceil(n /
/// 64)].
void quantize(const float* values, int64_t n, const CodeBook& book, uint8_t* codes, float* absmax,
              int64_t begin, int64_t end);

/// The second level: encodes v - offset for all n values by the 256 nested values, sorted upwards.
void quantize_nested(const float* values, int64_t n, float offset, const float* nested_values,
                     uint8_t* codes, float* nested_absmax);

}  // namespace cpu

namespace cuda {

void dequantize(const FourBitView& view, void* out, Element type, Stream stream);
void quantize(const float* values, int64_t n, const CodeBook& book, uint8_t* codes, float* absmax,
              Stream stream);

}  // namespace cuda
}  // namespace graft::kernels
