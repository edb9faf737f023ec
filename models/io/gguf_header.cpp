#include "models/io/gguf_header.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>
#include <unordered_set>

#include "configs/check.h"

namespace graft::models::io {
namespace {

static_assert(std::endian::native == std::endian::little, "file integers are read as they lie");

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint64_t kMaxHeaderBytes =
    256u << 20;  // ten times the largest vocabulary; bounds what parsing allocates
constexpr uint64_t kMaxEntries = 100'000;  // tensors, and metadata keys
constexpr size_t kMaxTensorName = 64;
constexpr uint32_t kMaxDimensions = 4;

constexpr GgmlTypeInfo kTypes[] = {
    {GgmlType::kF32, "F32", 1, 4},      {GgmlType::kF16, "F16", 1, 2},
    {GgmlType::kQ40, "Q4_0", 32, 18},   {GgmlType::kQ41, "Q4_1", 32, 20},
    {GgmlType::kQ50, "Q5_0", 32, 22},   {GgmlType::kQ51, "Q5_1", 32, 24},
    {GgmlType::kQ80, "Q8_0", 32, 34},   {GgmlType::kQ4K, "Q4_K", 256, 144},
    {GgmlType::kQ5K, "Q5_K", 256, 176}, {GgmlType::kQ6K, "Q6_K", 256, 210},
    {GgmlType::kBF16, "BF16", 1, 2},
};

uint64_t padded(uint64_t bytes, uint64_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

/// Reads the header front to back. Every count is held against the bytes that are left before
/// anything is allocated.
class Reader {
 public:
  Reader(std::span<const std::byte> file, const std::string& path)
      : bytes_(file.first(std::min<uint64_t>(file.size(), kMaxHeaderBytes))), path_(path) {}

  uint64_t position() const { return position_; }

  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T), "a number").data(), sizeof(T));
    return value;
  }

  std::string string() {
    const auto bytes = take(number<uint64_t>(), "a string");
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  bool boolean() {
    const auto value = number<uint8_t>();
    GRAFT_CHECK(value <= 1, ExitCode::kData, path_, ": a bool holds ", int{value});
    return value == 1;
  }

  template <class T>
  T value() {
    if constexpr (std::is_same_v<T, bool>) {
      return boolean();
    } else if constexpr (std::is_same_v<T, std::string>) {
      return string();
    } else if constexpr (std::is_same_v<T, GgufArray>) {
      const auto type = number<uint32_t>();
      return alternative<GgufArray>(type);
    } else if constexpr (std::is_same_v<T, std::monostate>) {
      throw Error(ExitCode::kData, path_ + ": a list of lists is not supported");
    } else if constexpr (std::is_arithmetic_v<T>) {
      return number<T>();
    } else {
      return list<typename T::value_type>();
    }
  }

  /// The value whose type the file gives as the number of an alternative of Variant.
  template <class Variant, size_t kIndex = 0>
  Variant alternative(uint32_t index) {
    if constexpr (kIndex == std::variant_size_v<Variant>) {
      throw Error(ExitCode::kData, path_ + ": unknown metadata type " + std::to_string(index));
    } else {
      if (index != kIndex) return alternative<Variant, kIndex + 1>(index);
      return Variant(std::in_place_index<kIndex>,
                     value<std::variant_alternative_t<kIndex, Variant>>());
    }
  }

 private:
  std::span<const std::byte> take(uint64_t size, const char* what) {
    GRAFT_CHECK(size <= bytes_.size() - position_, ExitCode::kData, path_, ": ", what, " of ", size,
                " bytes at ", position_, " passes the end of the header (", bytes_.size(),
                "); corrupt, or cut short");
    const auto taken = bytes_.subspan(position_, size);
    position_ += size;
    return taken;
  }

  template <class T>
  std::vector<T> list() {
    constexpr uint64_t kLeast = std::is_same_v<T, std::string> ? sizeof(uint64_t) : sizeof(T);
    const auto count = number<uint64_t>();
    GRAFT_CHECK(count <= (bytes_.size() - position_) / kLeast, ExitCode::kData, path_,
                ": a list of ", count, " elements at ", position_,
                " passes the end of the header (", bytes_.size(), ")");
    std::vector<T> values;
    values.reserve(count);
    for (uint64_t i = 0; i < count; ++i) values.push_back(value<T>());
    return values;
  }

  std::span<const std::byte> bytes_;
  const std::string& path_;
  uint64_t position_ = 0;
};

uint64_t data_alignment(const GgufMetadata& metadata, const std::string& path) {
  const auto found = metadata.values().find("general.alignment");
  if (found == metadata.values().end()) return kGgufAlignment;
  const auto* alignment = std::get_if<uint32_t>(&found->second);
  GRAFT_CHECK(alignment != nullptr && std::has_single_bit(*alignment) && *alignment >= 8,
              ExitCode::kData, path, ": general.alignment must be a u32 power of two, 8 or more");
  return *alignment;
}

uint64_t tensor_bytes(const GgufTensor& tensor, const std::string& where) {
  const GgmlTypeInfo& type = ggml_type_info(tensor.type);
  const int64_t row = tensor.shape.back();
  GRAFT_CHECK(row % type.block_elems == 0, ExitCode::kData, where, ": rows of ", row,
              " are not whole blocks of ", type.block_elems, " (", type.name, ")");
  int64_t bytes = type.block_bytes;
  bool overflow = __builtin_mul_overflow(bytes, row / type.block_elems, &bytes);
  for (size_t i = 0; i + 1 < tensor.shape.size(); ++i) {
    overflow |= __builtin_mul_overflow(bytes, tensor.shape[i], &bytes);
  }
  GRAFT_CHECK(!overflow, ExitCode::kData, where, ": the product of its shape overflows");
  return static_cast<uint64_t>(bytes);
}

/// One record, its offset still relative to the data.
GgufTensor parse_tensor(Reader& reader, const std::string& path) {
  GgufTensor tensor;
  tensor.name = reader.string();
  GRAFT_CHECK(!tensor.name.empty() && tensor.name.size() <= kMaxTensorName, ExitCode::kData, path,
              ": a tensor name of ", tensor.name.size(), " bytes; 1 to ", kMaxTensorName,
              " are allowed");
  const std::string where = path + ": tensor '" + tensor.name + "'";
  const auto dimensions = reader.number<uint32_t>();
  GRAFT_CHECK(dimensions >= 1 && dimensions <= kMaxDimensions, ExitCode::kData, where, ": ",
              dimensions, " dimensions; 1 to ", kMaxDimensions, " are allowed");
  for (uint32_t i = 0; i < dimensions; ++i) {
    tensor.shape.push_back(reader.number<int64_t>());
    GRAFT_CHECK(tensor.shape.back() > 0, ExitCode::kData, where, ": dimension ", i, " is ",
                tensor.shape.back());
  }
  std::reverse(tensor.shape.begin(), tensor.shape.end());
  const auto type = reader.number<uint32_t>();
  GRAFT_CHECK(find_ggml_type(type) != nullptr, ExitCode::kData, where, ": ggml type ", type,
              " is not supported; use a file of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, "
              "Q4_K, Q5_K, Q6_K");
  tensor.type = static_cast<GgmlType>(type);
  tensor.offset = reader.number<uint64_t>();
  tensor.bytes = tensor_bytes(tensor, where);
  return tensor;
}

/// Each tensor's data must start where the padded data before it ended: no overlap, no hole, all
/// aligned.
void place_tensors(GgufHeader& header, uint64_t data_begin, uint64_t file_bytes, uint64_t alignment,
                   const std::string& path) {
  uint64_t next = data_begin;
  for (GgufTensor& tensor : header.tensors) {
    GRAFT_CHECK(tensor.offset == next - data_begin, ExitCode::kData, path, ": tensor '",
                tensor.name, "' at ", tensor.offset, " of the data; the one before it ends at ",
                next - data_begin);
    GRAFT_CHECK(next <= file_bytes && tensor.bytes <= file_bytes - next, ExitCode::kData, path,
                ": tensor '", tensor.name, "' reaches past the end of the file; is it cut short?");
    tensor.offset = next;
    next += padded(tensor.bytes, alignment);
  }
}

template <class T>
void append(std::string& out, const T& value) {
  if constexpr (std::is_same_v<T, std::string>) {
    append(out, static_cast<uint64_t>(value.size()));
    out += value;
  } else if constexpr (std::is_arithmetic_v<T>) {
    out.append(reinterpret_cast<const char*>(&value), sizeof(T));
  } else if constexpr (std::is_same_v<T, GgufArray>) {
    append(out, static_cast<uint32_t>(value.index()));
    std::visit([&](const auto& list) { append(out, list); }, value);
  } else if constexpr (std::is_same_v<T, std::monostate>) {
    GRAFT_ASSERT(false, "a metadata list without a type");
  } else {
    append(out, static_cast<uint64_t>(value.size()));
    for (const typename T::value_type& element : value) append(out, element);
  }
}

}  // namespace

const GgmlTypeInfo* find_ggml_type(uint32_t type) {
  for (const GgmlTypeInfo& info : kTypes) {
    if (static_cast<uint32_t>(info.type) == type) return &info;
  }
  return nullptr;
}

const GgmlTypeInfo& ggml_type_info(GgmlType type) {
  const GgmlTypeInfo* info = find_ggml_type(static_cast<uint32_t>(type));
  GRAFT_ASSERT(info != nullptr, "ggml type ", static_cast<uint32_t>(type));
  return *info;
}

GgufHeader parse_gguf_header(std::span<const std::byte> file, const std::string& path) {
  Reader reader(file, path);
  GRAFT_CHECK(reader.number<uint32_t>() == kMagic, ExitCode::kData, path,
              ": not a GGUF file (wrong first bytes)");
  GgufHeader header;
  header.version = reader.number<uint32_t>();
  GRAFT_CHECK(header.version == 2 || header.version == 3, ExitCode::kData, path, ": GGUF version ",
              header.version, " is not supported (2 and 3 are, little-endian)");
  const auto num_tensors = reader.number<uint64_t>();
  const auto num_values = reader.number<uint64_t>();
  GRAFT_CHECK(num_tensors <= kMaxEntries && num_values <= kMaxEntries, ExitCode::kData, path,
              ": claims ", num_tensors, " tensors and ", num_values, " metadata values; more than ",
              kMaxEntries);

  GgufMetadata::Map values;
  for (uint64_t i = 0; i < num_values; ++i) {
    std::string key = reader.string();
    const auto type = reader.number<uint32_t>();
    GRAFT_CHECK(values.emplace(key, reader.alternative<GgufValue>(type)).second, ExitCode::kData,
                path, ": duplicate metadata key '", key, "'");
  }
  header.metadata = GgufMetadata(path, std::move(values));
  const uint64_t alignment = data_alignment(header.metadata, path);

  std::unordered_set<std::string> names;
  for (uint64_t i = 0; i < num_tensors; ++i) {
    header.tensors.push_back(parse_tensor(reader, path));
    GRAFT_CHECK(names.insert(header.tensors.back().name).second, ExitCode::kData, path,
                ": tensor '", header.tensors.back().name, "' appears twice");
  }
  place_tensors(header, padded(reader.position(), alignment), file.size(), alignment, path);
  return header;
}

std::string layout_gguf(const std::vector<std::pair<std::string, GgufValue>>& metadata,
                        std::vector<GgufTensor>& tensors) {
  std::string out;
  append(out, kMagic);
  append(out, uint32_t{3});
  append(out, static_cast<uint64_t>(tensors.size()));
  append(out, static_cast<uint64_t>(metadata.size()));
  for (const auto& [key, value] : metadata) {
    GRAFT_ASSERT(key != "general.alignment", "the alignment is fixed");
    append(out, key);
    append(out, static_cast<uint32_t>(value.index()));
    std::visit([&](const auto& alternative) { append(out, alternative); }, value);
  }
  std::unordered_set<std::string_view> names;
  uint64_t next = 0;
  for (GgufTensor& tensor : tensors) {
    const std::string where = "tensor '" + tensor.name + "'";
    GRAFT_CHECK(names.insert(tensor.name).second, where, ": the name is taken");
    GRAFT_CHECK(tensor.name.size() <= kMaxTensorName, where, ": GGUF names have at most ",
                kMaxTensorName, " bytes");
    GRAFT_CHECK(!tensor.shape.empty() && tensor.shape.size() <= kMaxDimensions, where, ": ",
                tensor.shape.size(), " dimensions; GGUF has 1 to ", kMaxDimensions);
    append(out, tensor.name);
    append(out, static_cast<uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size) append(out, *size);
    append(out, static_cast<uint32_t>(tensor.type));
    append(out, next);
    tensor.bytes = tensor_bytes(tensor, where);
    tensor.offset = next;
    next += padded(tensor.bytes, kGgufAlignment);
  }
  out.resize(padded(out.size(), kGgufAlignment), '\0');
  for (GgufTensor& tensor : tensors) tensor.offset += out.size();
  return out;
}

}  // namespace graft::models::io
