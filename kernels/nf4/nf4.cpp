#include "kernels/nf4/nf4.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/ParallelGuard.h>

#include <cmath>
#include <cstring>

#include "kernels/nf4/code_books.h"

namespace graft::kernels {
namespace {

// Below this many elements a thread of its own costs more than it saves; above kStreamingBytes the
// output leaves the caches before it is read again, and storing past them saves reading it first
// (tests/bench/nf4_bench.cpp).
constexpr int64_t kGrainBlocks = (1 << 20) / kBlockElems;
constexpr int64_t kStreamingBytes = 32 << 20;

const CodeBook& book_of(FourBitType type) {
  return type == FourBitType::kNf4 ? kNf4Book : kFp4Book;
}

/// The float32 data of `t` (float32, or its bytes), checked to be `count` numbers.
const float* floats(const at::Tensor& t, int64_t count, const char* name) {
  const bool right_type = t.scalar_type() == at::kFloat || t.scalar_type() == at::kByte;
  GRAFT_CHECK(right_type && t.is_contiguous() && int64_t(t.nbytes()) == count * 4, ExitCode::kData,
              "4-bit weight: ", name, " is ", t.scalar_type(), " ", t.sizes(), ", expected ", count,
              " contiguous float32 or their bytes");
  const void* data = t.const_data_ptr();
  GRAFT_CHECK(reinterpret_cast<uintptr_t>(data) % alignof(float) == 0, ExitCode::kData,
              "4-bit weight: ", name, " is not aligned to 4 bytes");
  return static_cast<const float*>(data);
}

const uint8_t* bytes(const at::Tensor& t, int64_t count, const char* name) {
  GRAFT_CHECK(t.scalar_type() == at::kByte && t.is_contiguous() && t.numel() == count,
              ExitCode::kData, "4-bit weight: ", name, " is ", t.scalar_type(), " ", t.sizes(),
              ", expected ", count, " contiguous uint8");
  return t.const_data_ptr<uint8_t>();
}

FourBitView view_of(const FourBitCodes& q, int64_t num_elems) {
  FourBitView view{};
  view.num_elems = num_elems;
  view.book = &book_of(q.type);
  view.codes = bytes(q.codes, (num_elems + 1) / 2, "codes");
  const int64_t num_blocks = view.num_blocks();
  if (!q.nested_absmax.defined()) {
    view.absmax = floats(q.absmax, num_blocks, "absmax");
    return view;
  }
  const int64_t num_nested = blocks_of(num_blocks, kNestedBlockElems);
  const at::Tensor& values = q.nested_values.defined() ? q.nested_values : dynamic_map();
  GRAFT_CHECK(values.is_cpu(), ExitCode::kData, "4-bit weight: nested_values are on ",
              values.device(), ", expected cpu");
  view.nested_codes = bytes(q.absmax, num_blocks, "nested absmax codes");
  view.nested_absmax = floats(q.nested_absmax, num_nested, "nested_absmax");
  view.nested_values = floats(values, 256, "nested_values");
  view.nested_offset = q.nested_offset;
  return view;
}

Element element_of(const at::Tensor& out) {
  switch (out.scalar_type()) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kBFloat16:
      return Element::kBfloat16;
    case at::kHalf:
      return Element::kFloat16;
    default:
      GRAFT_CHECK(false, "4-bit weights decode to float32, bfloat16 or float16, not ",
                  out.scalar_type());
  }
}

Stores stores_for(const at::Tensor& out) {
  const bool aligned = reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0;
  const bool large = int64_t(out.nbytes()) >= kStreamingBytes;
  return aligned && large ? Stores::kStreaming : Stores::kCached;
}

/// Replaces plain scales by nested ones. Runs on the CPU: there is one absmax for 64 elements.
void nest(FourBitCodes& q) {
  const at::Tensor absmax = q.absmax.cpu();
  const c10::ParallelGuard serial(true);  // a mean over threads would depend on their number
  const int64_t n = absmax.numel();
  const at::Tensor codes = at::empty({n}, at::kByte);
  const at::Tensor nested = at::empty({blocks_of(n, kNestedBlockElems)});
  q.nested_offset = absmax.mean().item<float>();
  GRAFT_CHECK(
      std::isfinite(q.nested_offset), ExitCode::kData,
      "4-bit double quantisation of a matrix whose scales sum up to more than float32 holds");
  cpu::quantize_nested(absmax.const_data_ptr<float>(), n, q.nested_offset,
                       dynamic_map().const_data_ptr<float>(), codes.mutable_data_ptr<uint8_t>(),
                       nested.mutable_data_ptr<float>());
  q.absmax = codes.to(q.codes.device());
  q.nested_absmax = nested.to(q.codes.device());
}

enum class MapSign { kSigned, kUnsigned };

/// For i = 0..6 the midpoints of 2^i + 1 points from 0.1 to 1, times 10^(i - 6), with both signs;
/// unsigned of 2^(i+1) + 1 points; 0 and 1. The points are those of torch.linspace: from the nearer
/// end, with a fused multiply-add.
at::Tensor make_dynamic_map(MapSign sign) {
  std::vector<float> values = {0.0f, 1.0f};
  for (int i = 0; i < 7; ++i) {
    const int num_points = ((sign == MapSign::kSigned ? 1 : 2) << i) + 1;
    const float step = (1.0f - 0.1f) / static_cast<float>(num_points - 1);
    const auto point = [&](int k) {
      return k < num_points / 2 ? std::fma(step, float(k), 0.1f)
                                : std::fma(-step, float(num_points - 1 - k), 1.0f);
    };
    for (int k = 0; k + 1 < num_points; ++k) {
      const float midpoint = (point(k) + point(k + 1)) / 2;
      const float value = static_cast<float>(std::pow(10.0, i - 6)) * midpoint;
      values.push_back(value);
      if (sign == MapSign::kSigned) values.push_back(-value);
    }
  }
  std::sort(values.begin(), values.end());
  return at::tensor(values);
}

}  // namespace

FourBitCodes quantize(const at::Tensor& w, FourBitType type, Scales scales) {
  GRAFT_CHECK(w.scalar_type() == at::kFloat || w.scalar_type() == at::kBFloat16,
              "4-bit quantisation takes float32 or bfloat16, not ", w.scalar_type());
  GRAFT_CHECK(w.numel() > 0, "4-bit quantisation of an empty matrix ", w.sizes());
  const at::Tensor values = w.to(at::kFloat).contiguous();
  const int64_t n = values.numel(), num_blocks = blocks_of(n, kBlockElems);
  FourBitCodes q;
  q.type = type;
  q.codes = at::empty({(n + 1) / 2}, values.options().dtype(at::kByte));
  q.absmax = at::empty({num_blocks}, values.options());
  const float* from = values.const_data_ptr<float>();
  uint8_t* codes = q.codes.mutable_data_ptr<uint8_t>();
  float* absmax = q.absmax.mutable_data_ptr<float>();
  const CodeBook& book = book_of(type);
  on_device(
      values,
      [&] {
        at::parallel_for(0, num_blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
          cpu::quantize(from, n, book, codes, absmax, begin, end);
        });
      },
      GRAFT_CUDA([&](Stream stream) { cuda::quantize(from, n, book, codes, absmax, stream); }));
  GRAFT_CHECK(q.absmax.isfinite().all().item<bool>(), ExitCode::kData,
              "4-bit quantisation of a matrix with NaN or infinite values");
  if (scales == Scales::kNested) nest(q);
  return q;
}

void dequantize(const FourBitCodes& q, const at::Tensor& out) {
  const Element type = element_of(out);
  GRAFT_CHECK(out.is_contiguous(), "4-bit weights decode into contiguous tensors");
  for (const at::Tensor& t : {q.codes, q.absmax, q.nested_absmax}) {
    GRAFT_CHECK(!t.defined() || t.device() == out.device(), "4-bit weight: data on ", t.device(),
                ", output on ", out.device());
  }
  const FourBitView view = view_of(q, out.numel());
  void* data = out.mutable_data_ptr();
  const Stores stores = stores_for(out);
  on_device(
      out,
      [&] {
        at::parallel_for(0, view.num_blocks(), kGrainBlocks, [&](int64_t begin, int64_t end) {
          cpu::dequantize(view, data, type, stores, begin, end);
        });
      },
      GRAFT_CUDA([&](Stream stream) { cuda::dequantize(view, data, type, stream); }));
}

FourBitType four_bit_type(const at::Tensor& quant_map) {
  const at::Tensor map = quant_map.cpu();
  const float* values = floats(map, 16, "quant_map");
  for (const FourBitType type : {FourBitType::kNf4, FourBitType::kFp4}) {
    if (std::equal(values, values + 16, book_of(type).values)) return type;
  }
  GRAFT_CHECK(false, ExitCode::kData, "4-bit weight: quant_map is neither NF4 nor FP4: ", map);
}

const at::Tensor& dynamic_map() {
  static const at::Tensor map = make_dynamic_map(MapSign::kSigned);
  return map;
}

const at::Tensor& unsigned_dynamic_map() {
  static const at::Tensor map = make_dynamic_map(MapSign::kUnsigned);
  return map;
}

}  // namespace graft::kernels
