// numpy.random.default_rng(seed), bit for bit: what PEFT's UniLoRA draws with, and its files hold
// the seed only.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace graft::peft {

/// PCG64 seeded through NumPy's SeedSequence, with the three ways in which NumPy makes integers of
/// it. Checked against NumPy by tests/peft/draws_test.cpp.
class NumpyGenerator {
 public:
  explicit NumpyGenerator(uint32_t seed);

  /// Generator.choice(n, count, replace=False).
  std::vector<int64_t> choice(int64_t n, int64_t count);
  /// Generator.shuffle of a vector.
  void shuffle(std::vector<int64_t>& values);

 private:
  __extension__ using Wide = unsigned __int128;

  uint64_t next64();
  uint32_t next32();  ///< the low half of a next64(), then its high half
  /// From 0 to `most`, by multiplication (Lemire 2019, arXiv:1805.10941).
  int64_t bounded(int64_t most);
  /// From 0 to `most`, by drawing bits until they fit.
  int64_t masked(int64_t most);

  Wide state_ = 0, increment_ = 0;
  std::optional<uint32_t> half_;
};

}  // namespace graft::peft
