#include "models/io/gguf_source.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "configs/check.h"
#include "models/io/gguf_dequantize.h"

namespace graft::models::io {
namespace {

/// The dtype of a type that needs no arithmetic, else nothing.
std::optional<at::ScalarType> plain_dtype(GgmlType type) {
  switch (type) {
    case GgmlType::kF32:
      return at::kFloat;
    case GgmlType::kF16:
      return at::kHalf;
    case GgmlType::kBF16:
      return at::kBFloat16;
    default:
      return std::nullopt;
  }
}

}  // namespace

GgufSource::GgufSource(const std::string& path)
    : file_(path), header_(parse_gguf_header(file_.bytes(), path)) {
  for (const GgufTensor& tensor : header_.tensors) by_name_.emplace(tensor.name, &tensor);
  for (const auto& [name, tensor] : by_name_) {
    tensors_.push_back({name, tensor->shape, std::string(ggml_type_info(tensor->type).name),
                        static_cast<int64_t>(tensor->bytes)});
  }
}

at::Tensor GgufSource::read(const std::string& name) {
  const auto found = by_name_.find(name);
  GRAFT_CHECK(found != by_name_.end(), ExitCode::kData, file_.path(), ": no tensor '", name, "'");
  const GgufTensor& tensor = *found->second;
  const auto fill = [&](const at::Tensor& bytes) {
    file_.read(tensor.offset, {static_cast<std::byte*>(bytes.data_ptr()), tensor.bytes});
  };
  if (const auto dtype = plain_dtype(tensor.type)) {
    at::Tensor plain = at::empty(tensor.shape, *dtype);
    fill(plain);
    return plain;
  }
  const at::Tensor stored = at::empty({static_cast<int64_t>(tensor.bytes)}, at::kByte);
  fill(stored);
  const auto* blocks = static_cast<const std::byte*>(stored.const_data_ptr());
  at::Tensor dense = at::empty(tensor.shape, at::kFloat);
  float* values = dense.mutable_data_ptr<float>();
  const GgmlTypeInfo& type = ggml_type_info(tensor.type);
  const int64_t num_blocks = dense.numel() / type.block_elems;
  at::parallel_for(0, num_blocks, (1 << 15) / type.block_elems, [&](int64_t begin, int64_t end) {
    dequantize_ggml(tensor.type, blocks + begin * type.block_bytes, end - begin,
                    values + begin * type.block_elems);
  });
  return dense;
}

std::string GgufSource::describe() const {
  return file_.path() + " (GGUF version " + std::to_string(header_.version) + ")";
}

}  // namespace graft::models::io
