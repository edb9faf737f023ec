#include "kernels/random/random.h"

#include <ATen/Parallel.h>

#include "kernels/device.h"
#include "kernels/random/philox.h"

namespace graft::kernels {
namespace {

template <class Draw>
void fill(const at::Tensor& out, Key key, uint64_t offset, Draw draw) {
  GRAFT_CHECK(out.scalar_type() == at::kFloat && out.is_contiguous(),
              "random numbers need a contiguous float32 tensor, got ", out.scalar_type(), " ",
              out.sizes(), out.is_contiguous() ? "" : ", not contiguous");
  float* data = out.mutable_data_ptr<float>();
  constexpr int64_t kGrain = 16384;
  on_device(
      out,
      [&] {
        at::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
          cpu::fill(data, begin, end, key, offset, draw);
        });
      },
      GRAFT_CUDA([&](Stream stream) { cuda::fill(data, out.numel(), key, offset, draw, stream); }));
}

}  // namespace

void uniform(const at::Tensor& out, Key key, uint64_t offset) {
  fill(out, key, offset, philox::Uniform{});
}

void normal(const at::Tensor& out, Key key, uint64_t offset) {
  fill(out, key, offset, philox::Normal{});
}

void dropout_mask(const at::Tensor& out, Key key, double probability, uint64_t offset) {
  GRAFT_CHECK(probability >= 0 && probability < 1, "dropout probability is ", probability,
              ", expected a number in [0, 1)");
  const philox::Dropout draw{static_cast<float>(probability),
                             static_cast<float>(1 / (1 - probability))};
  fill(out, key, offset, draw);
}

}  // namespace graft::kernels
