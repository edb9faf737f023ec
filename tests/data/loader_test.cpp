// The schedule is the same at any rank count, seekable, and holds every document once; bad
// documents stay in place.
#include "data/loader.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <map>

#include "configs/check.h"
#include "data/collate.h"
#include "tests/data/shards.h"

namespace graft::data {
namespace {

/// Three shards of 101, 57 and 42 documents; a loader over them.
class LoaderTest : public testing::Test {
 protected:
  LoaderTest() {
    int64_t first = 0;
    for (const int64_t count : {101, 57, 42}) {
      std::vector<int64_t> lengths = realistic_lengths(count, 5 + first);
      lengths[3] = 700;  // longer than max_length
      write_token_shard(folder_.file("part-" + std::to_string(first + 1000) + ".h5"),
                        test_content(lengths, first));
      first += count;
    }
    config_.files = {folder_.file("part-*.h5")};
    config_.max_length = 512;
    config_.seed = 42;
    config_.num_lanes = 4;
    config_.num_local_lanes = 4;
  }

  TemporaryFolder folder_;
  LoaderConfig config_;
};

std::string fingerprint(const Batch& batch) {
  std::string bytes;
  for (const at::Tensor& t :
       {batch.tokens_BL, batch.positions_BL, batch.documents_BL, batch.labels_BL}) {
    bytes.append(reinterpret_cast<const char*>(t.sizes().data()), 8 * t.dim());
    bytes.append(static_cast<const char*>(t.data_ptr()), t.nbytes());
  }
  return bytes + std::to_string(batch.num_targets) + "/" + std::to_string(batch.num_tokens);
}

/// The lanes of `steps` steps, in their order, as `ranks` ranks see them together.
std::vector<std::string> lanes_of(LoaderConfig config, int64_t ranks, int64_t steps,
                                  Cursor from = {}) {
  std::vector<std::vector<std::string>> by_step(steps);
  config.num_local_lanes = config.num_lanes / ranks;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    config.first_lane = rank * config.num_local_lanes;
    Loader loader(config);
    loader.seek(from);
    for (auto& lanes : by_step)
      for (const Batch& batch : loader.next().lanes) lanes.push_back(fingerprint(batch));
  }
  std::vector<std::string> all;
  for (auto& lanes : by_step) all.insert(all.end(), lanes.begin(), lanes.end());
  return all;
}

TEST_F(LoaderTest, GivesTheSameLanesToOneTwoAndFourRanks) {
  for (const Packing packing : {Packing::kOn, Packing::kOff}) {
    config_.packing = packing;
    config_.rows_per_lane = 2;
    const auto one = lanes_of(config_, 1, 60);
    EXPECT_EQ(one, lanes_of(config_, 2, 60));
    EXPECT_EQ(one, lanes_of(config_, 4, 60));
  }
}

TEST_F(LoaderTest, ServesThreeRanksWhenRowsDoNotDivide) {
  config_.num_lanes = 3;
  config_.packing = Packing::kOff;  // 200 documents: the last step of 67 has 2 lanes
  const auto lanes = lanes_of(config_, 3, 67);
  EXPECT_EQ(lanes, lanes_of(config_, 1, 67));

  config_.first_lane = 2;
  config_.num_local_lanes = 1;
  Loader last_rank(config_);
  Loader::Step step;
  for (int i = 0; i < 67; ++i) step = last_rank.next();
  EXPECT_TRUE(step.last_of_epoch);
  EXPECT_TRUE(step.lanes[0].empty());
  EXPECT_EQ(step.lanes[0].tokens_BL.sizes(), at::IntArrayRef({1, 8}));
  EXPECT_EQ(step.next, (Cursor{1, 0}));
}

TEST_F(LoaderTest, SeekReproducesTheRestExactly) {
  Loader golden(config_);
  std::vector<Cursor> cursors = {golden.cursor()};
  const int64_t steps = golden.steps_in_epoch(0) + 3;  // over the end of the epoch
  for (int64_t i = 0; i < steps; ++i) cursors.push_back(golden.next().next);
  const auto all = lanes_of(config_, 1, steps);
  for (int64_t at = 0; at < steps; ++at) {
    const auto rest = lanes_of(config_, at % 2 ? 2 : 4, steps - at, cursors[at]);
    EXPECT_EQ(rest, std::vector(all.begin() + at * config_.num_lanes, all.end())) << at;
  }
}

TEST_F(LoaderTest, HoldsEveryDocumentOnceAnEpochWithAllItsTokens) {
  for (const Packing packing : {Packing::kOn, Packing::kOff}) {
    config_.packing = packing;
    config_.num_epochs = 2;
    Loader loader(config_);
    for (int64_t epoch = 0; epoch < 2; ++epoch) {
      std::map<int64_t, int64_t> tokens_of;  // document to tokens seen; a token names its document
      int64_t steps = 0;
      for (bool last = false; !last; ++steps) {
        const Loader::Step step = loader.next();
        EXPECT_EQ(step.epoch, epoch);
        last = step.last_of_epoch;
        for (const Batch& batch : step.lanes) {
          const at::Tensor real = batch.tokens_BL.masked_select(batch.documents_BL.ge(0));
          for (int64_t i = 0; i < real.numel(); ++i) ++tokens_of[real[i].item<int64_t>() / 4096];
        }
      }
      EXPECT_EQ(steps, loader.steps_in_epoch(epoch));
      ASSERT_EQ(tokens_of.size(), 200u);
      for (const auto& [document, tokens] : tokens_of)
        ASSERT_EQ(tokens, std::min<int64_t>(loader.corpus().length(document), 512)) << document;
    }
    EXPECT_EQ(loader.fractional_epoch(), 2.0);
    EXPECT_THROW(loader.next(), Error);
  }
}

TEST_F(LoaderTest, CountsTheDocumentsItCuts) {
  Loader loader(config_);
  int64_t expected = 0;
  for (int64_t d = 0; d < 200; ++d) expected += loader.corpus().length(d) > 512;
  EXPECT_GE(expected, 3);
  EXPECT_EQ(loader.num_cut_documents(), expected);
}

TEST_F(LoaderTest, PacksRealisticLengthsDensely) {
  write_token_shard(folder_.file("many.h5"), test_content(realistic_lengths(4000, 1)));
  config_.files = {folder_.file("many.h5")};
  config_.max_length = 2048;
  Loader loader(config_);
  double used = 0, room = 0;
  for (Cursor cursor; cursor.epoch == 0;) {
    const StepLayout step = loader.layout(cursor);
    cursor = step.next;
    if (step.last_of_epoch) break;
    for (const Placement& p : step.placements) used += static_cast<double>(p.length);
    room += 4 * 2048;
  }
  RecordProperty("fill", std::to_string(used / room));
  std::printf("packed fill rate: %.3f (4 rows of 2048 a step)\n", used / room);
  EXPECT_GT(used / room, 0.85);
}

TEST_F(LoaderTest, FirstFitAgreesWithTheDirectSearch) {
  config_.num_lanes = config_.num_local_lanes = 5;
  Loader loader(config_);
  for (Cursor cursor; cursor.epoch == 0;) {
    const StepLayout step = loader.layout(cursor);
    std::vector<int64_t> used(5, 0);
    for (const Placement& p : step.placements) {
      int64_t row = 0;
      while (used[row] + p.length > 512) ++row;
      ASSERT_EQ(p.row, row);
      ASSERT_EQ(p.column, used[row]);
      used[row] += p.length;
    }
    cursor = step.next;
  }
}

TEST_F(LoaderTest, WithoutShufflingDealsOutTheFirstSamplesInFileOrder) {
  config_.shuffle = Shuffle::kOff;
  config_.packing = Packing::kOff;
  config_.max_samples = 110;  // into the second file
  config_.num_epochs = 1;
  Loader loader(config_);
  std::vector<int64_t> documents;
  for (bool last = false; !last;) {
    const Loader::Step step = loader.next();
    last = step.last_of_epoch;
    for (const Batch& batch : step.lanes)
      if (!batch.empty()) documents.push_back(batch.tokens_BL[0][0].item<int64_t>() / 4096);
  }
  std::vector<int64_t> expected(110);
  for (int64_t i = 0; i < 110; ++i) expected[i] = i;
  EXPECT_EQ(documents, expected);
}

TEST_F(LoaderTest, PadsUnpackedLanesToAMultipleOf8) {
  config_.packing = Packing::kOff;
  Loader loader(config_);
  for (int i = 0; i < 20; ++i) {
    const Loader::Step step = loader.next();
    for (size_t lane = 0; lane < 4; ++lane) {
      const int64_t longest = step.placements[lane].length;  // one document a lane, in order
      EXPECT_EQ(step.lanes[lane].tokens_BL.size(1), (longest + 7) / 8 * 8);
    }
  }
}

/// Damages one document of the second shard so that its chunk's checksum fails.
class DamagedLoaderTest : public LoaderTest {
 protected:
  DamagedLoaderTest() : path_(folder_.file("part-1101.h5")), healthy_(read_bytes(path_)) {
    std::string damaged = healthy_;
    const size_t at = find_tokens(damaged, test_tokens(101 + 20, 2));
    damaged.at(at) ^= 1;
    write_bytes(path_, damaged);
  }
  std::string path_, healthy_;
};

TEST_F(DamagedLoaderTest, StopsNamingFileAndRow) {
  config_.shuffle = Shuffle::kOff;
  Loader loader(config_);
  try {
    for (;;) ASSERT_FALSE(loader.next().last_of_epoch);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kData);
    // The whole shard is one chunk here, so its first row is the first that cannot be read.
    EXPECT_NE(std::string(error.what()).find("part-1101.h5: row 0"), std::string::npos)
        << error.what();
    EXPECT_NE(std::string(error.what()).find("letcher32"), std::string::npos) << error.what();
  }
}

TEST_F(DamagedLoaderTest, SkippingLeavesTheOthersInPlaceAndReportsEachRowOnce) {
  config_.on_bad_sample = OnBadSample::kSkip;
  std::vector<BadSample> bad;
  config_.report = [&](const BadSample& sample) { bad.push_back(sample); };
  Loader loader(config_);
  const int64_t steps = loader.steps_in_epoch(0) + loader.steps_in_epoch(1);
  std::vector<Loader::Step> damaged;
  for (int64_t i = 0; i < steps; ++i) damaged.push_back(loader.next());
  ASSERT_EQ(bad.size(), 57u);  // not twice, although two epochs met them
  for (const BadSample& sample : bad) {
    EXPECT_EQ(sample.file, path_);
    EXPECT_EQ(sample.document, 101 + sample.row);
  }
  EXPECT_EQ(loader.skipped().size(), 57u);

  write_bytes(path_, healthy_);
  Loader whole(config_);
  for (int64_t i = 0; i < steps; ++i) {
    const Loader::Step step = whole.next();
    for (size_t lane = 0; lane < step.lanes.size(); ++lane) {
      const Batch& expected = step.lanes[lane];
      const Batch& actual = damaged[i].lanes[lane];
      const at::Tensor kept = actual.documents_BL.ge(0);
      EXPECT_TRUE(actual.tokens_BL.equal(expected.tokens_BL * kept));
      EXPECT_TRUE(actual.labels_BL.equal(at::where(kept, expected.labels_BL, kNoLabel)));
      const at::Tensor lost = expected.documents_BL.ge(0).logical_and(kept.logical_not());
      const at::Tensor owners = expected.tokens_BL.masked_select(lost).div(4096, "floor");
      EXPECT_TRUE(owners.ge(101).logical_and(owners.lt(158)).all().item<bool>());
    }
  }
}

TEST_F(DamagedLoaderTest, ASkipListIsRepeatedAfterTheFileHealed) {
  config_.on_bad_sample = OnBadSample::kSkip;
  Loader damaged(config_);
  std::vector<std::string> golden;
  const int64_t steps = damaged.steps_in_epoch(0);
  for (int64_t i = 0; i < 2 * steps; ++i)
    for (const Batch& batch : damaged.next().lanes) golden.push_back(fingerprint(batch));

  write_bytes(path_, healthy_);
  Loader healed(config_);
  for (const int64_t document : damaged.skipped()) healed.skip(document);
  std::vector<std::string> again;
  for (int64_t i = 0; i < 2 * steps; ++i)
    for (const Batch& batch : healed.next().lanes) again.push_back(fingerprint(batch));
  EXPECT_EQ(golden, again);
}

TEST_F(LoaderTest, ASkipTakesEffectInStepsThatAreAlreadyPrefetched) {
  Loader loader(config_);
  const Loader::Step first = loader.next();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // lets the producer run ahead
  const int64_t document = loader.layout(first.next).placements.front().document;
  loader.skip(document);
  const Loader::Step second = loader.next();
  for (const Batch& batch : second.lanes)
    EXPECT_FALSE(batch.tokens_BL.div(4096, "floor")
                     .eq(document)
                     .logical_and(batch.documents_BL.ge(0))
                     .any()
                     .item<bool>());
}

TEST_F(LoaderTest, RefusesWhatItCannotServe) {
  config_.files = {folder_.file("nothing-*.h5")};
  EXPECT_THROW(Loader{config_}, Error);

  TokenShardContent other = test_content({5, 6});
  other.tokenizer_sha256 = std::string(64, 'b');
  write_token_shard(folder_.file("other.h5"), other);
  config_.files = {folder_.file("part-*.h5"), folder_.file("other.h5")};
  EXPECT_THROW(Loader{config_}, Error);

  config_.files = {folder_.file("part-*.h5")};
  Loader loader(config_);
  EXPECT_THROW(loader.seek({0, 200}), Error);
}

TEST_F(LoaderTest, StopsItsThreadWhenItGoesAtAnyMoment) {
  for (int i = 0; i < 50; ++i) {
    Loader loader(config_);
    for (int j = 0; j < i % 4; ++j) loader.next();
  }
}

}  // namespace
}  // namespace graft::data
