// What the tests of shards share: a file, what was written to it, and what reading it gives.
#pragma once

#include <gtest/gtest.h>

#include <functional>

#include "tests/data/shards.h"

namespace graft::data {

// --- the C API, as another program would use it ---

inline void put_attribute(hid_t file, const char* name, int64_t value) {
  if (H5Aexists(file, name) > 0) H5Adelete(file, name);
  const hid_t space = H5Screate(H5S_SCALAR);
  const hid_t attribute = H5Acreate2(file, name, H5T_NATIVE_INT64, space, H5P_DEFAULT, H5P_DEFAULT);
  ASSERT_GE(H5Awrite(attribute, H5T_NATIVE_INT64, &value), 0);
  H5Aclose(attribute);
  H5Sclose(space);
}

inline hid_t variable_string() {
  const hid_t type = H5Tcopy(H5T_C_S1);
  H5Tset_size(type, H5T_VARIABLE);
  H5Tset_cset(type, H5T_CSET_UTF8);
  return type;
}

inline void put_attribute(hid_t file, const char* name, const char* value) {
  if (H5Aexists(file, name) > 0) H5Adelete(file, name);
  const hid_t space = H5Screate(H5S_SCALAR), type = variable_string();
  const hid_t attribute = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  ASSERT_GE(H5Awrite(attribute, type, &value), 0);
  H5Aclose(attribute);
  H5Tclose(type);
  H5Sclose(space);
}

inline void put_dataset(hid_t file, const char* name, hid_t type, const std::vector<hsize_t>& dims,
                        const void* values, hid_t create = H5P_DEFAULT) {
  if (H5Lexists(file, name, H5P_DEFAULT) > 0) H5Ldelete(file, name, H5P_DEFAULT);
  const hid_t space = H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr);
  const hid_t dataset = H5Dcreate2(file, name, type, space, H5P_DEFAULT, create, H5P_DEFAULT);
  ASSERT_GE(dataset, 0) << name;
  if (values) {
    ASSERT_GE(H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values), 0);
  }
  H5Dclose(dataset);
  H5Sclose(space);
}

struct Samples {
  std::vector<uint32_t> tokens;
  std::vector<uint8_t> loss_mask;
};

inline Samples read_all(const TokenShard& shard) {
  Samples all{std::vector<uint32_t>(shard.num_tokens()), std::vector<uint8_t>(shard.num_tokens())};
  shard.read(0, all.tokens, all.loss_mask);
  return all;
}

/// The message of the kData error that opening and reading the whole file gives; empty: none.
inline std::string refusal(const std::string& path) {
  try {
    read_all(TokenShard(path));
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kData);
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
    return error.what();
  }
  return "";
}

class ShardTest : public testing::Test {
 protected:
  ShardTest() : path_(folder_.file("shard.h5")), content_(test_content({5, 1, 0, 9, 300'000, 3})) {}

  /// A healthy shard, changed by `change` through the C API; the message with which it is refused.
  std::string refused_after(const std::function<void(hid_t file)>& change) {
    write_token_shard(path_, content_);
    EXPECT_EQ(refusal(path_), "");
    const hid_t file = H5Fopen(path_.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    change(file);
    EXPECT_GE(H5Fclose(file), 0);
    return refusal(path_);
  }

  void expect_reads(const TokenShard& shard, int64_t begin, int64_t count) {
    Samples read{std::vector<uint32_t>(count), std::vector<uint8_t>(count)};
    shard.read(begin, read.tokens, read.loss_mask);
    EXPECT_TRUE(std::equal(read.tokens.begin(), read.tokens.end(), &content_.tokens[begin]))
        << begin;
    EXPECT_TRUE(
        std::equal(read.loss_mask.begin(), read.loss_mask.end(), &content_.loss_mask[begin]))
        << begin;
  }

  TemporaryFolder folder_;
  std::string path_;
  TokenShardContent content_;
};

}  // namespace graft::data
