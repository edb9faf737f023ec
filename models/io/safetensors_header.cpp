#include "models/io/safetensors_header.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <tuple>
#include <unordered_set>

#include "configs/check.h"
#include "models/io/json_file.h"
#include "models/io/mapped_file.h"

namespace graft::models::io {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "file integers are read as they lie");

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxJsonBytes = 100'000'000;  // the reference library's cap
constexpr size_t kMaxTensors = 100'000;
constexpr size_t kMostDimensions = 8;  // no checkpoint has more; LibTorch itself stops at 64

constexpr SafetensorsDtype kDtypes[] = {
    {"U64", 8},     {"I64", 8},     {"F64", 8}, {"C64", 8}, {"F32", 4},  {"U32", 4},
    {"I32", 4},     {"BF16", 2},    {"F16", 2}, {"U16", 2}, {"I16", 2},  {"F8_E8M0", 1},
    {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I8", 1},  {"U8", 1},  {"BOOL", 1},
};

uint64_t to_unsigned(const json& value, const std::string& where) {
  GRAFT_CHECK(value.is_number_unsigned(), ExitCode::kData, where,
              ": expected a non-negative integer, found ", value.type_name());
  const auto number = value.get<uint64_t>();
  GRAFT_CHECK(number <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()), ExitCode::kData,
              where, ": ", number, " is too large");
  return number;
}

const json& member(const json& object, const char* key, const std::string& where) {
  const auto found = object.find(key);
  GRAFT_CHECK(found != object.end(), ExitCode::kData, where, ": '", key, "' is missing");
  return *found;
}

/// Bytes of a tensor; the product is checked at each step, so a shape cannot wrap around to a small
/// size. A size of 0 does not hide the others: strides are products of them too.
uint64_t checked_bytes(const std::vector<int64_t>& shape, uint64_t element_bytes,
                       const std::string& where) {
  GRAFT_CHECK(shape.size() <= kMostDimensions, ExitCode::kData, where, ": ", shape.size(),
              " dimensions; at most ", kMostDimensions, " are allowed");
  auto bytes = static_cast<int64_t>(element_bytes);
  bool empty = false;
  for (const int64_t size : shape) {
    GRAFT_CHECK(!__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes), ExitCode::kData,
                where, ": the product of its shape overflows");
    empty |= size == 0;
  }
  return empty ? 0 : static_cast<uint64_t>(bytes);
}

/// One entry, its offset still relative to the data.
SafetensorsEntry parse_entry(const std::string& name, const json& value, const std::string& path) {
  const std::string where = path + ": tensor '" + name + "'";
  GRAFT_CHECK(value.is_object() && value.size() == 3, ExitCode::kData, where,
              ": expected exactly dtype, shape and data_offsets");
  const json& dtype = member(value, "dtype", where);
  const json& shape = member(value, "shape", where);
  const json& offsets = member(value, "data_offsets", where);
  GRAFT_CHECK(dtype.is_string() && shape.is_array() && offsets.is_array() && offsets.size() == 2,
              ExitCode::kData, where,
              ": dtype must be a string, shape a list, data_offsets a list of two");
  SafetensorsEntry entry;
  entry.name = name;
  entry.dtype = dtype.get<std::string>();
  const SafetensorsDtype* known = find_safetensors_dtype(entry.dtype);
  GRAFT_CHECK(known != nullptr, ExitCode::kData, where, ": dtype '", entry.dtype,
              "' is not supported");
  for (const json& size : shape)
    entry.shape.push_back(static_cast<int64_t>(to_unsigned(size, where)));
  entry.offset = to_unsigned(offsets[0], where);
  const uint64_t end = to_unsigned(offsets[1], where);
  GRAFT_CHECK(entry.offset <= end, ExitCode::kData, where, ": data_offsets run backwards");
  entry.bytes = checked_bytes(entry.shape, known->bytes, where);
  GRAFT_CHECK(entry.bytes == end - entry.offset, ExitCode::kData, where, ": shape and dtype take ",
              entry.bytes, " bytes, data_offsets ", end - entry.offset);
  return entry;
}

SafetensorsMetadata parse_metadata(const json& value, const std::string& path) {
  SafetensorsMetadata metadata;
  GRAFT_CHECK(value.is_object(), ExitCode::kData, path, ": __metadata__ must be an object");
  for (const auto& [key, text] : value.items()) {
    GRAFT_CHECK(text.is_string(), ExitCode::kData, path, ": __metadata__ '", key,
                "' must be a string");
    metadata[key] = text.get<std::string>();
  }
  return metadata;
}

/// Sorts by offset and refuses overlaps, holes and ends beyond the data in one walk: each tensor
/// starts where the last one ended. (Holes are how one file is made to mean two things to two
/// readers.)
void check_coverage(std::vector<SafetensorsEntry>& entries, uint64_t data_bytes,
                    const std::string& path) {
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
  });
  uint64_t next = 0;
  for (const SafetensorsEntry& entry : entries) {
    GRAFT_CHECK(entry.offset == next, ExitCode::kData, path, ": tensor '", entry.name,
                "' starts at ", entry.offset,
                entry.offset < next
                    ? " and overlaps the tensor before it, which ends at "
                    : " and leaves a hole after the tensor before it, which ends at ",
                next);
    GRAFT_CHECK(entry.bytes <= data_bytes - next, ExitCode::kData, path, ": tensor '", entry.name,
                "' reaches past the end of the file; is it cut short?");
    next += entry.bytes;
  }
  GRAFT_CHECK(next == data_bytes, ExitCode::kData, path, ": ", data_bytes - next,
              " bytes at the end belong to no tensor");
}

}  // namespace

std::span<const SafetensorsDtype> safetensors_dtypes() { return kDtypes; }

const SafetensorsDtype* find_safetensors_dtype(std::string_view name) {
  for (const SafetensorsDtype& dtype : kDtypes) {
    if (dtype.name == name) return &dtype;
  }
  return nullptr;
}

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> file,
                                           const std::string& path) {
  GRAFT_CHECK(file.size() >= kLengthBytes, ExitCode::kData, path, ": ", file.size(),
              " bytes is too short for a safetensors file");
  uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  GRAFT_CHECK(length <= file.size() - kLengthBytes && length <= kMaxJsonBytes, ExitCode::kData,
              path, ": the header claims ", length, " bytes, the file has ",
              file.size() - kLengthBytes, " (limit ", kMaxJsonBytes,
              "); not a safetensors file, or cut short");
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, length);
  GRAFT_CHECK(text.starts_with('{'), ExitCode::kData, path, ": the header must start with '{'");
  const json root = parse_json(text, path);

  SafetensorsHeader header;
  header.data_begin = kLengthBytes + length;
  GRAFT_CHECK(root.size() <= kMaxTensors, ExitCode::kData, path, ": ", root.size(),
              " tensors, more than ", kMaxTensors);
  for (const auto& [name, value] : root.items()) {
    if (name == "__metadata__") {
      header.metadata = parse_metadata(value, path);
    } else {
      header.entries.push_back(parse_entry(name, value, path));
    }
  }
  check_coverage(header.entries, file.size() - header.data_begin, path);
  for (SafetensorsEntry& entry : header.entries) entry.offset += header.data_begin;
  return header;
}

std::string layout_safetensors(std::vector<SafetensorsEntry>& entries,
                               const SafetensorsMetadata& metadata) {
  for (const SafetensorsEntry& entry : entries) {
    GRAFT_CHECK(find_safetensors_dtype(entry.dtype) != nullptr, "tensor '", entry.name,
                "': dtype '", entry.dtype, "' cannot be written to safetensors");
  }
  std::sort(entries.begin(), entries.end(),
            [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
              return std::tuple(find_safetensors_dtype(a.dtype), std::string_view(a.name)) <
                     std::tuple(find_safetensors_dtype(b.dtype), std::string_view(b.name));
            });
  std::string text = "{";
  const auto add = [&](const std::string& key, const std::string& value) {
    text += (text.size() > 1 ? "," : "") + json(key).dump() + ":" + value;
  };
  if (!metadata.empty()) add("__metadata__", json(metadata).dump());
  std::unordered_set<std::string_view> names = {"__metadata__"};
  uint64_t next = 0;
  for (SafetensorsEntry& entry : entries) {
    const std::string where = "tensor '" + entry.name + "'";
    GRAFT_CHECK(names.insert(entry.name).second, where, ": the name is taken");
    entry.bytes = checked_bytes(entry.shape, find_safetensors_dtype(entry.dtype)->bytes, where);
    entry.offset = next;
    next += entry.bytes;
    add(entry.name, R"({"dtype":")" + entry.dtype + R"(","shape":)" + json(entry.shape).dump() +
                        R"(,"data_offsets":)" + json{entry.offset, next}.dump() + "}");
  }
  text += "}";
  text.resize((text.size() + 7) / 8 * 8, ' ');
  for (SafetensorsEntry& entry : entries) entry.offset += kLengthBytes + text.size();
  std::string length(kLengthBytes, '\0');
  const uint64_t size = text.size();
  std::memcpy(length.data(), &size, kLengthBytes);
  return length + text;
}

std::map<std::string, std::string> parse_safetensors_index(std::string_view text,
                                                           const std::string& path) {
  const json root = parse_json(text, path);
  GRAFT_CHECK(root.is_object(), ExitCode::kData, path, ": expected an object with 'weight_map'");
  const json& weights = member(root, "weight_map", path);
  GRAFT_CHECK(weights.is_object() && !weights.empty(), ExitCode::kData, path,
              ": weight_map must be an object of tensor name: file name");
  std::map<std::string, std::string> files;
  for (const auto& [tensor, file] : weights.items()) {
    GRAFT_CHECK(file.is_string(), ExitCode::kData, path, ": weight_map '", tensor,
                "' must name a file");
    const auto& name = file.get_ref<const std::string&>();
    GRAFT_CHECK(is_plain_file_name(name) && name.ends_with(".safetensors"), ExitCode::kData, path,
                ": weight_map '", tensor, "' names ", file.dump(),
                "; expected a .safetensors file in the same folder");
    files.emplace(tensor, name);
  }
  return files;
}

}  // namespace graft::models::io
