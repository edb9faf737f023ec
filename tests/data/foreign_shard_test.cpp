// Shards that another program wrote through libhdf5: every storage reads the same, and what libhdf5
// itself would not survive is refused.
#include <zlib.h>

#include "tests/data/shard_fixture.h"

namespace graft::data {
namespace {

/// Earliest format, contiguous, strings of variable length, no checksum: h5py's defaults;
/// big-endian tokens on top.
void write_as_h5py(const std::string& path, hsize_t user_block = 0) {
  const Hdf5Handle create(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  H5Pset_userblock(create.get(), user_block);
  const Hdf5Handle handle(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, create.get(), H5P_DEFAULT),
                          H5Fclose);
  const hid_t file = handle.get();
  put_attribute(file, "graft_schema", 1);
  put_attribute(file, "kind", "tokens");
  put_attribute(file, "created_by", "h5py");
  put_attribute(file, "tokenizer_sha256", std::string(64, 'a').c_str());
  put_attribute(file, "num_samples", 2);
  put_attribute(file, "vocab_size", 100);
  put_attribute(file, "a_note_of_the_user", "kept out of our way");
  const uint32_t swapped[] = {1u << 24, 2u << 24, 3u << 24, 4u << 24, 99u << 24};
  const uint64_t offsets[] = {0, 3, 5};
  const uint8_t mask[] = {0, 1, 1, 0, 1};
  put_dataset(file, "tokens", H5T_STD_U32BE, {5}, swapped);
  put_dataset(file, "offsets", H5T_STD_U64LE, {3}, offsets);
  put_dataset(file, "loss_mask", H5T_STD_U8LE, {5}, mask);
  const int32_t label[] = {1, 0};
  const char* labels[] = {"bad", "good"};
  const uint32_t label_tokens[] = {5, 6};
  const uint64_t label_offsets[] = {0, 1, 2};
  put_dataset(file, "label", H5T_STD_I32LE, {2}, label);
  const hid_t text = variable_string();
  put_dataset(file, "labels", text, {2}, labels);
  H5Tclose(text);
  put_dataset(file, "label_tokens", H5T_STD_U32LE, {2}, label_tokens);
  put_dataset(file, "label_offsets", H5T_STD_U64LE, {3}, label_offsets);
}

using SetFilter = herr_t (*)(hid_t create);

herr_t deflate(hid_t create) { return H5Pset_deflate(create, 6); }
herr_t plain_end(hid_t create) {
  return H5Pset_chunk_opts(create, H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS);
}

class ForeignShardTest : public ShardTest {
 protected:
  /// The healthy shard with its datasets stored in another way; the message if it is refused.
  std::string stored_as(hsize_t chunk, const std::vector<SetFilter>& filters) {
    return refused_after([&](hid_t file) {
      const hsize_t size = content_.tokens.size(), ends = content_.offsets.size();
      const auto put = [&](const char* name, hid_t type, hsize_t size, const void* values) {
        const Hdf5Handle create(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
        const hsize_t elements = std::min(chunk, size);
        if (chunk > 0) H5Pset_chunk(create.get(), 1, &elements);
        for (const auto set_filter : filters) ASSERT_GE(set_filter(create.get()), 0);
        put_dataset(file, name, type, {size}, values, create.get());
      };
      put("tokens", H5T_NATIVE_UINT32, size, content_.tokens.data());
      put("loss_mask", H5T_NATIVE_UINT8, size, content_.loss_mask.data());
      put("offsets", H5T_NATIVE_UINT64, ends, content_.offsets.data());
    });
  }

  void expect_reads_everywhere() {
    const TokenShard shard(path_);
    expect_reads(shard, 299'990, 20);  // parts of chunks, over their ends
    expect_reads(shard, 995, 10);
    expect_reads(shard, 0, static_cast<int64_t>(content_.tokens.size()));
  }

  /// A dataset of deflated chunks of 1000 elements, of which one is then replaced by these bytes.
  void replace_chunk(hid_t file, const char* name, hid_t type, const void* values, hsize_t size,
                     const std::string& bytes, uint32_t skipped_filters = 0) {
    const hsize_t chunk = std::min<hsize_t>(1000, size), start = 0;
    const Hdf5Handle create(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
    H5Pset_chunk(create.get(), 1, &chunk);
    deflate(create.get());
    put_dataset(file, name, type, {size}, values, create.get());
    const Hdf5Handle dataset(H5Dopen2(file, name, H5P_DEFAULT), H5Dclose);
    ASSERT_GE(H5Dwrite_chunk(dataset.get(), H5P_DEFAULT, skipped_filters, &start, bytes.size(),
                             bytes.data()),
              0);
  }
};

/// A whole zlib stream of so many bytes.
std::string deflated(const std::string& bytes) {
  std::string out(compressBound(bytes.size()), '\0');
  uLongf size = out.size();
  compress(reinterpret_cast<Bytef*>(out.data()), &size,
           reinterpret_cast<const Bytef*>(bytes.data()), bytes.size());
  return out.substr(0, size);
}

TEST_F(ForeignShardTest, ReadsAFileAsH5pyWritesItByDefaultAndBehindAUserBlock) {
  for (const hsize_t user_block : {0, 512}) {
    write_as_h5py(path_, user_block);
    const TokenShard shard(path_);
    EXPECT_EQ(shard.created_by(), "h5py");
    EXPECT_EQ(shard.num_samples(), 2);
    EXPECT_EQ(read_all(shard).tokens, (std::vector<uint32_t>{1, 2, 3, 4, 99}));
    EXPECT_EQ(read_all(shard).loss_mask, (std::vector<uint8_t>{0, 1, 1, 0, 1}));
    EXPECT_EQ(shard.labels()->names, (std::vector<std::string>{"bad", "good"}));
  }
}

TEST_F(ForeignShardTest, ReadsTheSameFromEveryStorage) {
  const hsize_t size = content_.tokens.size();
  const std::vector<std::pair<hsize_t, std::vector<SetFilter>>> storages = {
      {0, {}},  // contiguous
      {1000, {}},
      {50, {}},  // more chunks than we look up
      {1000, {H5Pset_fletcher32}},
      {size, {H5Pset_fletcher32}},
      {50, {H5Pset_fletcher32}},
      {1000, {H5Pset_shuffle}},
      {1000, {deflate}},
      {50, {deflate}},
      {1000, {H5Pset_shuffle, deflate}},
      {1000, {deflate, H5Pset_fletcher32}},
      {1000, {H5Pset_shuffle, H5Pset_fletcher32}},
      {1000, {H5Pset_shuffle, deflate, H5Pset_fletcher32}},  // h5py's order
      {1000, {H5Pset_fletcher32, H5Pset_shuffle, deflate}},
      {1000, {H5Pset_fletcher32, deflate, H5Pset_fletcher32}},
      {1000, {H5Pset_shuffle, deflate, plain_end}}};
  for (size_t i = 0; i < storages.size(); ++i) {
    ASSERT_EQ(stored_as(storages[i].first, storages[i].second), "") << "storage " << i;
    expect_reads_everywhere();
  }
}

TEST_F(ForeignShardTest, ReadsCompressedBigEndianTokens) {
  EXPECT_EQ(refused_after([&](hid_t file) {
              std::vector<uint32_t> swapped(content_.tokens);
              for (uint32_t& token : swapped) token = __builtin_bswap32(token);
              const Hdf5Handle create(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
              const hsize_t chunk = 1000;
              H5Pset_chunk(create.get(), 1, &chunk);
              H5Pset_shuffle(create.get());
              deflate(create.get());
              put_dataset(file, "tokens", H5T_STD_U32BE, {swapped.size()}, swapped.data(),
                          create.get());
            }),
            "");
  expect_reads_everywhere();
}

TEST_F(ForeignShardTest, ReadsAChunkWhoseFiltersWereSkipped) {
  EXPECT_EQ(refused_after([&](hid_t file) {
              const std::string bytes(reinterpret_cast<const char*>(content_.tokens.data()), 4000);
              replace_chunk(file, "tokens", H5T_NATIVE_UINT32, content_.tokens.data(),
                            content_.tokens.size(), bytes, 1);
            }),
            "");
  expect_reads_everywhere();
}

TEST_F(ForeignShardTest, RefusesAChunkThatDecompressesToAnotherSize) {
  const uint64_t num_offsets = content_.offsets.size();
  for (const int64_t change : {-1, +1}) {
    const std::string tokens = refused_after([&](hid_t file) {
      replace_chunk(file, "tokens", H5T_NATIVE_UINT32, content_.tokens.data(),
                    content_.tokens.size(), deflated(std::string(4000 + change, '\0')));
    });
    EXPECT_NE(tokens.find("row 0: cannot read: chunk 0: it does not decompress to its 4000 bytes"),
              std::string::npos)
        << tokens;
    const std::string offsets = refused_after([&](hid_t file) {
      replace_chunk(file, "offsets", H5T_NATIVE_UINT64, content_.offsets.data(), num_offsets,
                    deflated(std::string(8 * num_offsets + change, '\0')));
    });
    EXPECT_NE(offsets.find("cannot read 'offsets': chunk 0: it does not decompress to its 56"),
              std::string::npos)
        << offsets;
  }
}

TEST_F(ForeignShardTest, RefusesAChunkOfAnotherSizeWhoseFiltersWereSkipped) {
  const std::string message = refused_after([&](hid_t file) {
    replace_chunk(file, "tokens", H5T_NATIVE_UINT32, content_.tokens.data(), content_.tokens.size(),
                  std::string(16, '\1'), 1);
  });
  EXPECT_NE(message.find("it has 16 bytes instead of 4000"), std::string::npos) << message;
}

TEST_F(ForeignShardTest, RefusesWhatItDoesNotDecompress) {
  EXPECT_NE(stored_as(1000, {deflate, H5Pset_shuffle, deflate}).find("compressed twice"),
            std::string::npos);
  const std::string message = refused_after([&](hid_t file) {
    const Hdf5Handle create(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
    const Hdf5Handle text(variable_string(), H5Tclose);
    const hsize_t chunk = 1;
    H5Pset_chunk(create.get(), 1, &chunk);
    deflate(create.get());
    const char* names[] = {"all"};
    const std::vector<int32_t> label(6);
    put_dataset(file, "label", H5T_NATIVE_INT32, {6}, label.data());
    put_dataset(file, "labels", text.get(), {1}, names, create.get());
  });
  EXPECT_NE(message.find("'labels' has filters on strings of variable length"), std::string::npos)
      << message;
}

TEST_F(ForeignShardTest, SurvivesAnyDamageToTheHeapOfItsStrings) {
  content_ = test_content({5, 3});
  ASSERT_EQ(refused_after([](hid_t file) { put_attribute(file, "kind", "tokens"); }), "");
  const std::string bytes = read_bytes(path_);
  const size_t heap = bytes.find("GCOL");
  ASSERT_NE(heap, std::string::npos);
  const size_t used = 16 + 16 + 8 + 16;  // heads of the heap, its one string and what is free
  int refused = 0;
  for (size_t i = 0; i < used; ++i)
    for (const int flip : {0xff, 0x80, 0x01}) {
      std::string damaged = bytes;
      damaged[heap + i] = static_cast<char>(damaged[heap + i] ^ flip);
      write_bytes(path_, damaged);
      refused += !refusal(path_).empty();
    }
  EXPECT_GT(refused, 50);
}

TEST_F(ForeignShardTest, NamesTheStringsThatHdf5DoesNotSurvive) {
  content_ = test_content({5, 3});
  ASSERT_EQ(refused_after([](hid_t file) { put_attribute(file, "kind", "tokens"); }), "");
  std::string bytes = read_bytes(path_);
  const size_t heap = bytes.find("GCOL");
  ASSERT_NE(heap, std::string::npos);
  std::fill_n(bytes.begin() + heap + 24, 8, '\xff');  // the size of its first object
  write_bytes(path_, bytes);
  EXPECT_NE(refusal(path_).find("'kind' cannot be read: HDF5 fails"), std::string::npos)
      << refusal(path_);
}

}  // namespace
}  // namespace graft::data
