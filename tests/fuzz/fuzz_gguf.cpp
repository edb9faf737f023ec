// Any bytes as a GGUF file: refused, or tensors that lie in the file one after the other, can be
// dequantised, and survive being laid out and parsed again.
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "configs/check.h"
#include "models/io/gguf_dequantize.h"
#include "models/io/gguf_header.h"

namespace {

using namespace graft::models::io;

void require(bool holds) {
  if (!holds) std::abort();
}

void check_tensors(const GgufHeader& header, std::span<const std::byte> file) {
  uint64_t next = 0;
  for (const GgufTensor& tensor : header.tensors) {
    require(tensor.offset >= next && tensor.offset <= file.size() &&
            tensor.bytes <= file.size() - tensor.offset);
    next = tensor.offset + tensor.bytes;
    const GgmlTypeInfo& type = ggml_type_info(tensor.type);
    const int64_t num_blocks = static_cast<int64_t>(tensor.bytes) / type.block_bytes;
    std::vector<float> values(static_cast<size_t>(num_blocks * type.block_elems));
    dequantize_ggml(tensor.type, file.data() + tensor.offset, num_blocks, values.data());
  }
}

/// Everything before the data as we would write it: compared as bytes, so that NaN equals itself.
std::string written(const GgufHeader& header) {
  std::vector<std::pair<std::string, GgufValue>> metadata;
  for (const auto& [key, value] : header.metadata.values()) {
    if (key != "general.alignment") metadata.emplace_back(key, value);
  }
  std::vector<GgufTensor> tensors = header.tensors;
  return layout_gguf(metadata, tensors);
}

void check_round_trip(const GgufHeader& header) {
  const std::string head = written(header);
  std::string file = head;
  for (const GgufTensor& tensor : header.tensors) {
    file.resize(file.size() +
                (tensor.bytes + kGgufAlignment - 1) / kGgufAlignment * kGgufAlignment);
  }
  require(written(parse_gguf_header(std::as_bytes(std::span(file)), "again")) == head);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  try {
    const GgufHeader header = parse_gguf_header(file, "input");
    check_tensors(header, file);
    check_round_trip(header);
  } catch (const graft::Error& error) {
    require(error.code() == graft::ExitCode::kData);
  }
  return 0;
}
