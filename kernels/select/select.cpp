#include "kernels/select/select.h"

#include <ATen/ATen.h>

#include "kernels/device.h"

namespace graft::kernels {
namespace cpu {
void digit_counts(const float* scores, int64_t size, int shift, int bits, uint32_t prefix,
                  int64_t* counts);
}  // namespace cpu
namespace cuda {
void digit_counts(const float* scores, int64_t size, int shift, int bits, uint32_t prefix,
                  int64_t* counts, Stream stream);
}  // namespace cuda

at::Tensor digit_counts(const at::Tensor& scores, Digit digit, uint32_t prefix) {
  GRAFT_CHECK(scores.scalar_type() == at::kFloat && scores.dim() == 1 && scores.is_contiguous(),
              "scores must be a contiguous float32 vector, got ", scores.toString(), " ",
              scores.sizes());
  GRAFT_CHECK(scores.ge(0).all().item<bool>(), ExitCode::kNumerics,
              "a score is negative or not a number: only scores from 0 up can be selected from");
  at::Tensor counts = at::zeros({digit.num_values()}, scores.options().dtype(at::kLong));
  const float* in = scores.const_data_ptr<float>();
  auto* out = counts.mutable_data_ptr<int64_t>();
  on_device(
      scores, [&] { cpu::digit_counts(in, scores.numel(), digit.shift, digit.bits, prefix, out); },
      GRAFT_CUDA([&](Stream stream) {
        cuda::digit_counts(in, scores.numel(), digit.shift, digit.bits, prefix, out, stream);
      }));
  return counts;
}

at::Tensor score_bits(const at::Tensor& scores) {
  return scores.add(0.0).view(at::kInt).to(at::kLong);  // -0 + 0 is 0
}

}  // namespace graft::kernels
