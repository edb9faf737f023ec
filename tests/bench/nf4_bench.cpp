// Decoding of 4-bit matrices against what the memory allows in the same run: reading the codes and
// storing the output bytes, nothing else. One JSON line a row; nf4_peer.py prints the rows of
// bitsandbytes in the same form. The machine may be shared: compare the columns of a row, never two
// runs. Usage: nf4_bench [threads]
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <emmintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "kernels/nf4/nf4.h"

namespace {

using namespace graft::kernels;

double run_ms(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

/// The bound: every byte of `in` read and every byte of `out` stored from a page in the first
/// cache, by as many threads as the kernel takes, past the caches if they cannot hold it. The page
/// holds noise: some processors store zeros twice as fast as data.
void read_and_store(const at::Tensor& in, const at::Tensor& out) {
  const auto* from = in.const_data_ptr<uint8_t>();
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  constexpr int64_t kPage = 4096;
  const bool streaming = out.nbytes() >= (32 << 20);
  const int64_t num_pages = int64_t(out.nbytes()) / kPage;
  const int64_t in_bytes = int64_t(in.nbytes()) / num_pages;  // read for each page
  const at::Tensor noise = at::randint(256, {kPage}, at::kByte);
  at::parallel_for(
      0, num_pages, (1 << 20) * out.itemsize() / kPage, [&](int64_t begin, int64_t end) {
        alignas(64) char page[kPage];
        std::memcpy(page, noise.const_data_ptr(), kPage);
        for (int64_t p = begin; p < end; ++p) {
          uint64_t sum = 0, word;
          for (int64_t i = 0; i + 8 <= in_bytes; i += 8) {
            std::memcpy(&word, from + p * in_bytes + i, sizeof(word));
            sum ^= word;
          }
          std::memcpy(page, &sum, sizeof(sum));
          if (!streaming) {
            std::memcpy(to + p * kPage, page, kPage);
            continue;
          }
          for (int64_t i = 0; i < kPage; i += 16) {
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + p * kPage + i),
                             _mm_load_si128(reinterpret_cast<const __m128i*>(page + i)));
          }
        }
        _mm_sfence();
      });
}

/// What the kernel replaces, in LibTorch calls.
at::Tensor composed(const FourBitCodes& q, const at::Tensor& values, const at::Tensor& out) {
  const at::Tensor codes = at::stack({q.codes.bitwise_right_shift(4), q.codes.bitwise_and(15)}, 1);
  at::Tensor absmax = q.absmax;
  if (q.nested_absmax.defined()) {
    absmax = dynamic_map().index_select(0, absmax.to(at::kInt)).view({-1, 256});
    absmax = absmax * q.nested_absmax.view({-1, 1}) + q.nested_offset;
  }
  const at::Tensor scaled =
      values.index_select(0, codes.view({-1}).to(at::kInt)).view({-1, 64}) * absmax.view({-1, 1});
  return scaled.to(out.scalar_type()).view(out.sizes());
}

void bench(int64_t rows, int64_t cols, at::ScalarType type, Scales scales) {
  const FourBitCodes q = quantize(at::randn({rows, cols}), FourBitType::kNf4, scales);
  const at::Tensor out = at::empty({rows, cols}, type);
  const int rounds = rows * cols > (1 << 24) ? 15 : 300;
  const at::Tensor values = at::linspace(-1, 1, 16);
  double limit_ms = 1e30, ours_ms = 1e30, composed_ms = 1e30;
  for (int round = 0; round < 3; ++round) {
    composed_ms = std::min(composed_ms, run_ms([&] { composed(q, values, out); }));
  }
  for (int round = 0; round < rounds; ++round) {  // in turns, the best of each
    limit_ms = std::min(limit_ms, run_ms([&] { read_and_store(q.codes, out); }));
    ours_ms = std::min(ours_ms, run_ms([&] { dequantize(q, out); }));
  }
  std::printf(
      R"({"bench": "nf4_dequantize", "rows": %ld, "cols": %ld, "dtype": "%s", "scales": "%s", )"
      R"("threads": %d, "limit_ms": %.4f, "ours_ms": %.4f, "of_limit": %.3f, "composed_ms": %.4f})"
      "\n",
      rows, cols, type == at::kFloat ? "float32" : "bfloat16",
      scales == Scales::kNested ? "nested" : "plain", at::get_num_threads(), limit_ms, ours_ms,
      limit_ms / ours_ms, composed_ms);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) at::set_num_threads(std::atoi(argv[1]));
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    for (const Scales scales : {Scales::kPlain, Scales::kNested}) {
      bench(14336, 4096, type, scales);
      bench(1536, 576, type, scales);
    }
  }
}
