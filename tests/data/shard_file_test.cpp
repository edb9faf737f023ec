// Token shards: what is written is read; what is foreign or dishonest is refused by name.
#include "data/shard_file.h"

#include <gtest/gtest.h>

#include <functional>

#include "tests/data/shard_fixture.h"

namespace graft::data {
namespace {

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

TEST_F(ShardTest, ReadsLabelsOfTokensAndRefusesThoseOutOfRange) {
  content_.labels = ShardLabels{.names = {"a", "b", "c"}};
  for (size_t i = 0; i < content_.tokens.size(); ++i)
    content_.labels->of_token.push_back(static_cast<uint32_t>(i % 3));
  write_token_shard(path_, content_);
  const std::vector<TokenShard::Run> runs = {{299'000, 3}, {4, 2}};
  std::vector<uint32_t> read(5);
  TokenShard(path_).read_token_labels(runs, read);
  EXPECT_EQ(read, (std::vector<uint32_t>{299'000 % 3, 299'001 % 3, 299'002 % 3, 1, 2}));
  content_.labels->of_token[5] = 3;
  write_token_shard(path_, content_);
  const TokenShard bad(path_);
  EXPECT_THROW(bad.read_token_labels(runs, read), Error);
  content_.labels->of_token.pop_back();
  write_token_shard(path_, content_);
  EXPECT_NE(refusal(path_).find("'token_labels'"), std::string::npos);
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
