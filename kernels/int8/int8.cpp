#include "kernels/int8/int8.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels/element.h"
#include "kernels/int8/rows.h"

namespace graft::kernels {
namespace {

int64_t grain_rows(int64_t cols) { return std::max<int64_t>(1, (1 << 18) / cols); }

template <class T>
void dequantize_rows(const Int8Codes& q, const at::Tensor& out) {
  const int64_t rows = out.size(0), cols = out.size(1);
  const int8_t* codes = q.codes.const_data_ptr<int8_t>();
  const auto* absmax = static_cast<const float*>(q.absmax.const_data_ptr());
  T* data = static_cast<T*>(out.mutable_data_ptr());
  on_device(
      out,
      [&] {
        at::parallel_for(0, rows, grain_rows(cols), [&](int64_t begin, int64_t end) {
          cpu::dequantize_int8(codes, absmax, cols, data, begin, end);
        });
      },
      GRAFT_CUDA(
          [&](Stream stream) { cuda::dequantize_int8(codes, absmax, rows, cols, data, stream); }));
}

}  // namespace

Int8Codes quantize_int8(const at::Tensor& w) {
  GRAFT_CHECK(w.dim() == 2 && w.numel() > 0, "int8 quantisation of shape ", w.sizes(),
              ", expected a matrix");
  GRAFT_CHECK(w.scalar_type() == at::kFloat || w.scalar_type() == at::kBFloat16,
              "int8 quantisation takes float32 or bfloat16, not ", w.scalar_type());
  const at::Tensor values = w.to(at::kFloat).contiguous();
  const int64_t rows = w.size(0), cols = w.size(1);
  Int8Codes q{at::empty({rows, cols}, values.options().dtype(at::kChar)),
              at::empty({rows}, values.options())};
  const float* from = values.const_data_ptr<float>();
  int8_t* codes = q.codes.mutable_data_ptr<int8_t>();
  float* absmax = q.absmax.mutable_data_ptr<float>();
  on_device(
      values,
      [&] {
        at::parallel_for(0, rows, grain_rows(cols), [&](int64_t begin, int64_t end) {
          cpu::quantize_int8(from, cols, codes, absmax, begin, end);
        });
      },
      GRAFT_CUDA(
          [&](Stream stream) { cuda::quantize_int8(from, rows, cols, codes, absmax, stream); }));
  GRAFT_CHECK(q.absmax.isfinite().all().item<bool>(), ExitCode::kData,
              "int8 quantisation of a matrix with NaN or infinite values");
  return q;
}

void dequantize_int8(const Int8Codes& q, const at::Tensor& out) {
  GRAFT_CHECK(out.dim() == 2 && out.is_contiguous(),
              "int8 weights decode into contiguous matrices, got ", out.sizes());
  GRAFT_CHECK(q.codes.scalar_type() == at::kChar && q.codes.is_contiguous() &&
                  q.codes.sizes() == out.sizes() && q.codes.device() == out.device(),
              ExitCode::kData, "int8 weight: codes are ", q.codes.scalar_type(), " ",
              q.codes.sizes(), " on ", q.codes.device(), ", expected contiguous int8 ", out.sizes(),
              " on ", out.device());
  const bool right_type =
      q.absmax.scalar_type() == at::kFloat || q.absmax.scalar_type() == at::kByte;
  const bool aligned = reinterpret_cast<uintptr_t>(q.absmax.const_data_ptr()) % 4 == 0;
  GRAFT_CHECK(right_type && aligned && q.absmax.is_contiguous() &&
                  int64_t(q.absmax.nbytes()) == 4 * out.size(0) &&
                  q.absmax.device() == out.device(),
              ExitCode::kData, "int8 weight: absmax is ", q.absmax.scalar_type(), " ",
              q.absmax.sizes(), " on ", q.absmax.device(), ", expected ", out.size(0),
              " aligned float32 or their bytes on ", out.device());
  with_element(out, "dequantize_int8",
               [&](auto element) { dequantize_rows<decltype(element)>(q, out); });
}

}  // namespace graft::kernels
