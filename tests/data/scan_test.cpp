// The checksum against the ones that libhdf5 stored itself.
#include "data/scan.h"

#include <gtest/gtest.h>

#include <functional>

#include "data/hdf5.h"
#include "tests/data/shards.h"

namespace graft::data {
namespace {

/// What the fletcher32 filter of libhdf5 puts after the bytes of a chunk.
uint32_t stored_checksum(const std::string& path, const std::vector<uint8_t>& bytes) {
  const Hdf5Handle file(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT), H5Fclose);
  const hsize_t size = bytes.size(), start = 0;
  const Hdf5Handle space(H5Screate_simple(1, &size, nullptr), H5Sclose);
  const Hdf5Handle create(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_chunk(create.get(), 1, &size);
  H5Pset_fletcher32(create.get());
  const Hdf5Handle dataset(H5Dcreate2(file.get(), "bytes", H5T_NATIVE_UINT8, space.get(),
                                      H5P_DEFAULT, create.get(), H5P_DEFAULT),
                           H5Dclose);
  H5Dwrite(dataset.get(), H5T_NATIVE_UINT8, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data());
  H5Dflush(dataset.get());
  std::vector<uint8_t> chunk(size + sizeof(uint32_t));
  uint32_t skipped_filters = 0;
  EXPECT_GE(H5Dread_chunk(dataset.get(), H5P_DEFAULT, &start, &skipped_filters, chunk.data()), 0);
  EXPECT_EQ(skipped_filters, 0u);
  uint32_t checksum = 0;
  std::memcpy(&checksum, &chunk[size], sizeof checksum);
  return checksum;
}

TEST(Fletcher32, IsWhatLibhdf5StoresForAnyBytesOfAnyLength) {
  const TemporaryFolder folder;
  std::mt19937_64 random(7);
  const std::vector<std::function<int()>> sources = {[&] { return random(); }, [] { return 0; },
                                                     [] { return 255; },
                                                     [&] { return random() % 1000 == 0; }};
  for (const size_t size : {1, 2, 3, 63, 64, 65, 127, 1000, 16'384, 16'447, 262'144, 1'000'001})
    for (size_t source = 0; source < sources.size(); ++source) {
      std::vector<uint8_t> bytes(size);
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(sources[source]());
      EXPECT_EQ(fletcher32(std::as_bytes(std::span(bytes))),
                stored_checksum(folder.file("bytes.h5"), bytes))
          << size << " bytes of source " << source;
    }
}

TEST(AllBelow, SeesOneValueAtAnyPlace) {
  std::vector<uint32_t> tokens(100, 49'151);
  std::vector<uint8_t> mask(300, 1);
  EXPECT_TRUE(all_below(tokens, 49'152));
  EXPECT_TRUE(all_below(mask, 2));
  EXPECT_TRUE(all_below(std::span<const uint32_t>(), 1));
  for (uint32_t& token : tokens) {
    token = 0x8000'0000;
    EXPECT_FALSE(all_below(tokens, 49'152));
    token = 0;
  }
  for (uint8_t& value : mask) {
    value = 255;
    EXPECT_FALSE(all_below(mask, 2));
    value = 0;
  }
}

}  // namespace
}  // namespace graft::data
