// Any bytes as a safetensors file: refused, or tensors that cover the data without overlap and
// survive being laid out and parsed again.
#include <cstdlib>
#include <string>

#include "configs/check.h"
#include "models/io/safetensors_header.h"

namespace {

using namespace graft::models::io;

void require(bool holds) {
  if (!holds) std::abort();
}

void check_coverage(const SafetensorsHeader& header, size_t file_bytes) {
  uint64_t next = header.data_begin;
  for (const SafetensorsEntry& entry : header.entries) {
    require(entry.offset == next && entry.bytes <= file_bytes - next);
    next += entry.bytes;
  }
  require(next == file_bytes);
}

void check_round_trip(const SafetensorsHeader& header) {
  std::vector<SafetensorsEntry> entries = header.entries;
  std::string file = layout_safetensors(entries, header.metadata);
  for (const SafetensorsEntry& entry : entries) file.resize(file.size() + entry.bytes);
  const SafetensorsHeader again = parse_safetensors_header(std::as_bytes(std::span(file)), "again");
  require(again.metadata == header.metadata && again.entries.size() == entries.size());
  for (const SafetensorsEntry& entry : entries) {
    // Empty tensors may share an offset, so the order of the two lists may differ.
    bool found = false;
    for (const SafetensorsEntry& other : again.entries) found |= other == entry;
    require(found);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto header =
        parse_safetensors_header({reinterpret_cast<const std::byte*>(data), size}, "input");
    check_coverage(header, size);
    check_round_trip(header);
  } catch (const graft::Error& error) {
    require(error.code() == graft::ExitCode::kData);
  }
  return 0;
}
