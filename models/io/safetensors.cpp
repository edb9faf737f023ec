#include "models/io/safetensors.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "configs/check.h"

namespace graft::models::io {
namespace {

struct DtypePair {
  std::string_view name;
  at::ScalarType type;
};

constexpr DtypePair kTensorTypes[] = {
    {"F32", at::kFloat},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"F64", at::kDouble},
    {"C64", at::kComplexFloat},
    {"I64", at::kLong},
    {"I32", at::kInt},
    {"I16", at::kShort},
    {"I8", at::kChar},
    {"U64", at::kUInt64},
    {"U32", at::kUInt32},
    {"U16", at::kUInt16},
    {"U8", at::kByte},
    {"BOOL", at::kBool},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E5M2", at::kFloat8_e5m2},
    {"F8_E8M0", at::kFloat8_e8m0fnu},
};

at::ScalarType scalar_type(std::string_view dtype) {
  for (const DtypePair& pair : kTensorTypes) {
    if (pair.name == dtype) return pair.type;
  }
  GRAFT_ASSERT(false, "the header parser let dtype ", dtype, " through");
}

std::string dtype_name(const std::string& tensor, at::ScalarType type) {
  for (const DtypePair& pair : kTensorTypes) {
    if (pair.type == type) return std::string(pair.name);
  }
  throw Error(ExitCode::kUsage, detail::concat("tensor '", tensor, "': dtype ", c10::toString(type),
                                               " cannot be written to safetensors"));
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path)
    : file_(path), header_(parse_safetensors_header(file_.bytes(), path)) {
  for (const SafetensorsEntry& entry : header_.entries) by_name_.emplace(entry.name, &entry);
}

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : found->second;
}

at::Tensor SafetensorsFile::read(std::string_view name) const {
  const SafetensorsEntry* entry = find(name);
  GRAFT_CHECK(entry != nullptr, ExitCode::kData, path(), ": no tensor '", name, "'");
  at::Tensor tensor = at::empty(entry->shape, scalar_type(entry->dtype));
  const std::span data(static_cast<std::byte*>(tensor.data_ptr()), entry->bytes);
  file_.read(entry->offset, data);
  GRAFT_CHECK(entry->dtype != "BOOL" || std::all_of(data.begin(), data.end(),
                                                    [](std::byte b) { return b <= std::byte{1}; }),
              ExitCode::kData, path(), ": tensor '", name, "' holds bools other than 0 and 1");
  return tensor;
}

void write_safetensors(const ByteSink& sink, const std::vector<ComingTensor>& tensors,
                       const SafetensorsMetadata& metadata) {
  std::vector<SafetensorsEntry> entries;
  std::map<std::string_view, const ComingTensor*> by_name;
  for (const ComingTensor& tensor : tensors) {
    entries.push_back({tensor.name, dtype_name(tensor.name, tensor.dtype), tensor.shape});
    by_name.emplace(tensor.name, &tensor);
  }
  const std::string head = layout_safetensors(entries, metadata);
  sink(std::as_bytes(std::span(head)));
  for (const SafetensorsEntry& entry : entries) {
    const at::Tensor made = by_name.at(entry.name)->make();
    if (!made.defined()) continue;
    const at::Tensor data = made.detach().cpu().contiguous();
    sink({static_cast<const std::byte*>(data.data_ptr()), static_cast<size_t>(entry.bytes)});
  }
}

void write_safetensors(const ByteSink& sink, const NamedTensors& tensors,
                       const SafetensorsMetadata& metadata) {
  std::vector<ComingTensor> coming;
  for (const auto& [name, tensor] : tensors) {
    coming.push_back(
        {name, tensor.scalar_type(), tensor.sizes().vec(), [&tensor = tensor] { return tensor; }});
  }
  write_safetensors(sink, coming, metadata);
}

void write_safetensors(const std::string& path, const NamedTensors& tensors,
                       const SafetensorsMetadata& metadata) {
  write_file(path, [&](const ByteSink& sink) { write_safetensors(sink, tensors, metadata); });
}

}  // namespace graft::models::io
