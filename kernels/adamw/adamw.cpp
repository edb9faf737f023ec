#include "kernels/adamw/adamw.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <numeric>

#include "kernels/adamw/adamw_step.h"
#include "kernels/device.h"
#include "kernels/element.h"

namespace graft::kernels {
namespace {

constexpr int64_t kPiece = 8192;  // elements of one task of a thread, and of one partial sum

void check_floats(const at::Tensor& tensor, const char* what) {
  GRAFT_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous(), what,
              " must be contiguous float32, got ", tensor.scalar_type(), tensor.sizes());
}

}  // namespace

AdamWStep adamw_step(const AdamWConfig& config, int64_t step) {
  GRAFT_CHECK(step >= 1, "adamw counts steps from 1, got ", step);
  const double correction1 = 1 - std::pow(config.beta1, static_cast<double>(step));
  const double correction2 = 1 - std::pow(config.beta2, static_cast<double>(step));
  return {static_cast<float>(1 - config.learning_rate * config.weight_decay),
          static_cast<float>(1 - config.beta1),
          static_cast<float>(config.beta2),
          static_cast<float>(1 - config.beta2),
          static_cast<float>(config.learning_rate / correction1),
          static_cast<float>(std::sqrt(correction2)),
          static_cast<float>(config.epsilon)};
}

void adamw(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
           at::TensorList second_moments, int64_t step, const AdamWConfig& config) {
  const size_t count = parameters.size();
  GRAFT_CHECK(
      gradients.size() == count && first_moments.size() == count && second_moments.size() == count,
      "adamw got ", count, " parameters, ", gradients.size(), " gradients, ", first_moments.size(),
      " and ", second_moments.size(), " moments");
  const AdamWStep scalars = adamw_step(config, step);
  std::vector<AdamWPiece> pieces;
  for (size_t i = 0; i < count; ++i) {
    for (const at::Tensor& tensor :
         {parameters[i], gradients[i], first_moments[i], second_moments[i]}) {
      check_floats(tensor, "adamw's tensors");
      GRAFT_CHECK(tensor.sizes() == parameters[i].sizes(), "adamw got a parameter ",
                  parameters[i].sizes(), " beside a tensor ", tensor.sizes());
    }
    float* p = parameters[i].mutable_data_ptr<float>();
    const float* g = gradients[i].const_data_ptr<float>();
    float* m = first_moments[i].mutable_data_ptr<float>();
    float* v = second_moments[i].mutable_data_ptr<float>();
    for (int64_t at = 0; at < parameters[i].numel(); at += kPiece) {
      pieces.push_back(
          {p + at, g + at, m + at, v + at, std::min(kPiece, parameters[i].numel() - at)});
    }
  }
  if (pieces.empty()) return;
  on_device(
      parameters[0],
      [&] {
        at::parallel_for(0, static_cast<int64_t>(pieces.size()), 2,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t i = begin; i < end; ++i) cpu::adamw(pieces[i], scalars);
                         });
      },
      GRAFT_CUDA([&](Stream stream) {
        cuda::adamw(pieces.data(), static_cast<int64_t>(pieces.size()), scalars, stream);
      }));
}

double sum_of_squares(const at::Tensor& values) {
  check_floats(values, "sum_of_squares' tensor");
  const int64_t size = values.numel(), num_pieces = (size + kPiece - 1) / kPiece;
  at::Tensor partial = at::empty({num_pieces}, values.options().dtype(at::kDouble));
  const float* in = values.const_data_ptr<float>();
  double* out = partial.mutable_data_ptr<double>();
  on_device(
      values,
      [&] {
        at::parallel_for(0, num_pieces, 2, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            out[i] = cpu::sum_of_squares(in + i * kPiece, std::min(kPiece, size - i * kPiece));
          }
        });
      },
      GRAFT_CUDA([&](Stream stream) { cuda::sum_of_squares(in, size, kPiece, out, stream); }));
  partial = partial.cpu();
  const double* sums = partial.const_data_ptr<double>();
  return std::accumulate(sums, sums + num_pieces, 0.0);
}

int64_t first_non_finite(const at::Tensor& values) {
  if (at::isfinite(values).all().item<bool>()) return -1;
  return at::isfinite(values.flatten()).logical_not().nonzero()[0].item<int64_t>();
}

}  // namespace graft::kernels
