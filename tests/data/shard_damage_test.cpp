// Damaged shards are refused by name or read right, whatever byte is lost.
#include <sys/wait.h>
#include <unistd.h>

#include "tests/data/shard_fixture.h"

namespace graft::data {
namespace {

enum Outcome : int { kRefused = 0, kSameData = 1, kOtherData = 2, kWrongError = 3, kCrashed = 4 };

/// Opens and reads the file in a child, so that a crash inside libhdf5 would be seen as one.
Outcome outcome_of(const std::string& path, const Samples& expected) {
  const pid_t child = ::fork();
  if (child == 0) {
    Outcome outcome = kWrongError;
    try {
      const Samples all = read_all(TokenShard(path));
      const bool same = all.tokens == expected.tokens && all.loss_mask == expected.loss_mask;
      outcome = same ? kSameData : kOtherData;
    } catch (const Error& error) {
      outcome = error.code() == ExitCode::kData ? kRefused : kWrongError;
    } catch (...) {
    }
    ::_exit(outcome);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? static_cast<Outcome>(WEXITSTATUS(status)) : kCrashed;
}

class DamagedShardTest : public ShardTest {
 protected:
  DamagedShardTest() {
    content_ = test_content({400, 900, 30, 650});
    write_token_shard(path_, content_);
    bytes_ = read_bytes(path_);
    expected_ = {content_.tokens, content_.loss_mask};
  }
  std::string bytes_;
  Samples expected_;
};

TEST_F(DamagedShardTest, IsRefusedTruncatedAnywhere) {
  std::vector<size_t> sizes = {0, 1, 8, 48, 96, 512, 4096, bytes_.size() - 1};
  for (size_t i = 1; i < 40; ++i) sizes.push_back(bytes_.size() * i / 40);
  for (const size_t size : sizes) {
    write_bytes(path_, bytes_.substr(0, size));
    EXPECT_EQ(outcome_of(path_, expected_), kRefused) << size << " of " << bytes_.size();
  }
}

TEST_F(DamagedShardTest, WithALostChunkIsRefused) {
  // All zeros, checksum included, so fletcher32 agrees.
  const size_t at = find_tokens(bytes_, test_tokens(0, 400));
  std::fill_n(bytes_.begin() + at, 4 * content_.tokens.size() + 4, '\0');
  write_bytes(path_, bytes_);
  EXPECT_NE(refusal(path_).find("part of the file is lost"), std::string::npos);
}

TEST_F(DamagedShardTest, WithAFlippedByteIsRefusedOnlyWhereItsChunkIsRead) {
  content_ = test_content({200'000, 100'000, 200'000, 50'000});  // chunks of 262,144
  write_token_shard(path_, content_);
  std::string bytes = read_bytes(path_);
  ++bytes[find_tokens(bytes, test_tokens(2, 1000))];  // the first of row 2, in the second chunk
  write_bytes(path_, bytes);
  const TokenShard shard(path_);
  expect_reads(shard, 0, 262'144);
  std::vector<uint32_t> tokens(10);
  std::vector<uint8_t> mask(10);
  for (int attempt = 0; attempt < 2; ++attempt) try {
      shard.read(400'000, tokens, mask);
      ADD_FAILURE() << "was read";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kData);
      EXPECT_NE(std::string(error.what()).find(path_ + ": row 2"), std::string::npos);
      EXPECT_NE(std::string(error.what()).find("letcher32"), std::string::npos) << error.what();
    }
}

TEST_F(DamagedShardTest, ChangedWhileOpenIsRefused) {
  const TokenShard shard(path_);
  std::filesystem::resize_file(path_, bytes_.size() / 2);
  EXPECT_THROW(read_all(shard), Error);
}

TEST_F(DamagedShardTest, ReplacedWhileOpenGoesOnWithTheOldOne) {
  const TokenShard shard(path_);
  std::filesystem::remove(path_);
  write_bytes(path_, "another file");
  EXPECT_EQ(read_all(shard).tokens, content_.tokens);
}

TEST_F(DamagedShardTest, WithFlippedBytesIsRefusedOrReadsTheSame) {
  std::mt19937_64 random(2024);
  int refused = 0;
  for (int i = 0; i < 300; ++i) {
    std::string damaged = bytes_;
    // Every other flip in the first KiB, where most of the metadata lies.
    const size_t at = random() % (i % 2 ? size_t{1024} : damaged.size());
    damaged[at] = static_cast<char>(damaged[at] ^ (1 + random() % 255));
    write_bytes(path_, damaged);
    const Outcome outcome = outcome_of(path_, expected_);
    EXPECT_TRUE(outcome == kRefused || outcome == kSameData) << "byte " << at << ": " << outcome;
    refused += outcome == kRefused;
  }
  EXPECT_GT(refused, 150);  // the flips did hit something
}

}  // namespace
}  // namespace graft::data
