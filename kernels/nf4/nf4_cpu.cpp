// A block has only sixteen distinct values, so they are scaled and rounded once and then permuted
// by code: with AVX-512 one instruction yields 16 float32 or 32 half-width elements. The plain loop
// gives the same bits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/lanes.h"
#include "kernels/magnitude.h"
#include "kernels/nf4/code_books.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's bug 105593, in its own header
#include <immintrin.h>
#endif

namespace graft::kernels::cpu {
namespace {

/// IEEE half precision. Same bytes as at::Half.
struct Float16 {
  uint16_t bits;
};

/// Nearest even; a NaN stays one.
Float16 to_half(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    half = bits_of(std::fabs(value) + 0.5f) - bits_of(0.5f);  // subnormal: the addition rounds
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
}

void store(Float16* to, Lanes values) {
  for (int i = 0; i < kLanes; ++i) to[i] = to_half(values[i]);
}

template <class T>
void expand(const T (&values)[16], const uint8_t* codes, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = values[i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
  }
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

template <Stores stores>
void put(void* to, __m512i lanes) {
  if constexpr (stores == Stores::kStreaming) {
    _mm512_stream_si512(static_cast<__m512i*>(to), lanes);
  } else {
    _mm512_storeu_si512(to, lanes);
  }
}

/// Bytes widened to pairs of lanes; each pair picks by the high and the low nibble. The
/// permutations look only at the low bits of an index, so what is left above the nibble is harmless
/// (of five bits, the table repeats after four).
template <Stores stores>
void expand_block(const float (&values)[16], const uint8_t* codes, float* out) {
  const __m512i table = _mm512_loadu_si512(values);
  for (int i = 0; i < 4; ++i) {
    const __m512i pair =
        _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(pair, 4), _mm512_slli_epi64(pair, 32));
    put<stores>(out + 16 * i, _mm512_permutexvar_epi32(index, table));
  }
}

template <Stores stores, class Half>
void expand_block(const Half (&values)[16], const uint8_t* codes, Half* out) {
  static_assert(sizeof(Half) == 2);
  const __m512i table =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  for (int i = 0; i < 2; ++i) {
    const __m512i pair =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(pair, 4), _mm512_slli_epi32(pair, 16));
    put<stores>(out + 32 * i, _mm512_permutexvar_epi16(index, table));
  }
}

void finish_streaming() { _mm_sfence(); }

#else

template <Stores stores, class T>
void expand_block(const T (&values)[16], const uint8_t* codes, T* out) {
  expand(values, codes, kBlockElems, out);
}

void finish_streaming() {}

#endif

/// Blocks that share their second-level scale.
struct Run {
  int64_t begin, end;
};

void restore_scales(const FourBitView& view, Run run, float* scales) {
  const int64_t count = run.end - run.begin;
  if (view.absmax) {
    std::copy_n(view.absmax + run.begin, count, scales);
    return;
  }
  const float nested_absmax = view.nested_absmax[run.begin / kNestedBlockElems];
  for (int64_t i = 0; i < count; ++i) {
    const float product = view.nested_values[view.nested_codes[run.begin + i]] * nested_absmax;
    scales[i] = product + view.nested_offset;  // rounded twice: no fused multiply-add
  }
}

template <Stores stores, class T>
void dequantize_run(const FourBitView& view, Run run, T* out) {
  using cpu::store;
  float scales[kNestedBlockElems];
  restore_scales(view, run, scales);
  const Lanes book = load(view.book->values);
  for (int64_t block = run.begin; block < run.end; ++block) {
    T values[16];
    store(values, book * scales[block - run.begin]);
    const int64_t first = block * kBlockElems;
    const int64_t count = std::min(kBlockElems, view.num_elems - first);
    if (count == kBlockElems) {
      expand_block<stores>(values, view.codes + first / 2, out + first);
    } else {
      expand(values, view.codes + first / 2, count, out + first);
    }
  }
}

template <Stores stores, class T>
void dequantize_as(const FourBitView& view, T* out, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t next = (begin / kNestedBlockElems + 1) * kNestedBlockElems;
    dequantize_run<stores>(view, {begin, std::min(next, end)}, out);
    begin = next;
  }
  if (stores == Stores::kStreaming) finish_streaming();
}

template <class T>
void dequantize_as(const FourBitView& view, void* out, Stores stores, int64_t begin, int64_t end) {
  if (stores == Stores::kStreaming) {
    dequantize_as<Stores::kStreaming>(view, static_cast<T*>(out), begin, end);
  } else {
    dequantize_as<Stores::kCached>(view, static_cast<T*>(out), begin, end);
  }
}

}  // namespace

void dequantize(const FourBitView& view, void* out, Element type, Stores stores, int64_t begin,
                int64_t end) {
  switch (type) {
    case Element::kFloat32:
      return dequantize_as<float>(view, out, stores, begin, end);
    case Element::kBfloat16:
      return dequantize_as<Bfloat16>(view, out, stores, begin, end);
    case Element::kFloat16:
      return dequantize_as<Float16>(view, out, stores, begin, end);
  }
}

void quantize(const float* values, int64_t n, const CodeBook& book, uint8_t* codes, float* absmax,
              int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlockElems, count = std::min(kBlockElems, n - first);
    const bool full = count == kBlockElems;
    const float largest = largest_magnitude(values + first, count);
    const float divisor = std::max(largest, kSmallestAbsmax);
    absmax[block] = full ? largest : divisor;  // bitsandbytes treats a short last block so
    float scaled[kBlockElems] = {};
    if (full) {
      const float factor = 1.0f / divisor;
      for (int64_t i = 0; i < kBlockElems; ++i) scaled[i] = values[first + i] * factor;
    } else {
      for (int64_t i = 0; i < count; ++i) scaled[i] = values[first + i] / divisor;
    }
    int ranks[kBlockElems];
    for (int64_t i = 0; i < kBlockElems; ++i) ranks[i] = book.rank(scaled[i]);
    for (int64_t i = 0; i < count; i += 2) {  // an odd count is filled up with an encoded zero
      codes[(first + i) / 2] =
          static_cast<uint8_t>(book.by_rank[ranks[i]] << 4 | book.by_rank[ranks[i + 1]]);
    }
  }
}

void quantize_nested(const float* values, int64_t n, float offset, const float* nested_values,
                     uint8_t* codes, float* nested_absmax) {
  // bitsandbytes rounds to 65,536 steps of [-1, 1] first and looks those up: near ties differ from
  // the exact nearest.
  std::vector<uint8_t> lookup(65536);
  int code = 0;
  for (int i = 0; i < 65536; ++i) {
    const float value = 2.0f * static_cast<float>(i) / 65535.0f - 1.0f;
    while (code < 255 && 0.5f * (nested_values[code] + nested_values[code + 1]) < value) ++code;
    lookup[i] = static_cast<uint8_t>(code);
  }
  for (int64_t first = 0; first < n; first += kNestedBlockElems) {
    const int64_t count = std::min(kNestedBlockElems, n - first);
    float centred[kNestedBlockElems];
    for (int64_t i = 0; i < count; ++i) centred[i] = values[first + i] - offset;
    const float largest = largest_magnitude(centred, count);
    nested_absmax[first / kNestedBlockElems] = largest;
    const float factor = 1.0f / std::max(largest, kSmallestAbsmax);
    for (int64_t i = 0; i < count; ++i) {
      // In this order NaN becomes 1: the index below is in range whatever the caller passes.
      const float scaled = std::max(-1.0f, std::min(1.0f, centred[i] * factor));
      const float step = (scaled + 1.0f) * 0.5f * 65535.0f + 0.5f;
      codes[first + i] = largest == 0 ? 0 : lookup[static_cast<int>(step)];
    }
  }
}

}  // namespace graft::kernels::cpu
