// bfloat16 as the loops without LibTorch see it: the upper half of a float32. Same bytes as
// at::BFloat16.
#pragma once

#include <cstdint>

namespace graft::kernels {

struct Bfloat16 {
  std::uint16_t bits;
};

}  // namespace graft::kernels
