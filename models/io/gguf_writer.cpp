#include "models/io/gguf_writer.h"

#include <ATen/ATen.h>

#include "configs/check.h"
#include "models/io/byte_sink.h"

namespace graft::models::io {
namespace {

GgmlType ggml_type(const std::string& name, at::ScalarType dtype) {
  if (dtype == at::kFloat) return GgmlType::kF32;
  if (dtype == at::kBFloat16) return GgmlType::kBF16;
  GRAFT_CHECK(dtype == at::kHalf, "tensor '", name, "': dtype ", c10::toString(dtype),
              " is not written to GGUF (float32, float16 and bfloat16 are)");
  return GgmlType::kF16;
}

}  // namespace

void write_gguf(const std::string& path,
                const std::vector<std::pair<std::string, GgufValue>>& metadata,
                const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  std::vector<GgufTensor> records;
  for (const auto& [name, tensor] : tensors) {
    records.push_back({name, tensor.sizes().vec(), ggml_type(name, tensor.scalar_type())});
  }
  const std::string head = layout_gguf(metadata, records);
  write_file(path, [&](const ByteSink& sink) {
    sink(std::as_bytes(std::span(head)));
    const std::string zeros(kGgufAlignment, '\0');
    for (size_t i = 0; i < records.size(); ++i) {
      const at::Tensor data = tensors[i].second.detach().cpu().contiguous();
      sink({static_cast<const std::byte*>(data.data_ptr()), static_cast<size_t>(records[i].bytes)});
      const uint64_t padding =
          (kGgufAlignment - records[i].bytes % kGgufAlignment) % kGgufAlignment;
      sink(std::as_bytes(std::span(zeros)).first(padding));
    }
  });
}

}  // namespace graft::models::io
