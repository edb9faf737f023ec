// Writes token shards; the format is data/FORMAT.md. Training only reads: this is for tests and
// benchmarks.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "configs/check.h"
#include "data/hdf5.h"
#include "data/shard_file.h"

namespace graft::data {
namespace {

constexpr hsize_t kChunkElements = 256 * 1024;

template <class Number>
void write_numbers(hid_t file, const std::string& path, const char* name,
                   const std::vector<Number>& numbers) {
  const hsize_t size = numbers.size();
  const hsize_t chunk = std::clamp<hsize_t>(size, 1, kChunkElements);
  const Hdf5Handle space(checked(H5Screate_simple(1, &size, nullptr), path, "write"), H5Sclose);
  const Hdf5Handle create(checked(H5Pcreate(H5P_DATASET_CREATE), path, "write"), H5Pclose);
  checked(H5Pset_chunk(create.get(), 1, &chunk), path, "write");
  checked(H5Pset_fletcher32(create.get()), path, "write");
  const Hdf5Handle dataset(checked(H5Dcreate2(file, name, native_type<Number>(), space.get(),
                                              H5P_DEFAULT, create.get(), H5P_DEFAULT),
                                   path, "write"),
                           H5Dclose);
  if (size == 0) return;
  checked(
      H5Dwrite(dataset.get(), native_type<Number>(), H5S_ALL, H5S_ALL, H5P_DEFAULT, numbers.data()),
      path, "write");
}

Hdf5Handle fixed_string(size_t width) {
  Hdf5Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(type.get(), width);
  H5Tset_cset(type.get(), H5T_CSET_UTF8);
  return type;
}

void write_attribute(hid_t file, const std::string& path, const char* name, hid_t type,
                     const void* value) {
  const Hdf5Handle space(checked(H5Screate(H5S_SCALAR), path, "write"), H5Sclose);
  const Hdf5Handle attribute(
      checked(H5Acreate2(file, name, type, space.get(), H5P_DEFAULT, H5P_DEFAULT), path, "write"),
      H5Aclose);
  checked(H5Awrite(attribute.get(), type, value), path, "write");
}

void write_attribute(hid_t file, const std::string& path, const char* name,
                     const std::string& value) {
  // Fixed length: a variable-length string would lie on the global heap, which has no checksum.
  write_attribute(file, path, name, fixed_string(value.size() + 1).get(), value.c_str());
}

void write_attribute(hid_t file, const std::string& path, const char* name, int64_t value) {
  write_attribute(file, path, name, H5T_NATIVE_INT64, &value);
}

void write_label_names(hid_t file, const std::string& path, const std::vector<std::string>& names) {
  size_t width = 1;
  for (const std::string& name : names) width = std::max(width, name.size() + 1);
  std::string bytes;
  for (const std::string& name : names) bytes += name + std::string(width - name.size(), '\0');
  const hsize_t size = names.size();
  const Hdf5Handle type = fixed_string(width);
  const Hdf5Handle space(checked(H5Screate_simple(1, &size, nullptr), path, "write"), H5Sclose);
  const Hdf5Handle create(checked(H5Pcreate(H5P_DATASET_CREATE), path, "write"), H5Pclose);
  checked(H5Pset_chunk(create.get(), 1, &size), path, "write");
  checked(H5Pset_fletcher32(create.get()), path, "write");
  const Hdf5Handle dataset(checked(H5Dcreate2(file, "labels", type.get(), space.get(), H5P_DEFAULT,
                                              create.get(), H5P_DEFAULT),
                                   path, "write"),
                           H5Dclose);
  checked(H5Dwrite(dataset.get(), type.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()), path,
          "write");
}

void write_content(const std::string& path, const TokenShardContent& content) {
  const Hdf5Handle access(checked(H5Pcreate(H5P_FILE_ACCESS), path, "prepare"), H5Pclose);
  checked(H5Pset_libver_bounds(access.get(), H5F_LIBVER_V110, H5F_LIBVER_V110), path, "prepare");
  const Hdf5Handle file(
      checked(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), path, "create"),
      H5Fclose);
  write_attribute(file.get(), path, "graft_schema", int64_t{1});
  write_attribute(file.get(), path, "kind", std::string("tokens"));
  write_attribute(file.get(), path, "num_samples",
                  static_cast<int64_t>(content.offsets.size()) - 1);
  write_attribute(file.get(), path, "created_by", content.created_by);
  write_attribute(file.get(), path, "tokenizer_sha256", content.tokenizer_sha256);
  write_attribute(file.get(), path, "vocab_size", content.vocab_size);
  write_numbers(file.get(), path, "tokens", content.tokens);
  write_numbers(file.get(), path, "offsets", content.offsets);
  write_numbers(file.get(), path, "loss_mask", content.loss_mask);
  if (content.labels) {
    const ShardLabels& labels = *content.labels;
    write_label_names(file.get(), path, labels.names);
    if (!labels.of_token.empty()) write_numbers(file.get(), path, "token_labels", labels.of_token);
    if (!labels.of_sample.empty()) write_numbers(file.get(), path, "label", labels.of_sample);
    if (!labels.offsets.empty()) {
      write_numbers(file.get(), path, "label_tokens", labels.tokens);
      write_numbers(file.get(), path, "label_offsets", labels.offsets);
    }
  }
  checked(H5Fflush(file.get(), H5F_SCOPE_GLOBAL), path, "write");
}

void sync(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool synced = descriptor >= 0 && ::fsync(descriptor) == 0;
  if (descriptor >= 0) ::close(descriptor);
  GRAFT_CHECK(synced, ExitCode::kData, path, ": cannot be synced to disk");
}

}  // namespace

void TokenShardContent::add(std::span<const uint32_t> sample, std::span<const uint8_t> mask) {
  GRAFT_ASSERT(sample.size() == mask.size(), sample.size(), " tokens, ", mask.size(),
               " mask values");
  tokens.insert(tokens.end(), sample.begin(), sample.end());
  loss_mask.insert(loss_mask.end(), mask.begin(), mask.end());
  offsets.push_back(tokens.size());
}

void write_token_shard(const std::string& path, const TokenShardContent& content) {
  const std::string temporary = path + ".partial";
  {
    Hdf5Lock lock;
    write_content(temporary, content);
  }
  sync(temporary);
  GRAFT_CHECK(std::rename(temporary.c_str(), path.c_str()) == 0, ExitCode::kData, path,
              ": cannot be renamed from ", temporary);
  sync(std::filesystem::absolute(path).parent_path().string());
}

}  // namespace graft::data
