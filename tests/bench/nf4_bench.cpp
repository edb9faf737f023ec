// Decoding of 4-bit matrices against what the memory allows in the same run: reading the codes and
// storing the output bytes, nothing else. One JSON line a row; nf4_peer.py prints the rows of
// bitsandbytes in the same form. The machine may be shared: compare the columns of a row, never two
// runs. Usage: nf4_bench [threads]
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

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

/// The bound: every byte of `in` read and every byte of `out` stored, by as many threads.
void read_and_store(const at::Tensor& in, const at::Tensor& out) {
  const auto* from = in.const_data_ptr<uint8_t>();
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t pages = 64, in_bytes = in.nbytes(), out_bytes = out.nbytes();
  at::parallel_for(0, pages, pages / at::get_num_threads(), [&](int64_t begin, int64_t end) {
    uint64_t sum = 0, word;
    for (int64_t i = in_bytes * begin / pages; i + 8 <= in_bytes * end / pages; i += 8) {
      std::memcpy(&word, from + i, sizeof(word));
      sum ^= word;
    }
    const int64_t first = out_bytes * begin / pages;
    std::memset(to + first, static_cast<int>(sum & 1), out_bytes * end / pages - first);
  });
}

void bench(int64_t rows, int64_t cols, at::ScalarType type, Scales scales) {
  const FourBitCodes q = quantize(at::randn({rows, cols}), FourBitType::kNf4, scales);
  const at::Tensor out = at::empty({rows, cols}, type);
  const int rounds = rows * cols > (1 << 24) ? 15 : 300;
  double limit_ms = 1e30, ours_ms = 1e30;
  for (int round = 0; round < rounds; ++round) {  // in turns, the best of each
    limit_ms = std::min(limit_ms, run_ms([&] { read_and_store(q.codes, out); }));
    ours_ms = std::min(ours_ms, run_ms([&] { dequantize(q, out); }));
  }
  std::printf(
      "{\"bench\": \"nf4_dequantize\", \"rows\": %ld, \"cols\": %ld, \"dtype\": \"%s\", "
      "\"scales\": "
      "\"%s\", \"threads\": %d, \"limit_ms\": %.4f, \"ours_ms\": %.4f, \"of_limit\": %.3f}\n",
      rows, cols, type == at::kFloat ? "float32" : "bfloat16",
      scales == Scales::kNested ? "nested" : "plain", at::get_num_threads(), limit_ms, ours_ms,
      limit_ms / ours_ms);
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
