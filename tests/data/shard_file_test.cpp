// Token shards: what is written is read; what is foreign or dishonest is refused by name.
#include "data/shard_file.h"

#include <gtest/gtest.h>

#include <functional>

#include "tests/data/shard_fixture.h"

namespace graft::data {
namespace {

// --- the C API, as another program would use it ---

void put_attribute(hid_t file, const char* name, int64_t value) {
  if (H5Aexists(file, name) > 0) H5Adelete(file, name);
  const hid_t space = H5Screate(H5S_SCALAR);
  const hid_t attribute = H5Acreate2(file, name, H5T_NATIVE_INT64, space, H5P_DEFAULT, H5P_DEFAULT);
  ASSERT_GE(H5Awrite(attribute, H5T_NATIVE_INT64, &value), 0);
  H5Aclose(attribute);
  H5Sclose(space);
}

hid_t variable_string() {
  const hid_t type = H5Tcopy(H5T_C_S1);
  H5Tset_size(type, H5T_VARIABLE);
  H5Tset_cset(type, H5T_CSET_UTF8);
  return type;
}

void put_attribute(hid_t file, const char* name, const char* value) {
  if (H5Aexists(file, name) > 0) H5Adelete(file, name);
  const hid_t space = H5Screate(H5S_SCALAR), type = variable_string();
  const hid_t attribute = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  ASSERT_GE(H5Awrite(attribute, type, &value), 0);
  H5Aclose(attribute);
  H5Tclose(type);
  H5Sclose(space);
}

void put_dataset(hid_t file, const char* name, hid_t type, const std::vector<hsize_t>& dims,
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

TEST_F(ShardTest, ReadsWhatWasWritten) {
  write_token_shard(path_, content_);
  const TokenShard shard(path_);
  EXPECT_EQ(shard.num_samples(), 6);
  EXPECT_EQ(shard.length(2), 0);
  EXPECT_EQ(shard.length(4), 300'000);
  EXPECT_EQ(shard.begin(3), 6);
  EXPECT_EQ(shard.created_by(), content_.created_by);
  EXPECT_EQ(shard.tokenizer_sha256(), content_.tokenizer_sha256);
  EXPECT_EQ(shard.vocab_size(), kTestVocabulary);
  EXPECT_FALSE(shard.labels().has_value());
  const Samples all = read_all(shard);
  EXPECT_EQ(all.tokens, content_.tokens);
  EXPECT_EQ(all.loss_mask, content_.loss_mask);
}

TEST_F(ShardTest, ReadsAnyRunOfTokens) {
  write_token_shard(path_, content_);
  const TokenShard shard(path_);
  for (const int64_t begin : {0, 4, 262'142, 300'014}) expect_reads(shard, begin, 4);
}

TEST_F(ShardTest, LeavesNoTemporaryFile) {
  write_token_shard(path_, content_);
  EXPECT_FALSE(std::filesystem::exists(path_ + ".partial"));
}

TEST_F(ShardTest, ReadsLabels) {
  content_.labels = ShardLabels{
      {0, 1, 1, 0, 2, 2}, {"no", "yes", "per\xc3\xb2"}, {7, 1, 8, 9, 1, 5, 1}, {0, 2, 5, 7}};
  write_token_shard(path_, content_);
  const TokenShard shard(path_);
  ASSERT_TRUE(shard.labels().has_value());
  EXPECT_EQ(shard.labels()->of_sample, content_.labels->of_sample);
  EXPECT_EQ(shard.labels()->names, content_.labels->names);
  EXPECT_EQ(shard.labels()->tokens, content_.labels->tokens);
  EXPECT_EQ(shard.labels()->offsets, content_.labels->offsets);
}

TEST_F(ShardTest, ReadsAFileAsH5pyWritesItByDefault) {
  // Earliest format, contiguous, variable-length strings, no checksum; big-endian tokens on top.
  const hid_t file = H5Fcreate(path_.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  put_attribute(file, "graft_schema", 1);
  put_attribute(file, "kind", "tokens");
  put_attribute(file, "created_by", "h5py");
  put_attribute(file, "tokenizer_sha256", content_.tokenizer_sha256.c_str());
  put_attribute(file, "num_samples", 2);
  put_attribute(file, "vocab_size", 100);
  put_attribute(file, "a_note_of_the_user", "kept out of our way");
  const uint32_t tokens[] = {1, 2, 3, 4, 99},
                 swapped[] = {1u << 24, 2u << 24, 3u << 24, 4u << 24, 99u << 24};
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
  H5Fclose(file);

  const TokenShard shard(path_);
  EXPECT_EQ(shard.created_by(), "h5py");
  EXPECT_EQ(shard.num_samples(), 2);
  EXPECT_EQ(read_all(shard).tokens, std::vector<uint32_t>(tokens, tokens + 5));
  EXPECT_EQ(read_all(shard).loss_mask, std::vector<uint8_t>(mask, mask + 5));
  EXPECT_EQ(shard.labels()->names, (std::vector<std::string>{"bad", "good"}));
}

TEST_F(ShardTest, ReadsCompressedChunks) {
  const std::string message = refused_after([&](hid_t file) {
    const hid_t create = H5Pcreate(H5P_DATASET_CREATE);
    const hsize_t chunk = 4096, size = content_.tokens.size();
    H5Pset_chunk(create, 1, &chunk);
    H5Pset_shuffle(create);
    H5Pset_deflate(create, 9);
    put_dataset(file, "tokens", H5T_NATIVE_UINT32, {size}, content_.tokens.data(), create);
    put_dataset(file, "loss_mask", H5T_NATIVE_UINT8, {size}, content_.loss_mask.data(), create);
    H5Pclose(create);
  });
  EXPECT_EQ(message, "");
  EXPECT_EQ(read_all(TokenShard(path_)).tokens, content_.tokens);
}

TEST_F(ShardTest, ReadsTheSameFromEveryStorage) {
  const hsize_t size = content_.tokens.size();
  struct Storage {
    hsize_t chunk;  // 0: contiguous
    std::vector<herr_t (*)(hid_t)> filters;
  };
  const std::vector<Storage> storages = {{0, {}},
                                         {1000, {}},
                                         {1000, {H5Pset_fletcher32}},
                                         {size, {H5Pset_fletcher32}},
                                         {50, {H5Pset_fletcher32}},  // more chunks than we look up
                                         {1000, {H5Pset_shuffle, H5Pset_fletcher32}}};
  for (size_t i = 0; i < storages.size(); ++i) {
    const std::string message = refused_after([&](hid_t file) {
      const hid_t create = H5Pcreate(H5P_DATASET_CREATE);
      if (storages[i].chunk > 0) H5Pset_chunk(create, 1, &storages[i].chunk);
      for (const auto set_filter : storages[i].filters) set_filter(create);
      put_dataset(file, "tokens", H5T_NATIVE_UINT32, {size}, content_.tokens.data(), create);
      put_dataset(file, "loss_mask", H5T_NATIVE_UINT8, {size}, content_.loss_mask.data(), create);
      H5Pclose(create);
    });
    ASSERT_EQ(message, "") << "storage " << i;
    const TokenShard shard(path_);
    expect_reads(shard, 299'990, 20);  // parts of chunks, over their ends
    expect_reads(shard, 995, 10);
    expect_reads(shard, 0, content_.tokens.size());
  }
}

TEST_F(ShardTest, ReadsManyRunsInOneCall) {
  write_token_shard(path_, content_);
  const std::vector<TokenShard::Run> runs = {{299'000, 700}, {3, 0}, {262'140, 9}, {6, 2}};
  Samples read{std::vector<uint32_t>(711), std::vector<uint8_t>(711)}, expected;
  TokenShard(path_).read(runs, read.tokens, read.loss_mask);
  for (const auto& [begin, length] : runs) {
    const auto append = [&](auto& to, const auto& from) {
      to.insert(to.end(), from.begin() + begin, from.begin() + begin + length);
    };
    append(expected.tokens, content_.tokens);
    append(expected.loss_mask, content_.loss_mask);
  }
  EXPECT_EQ(read.tokens, expected.tokens);
  EXPECT_EQ(read.loss_mask, expected.loss_mask);
}

TEST_F(ShardTest, RefusesWhatIsNoShard) {
  EXPECT_NE(refusal(folder_.file("absent.h5")).find("no such file"), std::string::npos);
  std::filesystem::create_directory(path_);
  EXPECT_NE(refusal(path_).find("not a regular file"), std::string::npos);
  const std::string text = folder_.file("text.h5");
  write_bytes(text, "tokens: 1 2 3\n");
  EXPECT_NE(refusal(text).find("cannot open as HDF5"), std::string::npos);
}

TEST_F(ShardTest, RefusesAnotherSchemaOrKind) {
  EXPECT_NE(
      refused_after([](hid_t f) { put_attribute(f, "graft_schema", 2); }).find("graft_schema is 2"),
      std::string::npos);
  EXPECT_NE(refused_after([](hid_t f) { put_attribute(f, "kind", "latents"); }).find("'latents'"),
            std::string::npos);
}

TEST_F(ShardTest, RefusesAMissingAttributeOrDataset) {
  for (const char* name :
       {"graft_schema", "kind", "num_samples", "created_by", "tokenizer_sha256", "vocab_size"}) {
    const std::string message = refused_after([&](hid_t file) { H5Adelete(file, name); });
    EXPECT_NE(message.find("'" + std::string(name) + "' is missing"), std::string::npos) << message;
  }
  for (const char* name : {"tokens", "offsets", "loss_mask"}) {
    const std::string message =
        refused_after([&](hid_t file) { H5Ldelete(file, name, H5P_DEFAULT); });
    EXPECT_NE(message.find("'" + std::string(name) + "' is missing"), std::string::npos) << message;
  }
}

TEST_F(ShardTest, RefusesWrongTypesAndExtents) {
  const hsize_t n = content_.tokens.size();
  EXPECT_NE(refused_after([&](hid_t f) {
              put_dataset(f, "tokens", H5T_NATIVE_INT32, {n}, content_.tokens.data());
            }).find("must be uint32"),
            std::string::npos);
  EXPECT_NE(refused_after([&](hid_t f) {
              put_dataset(f, "tokens", H5T_NATIVE_FLOAT, {n}, content_.tokens.data());
            }).find("must be uint32"),
            std::string::npos);
  EXPECT_NE(refused_after([&](hid_t f) {
              put_dataset(f, "loss_mask", H5T_NATIVE_UINT8, {1, n}, content_.loss_mask.data());
            }).find("one dimension"),
            std::string::npos);
  EXPECT_NE(refused_after([&](hid_t f) {
              put_dataset(f, "loss_mask", H5T_NATIVE_UINT8, {n - 1}, content_.loss_mask.data());
            }).find("'loss_mask' 300017"),
            std::string::npos);
  EXPECT_NE(
      refused_after([](hid_t f) { put_attribute(f, "num_samples", 5); }).find("num_samples is 5"),
      std::string::npos);
  EXPECT_NE(refused_after([](hid_t f) {
              put_attribute(f, "vocab_size", "many");
            }).find("must be an integer"),
            std::string::npos);
  EXPECT_NE(refused_after([](hid_t f) {
              put_attribute(f, "vocab_size", int64_t{0});
            }).find("vocab_size is 0"),
            std::string::npos);
}

TEST_F(ShardTest, RefusesOffsetsThatDoNotRiseToTheEnd) {
  const uint64_t end = content_.tokens.size();
  for (const std::vector<uint64_t>& offsets : {std::vector<uint64_t>{0, 5, 4, 6, 15, 300'015, end},
                                               {1, 5, 6, 6, 15, 300'015, end},
                                               {0, 5, 6, 6, 15, 300'015, end + 1},
                                               {0, 5, 6, 6, 15, ~uint64_t{0}, end}}) {
    const std::string message = refused_after(
        [&](hid_t file) { put_dataset(file, "offsets", H5T_NATIVE_UINT64, {7}, offsets.data()); });
    EXPECT_NE(message.find("'offsets' must rise"), std::string::npos) << message;
  }
}

TEST_F(ShardTest, NamesTheRowOfABadValue) {
  content_.tokens[7] = kTestVocabulary;  // in row 3, after lengths 5, 1, 0
  write_token_shard(path_, content_);
  EXPECT_NE(refusal(path_).find("row 3: token 16777216"), std::string::npos) << refusal(path_);
  content_.tokens[7] = 0;
  content_.loss_mask[300'017] = 2;
  write_token_shard(path_, content_);
  EXPECT_NE(refusal(path_).find("row 5: loss_mask is 2"), std::string::npos) << refusal(path_);
}

TEST_F(ShardTest, RefusesWhatLeadsOutOfTheFile) {
  const hsize_t n = content_.tokens.size();
  EXPECT_NE(refused_after([](hid_t f) {
              H5Lmove(f, "tokens", f, "label", H5P_DEFAULT, H5P_DEFAULT);
              H5Lcreate_soft("/label", f, "tokens", H5P_DEFAULT, H5P_DEFAULT);
            }).find("'tokens' is a link"),
            std::string::npos);
  EXPECT_NE(refused_after([](hid_t f) {
              H5Ldelete(f, "tokens", H5P_DEFAULT);
              H5Lcreate_external("/etc/passwd", "/tokens", f, "tokens", H5P_DEFAULT, H5P_DEFAULT);
            }).find("'tokens' is a link"),
            std::string::npos);
  EXPECT_NE(refused_after([&](hid_t f) {
              const hid_t create = H5Pcreate(H5P_DATASET_CREATE);
              H5Pset_external(create, "/etc/passwd", 0, H5F_UNLIMITED);
              put_dataset(f, "loss_mask", H5T_NATIVE_UINT8, {n}, nullptr, create);
              H5Pclose(create);
            }).find("outside this file"),
            std::string::npos);
  EXPECT_NE(refused_after([&](hid_t f) {
              const hid_t create = H5Pcreate(H5P_DATASET_CREATE);
              const hid_t space = H5Screate_simple(1, &n, nullptr);
              H5Pset_virtual(create, space, "other.h5", "/loss_mask", space);
              put_dataset(f, "loss_mask", H5T_NATIVE_UINT8, {n}, nullptr, create);
              H5Sclose(space);
              H5Pclose(create);
            }).find("outside this file"),
            std::string::npos);
}

TEST_F(ShardTest, RefusesOtherFiltersUnknownDatasetsAndHoles) {
  const hsize_t n = content_.tokens.size(), chunk = 1000;
  EXPECT_NE(refused_after([&](hid_t f) {
              const hid_t create = H5Pcreate(H5P_DATASET_CREATE);
              H5Pset_chunk(create, 1, &chunk);
              H5Pset_scaleoffset(create, H5Z_SO_INT, 0);
              put_dataset(f, "tokens", H5T_NATIVE_UINT32, {n}, content_.tokens.data(), create);
              H5Pclose(create);
            }).find("uses HDF5 filter 6"),
            std::string::npos);
  EXPECT_NE(refused_after([](hid_t f) {
              const uint8_t value = 0;
              put_dataset(f, "weights", H5T_NATIVE_UINT8, {1}, &value);
            }).find("'weights' is not part"),
            std::string::npos);
  EXPECT_NE(refused_after([&](hid_t f) {  // claims a size that nobody wrote
              const hid_t create = H5Pcreate(H5P_DATASET_CREATE);
              H5Pset_chunk(create, 1, &chunk);
              put_dataset(f, "offsets", H5T_NATIVE_UINT64, {hsize_t{1} << 50}, nullptr, create);
              H5Pclose(create);
            })
                .find("the file is incomplete"),
            std::string::npos);
}

TEST_F(ShardTest, RefusesLabelsThatDoNotAgree) {
  const ShardLabels good{{0, 1, 1, 0, 1, 1}, {"no", "yes"}, {7, 1, 8}, {0, 2, 3}};
  const auto message = [&](const std::function<void(ShardLabels&)>& change) {
    content_.labels = good;
    change(*content_.labels);
    write_token_shard(path_, content_);
    return refusal(path_);
  };
  EXPECT_EQ(message([](ShardLabels&) {}), "");
  EXPECT_NE(message([](ShardLabels& l) { l.of_sample[4] = 2; }).find("row 4 has label 2"),
            std::string::npos);
  EXPECT_NE(message([](ShardLabels& l) { l.of_sample.pop_back(); }).find("one element a sample"),
            std::string::npos);
  EXPECT_NE(message([](ShardLabels& l) {
              l.offsets = {0, 3};
            }).find("one more than"),
            std::string::npos);
  EXPECT_NE(message([](ShardLabels& l) { l.offsets[2] = 9; }).find("'label_offsets' must rise"),
            std::string::npos);
  EXPECT_NE(message([](ShardLabels& l) { l.tokens[1] = kTestVocabulary; }).find("'label_tokens'"),
            std::string::npos);
}

}  // namespace
}  // namespace graft::data
