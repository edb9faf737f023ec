// The loader: shards to the lanes of each step. What a step holds is a pure function of (files,
// seed, cursor, rows of the step, max_length), computed from document lengths alone; so every rank
// lays out the whole step the same way, reads only the tokens of its own lanes, and a cursor of two
// integers is all there is to resume.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "data/batch.h"
#include "data/collate.h"
#include "data/shard_file.h"

namespace graft::data {

/// Where a run is in its data: the next document of an epoch's order. Always the start of a step.
struct Cursor {
  int64_t epoch = 0;
  int64_t position = 0;
  bool operator==(const Cursor&) const = default;
};

/// A document that could not be read.
struct BadSample {
  std::string file;
  int64_t row = 0;
  int64_t document = 0;  ///< number over all files in order: what a skip list holds
  std::string reason;    ///< names file and row
};

enum class Packing { kOff, kOn };
enum class Shuffle { kOff, kOn };
enum class OnBadSample { kStop, kSkip };

/// What is predicted: the tokens that are targets, a sample's label, or those of its tokens.
enum class Predict { kTokens, kSampleLabels, kTokenLabels };

struct LoaderConfig {
  std::vector<std::string> files;  ///< paths or globs; the matches of a glob are sorted
  int64_t max_length = 0;          ///< columns of a row; longer documents are cut
  Packing packing = Packing::kOn;  ///< off: one document a row
  Shuffle shuffle = Shuffle::kOn;  ///< off: documents in file order
  uint64_t seed = 0;
  int64_t rows_per_lane = 1;
  int64_t num_lanes = 1;                        ///< of a step, over all ranks
  int64_t first_lane = 0, num_local_lanes = 1;  ///< the lanes of this rank
  int64_t max_samples = 0;                      ///< only the first so many documents; 0: all
  int64_t num_epochs =
      0;  ///< next() may be called until these are done; 0: without end. Evaluation: 1
  /// Of sample labels: a document that ends with the tokens of its own label, as targets, is read
  /// up to these.
  Predict predict = Predict::kTokens;
  OnBadSample on_bad_sample = OnBadSample::kStop;
  std::function<void(const BadSample&)> report = nullptr;  ///< called inside next(), for own lanes
};

/// A document's place in a step.
struct Placement {
  int64_t document = 0;  ///< number over all files in order
  int64_t row = 0;       ///< of the whole step; lane = row / rows_per_lane
  int64_t column = 0;
  int64_t length = 0;  ///< tokens kept
};

/// The documents of a step.
struct StepLayout {
  std::vector<Placement> placements;  ///< in the order of the epoch
  Cursor next;
  bool last_of_epoch = false;
};

/// The shards of a run as one list of documents.
class Corpus {
 public:
  /// @throws graft::Error (kData) if a pattern matches nothing, a shard is refused, tokenizers
  /// differ or all are empty
  explicit Corpus(const std::vector<std::string>& files);

  int64_t num_documents() const { return first_document_.back(); }
  int64_t length(int64_t document) const;
  struct Place {
    const TokenShard* shard;
    int64_t row;
  };
  Place locate(int64_t document) const;
  const std::vector<TokenShard>& shards() const { return shards_; }
  /// The names of the labels that are predicted; none for tokens.
  /// @throws graft::Error (kData) if a shard has no such labels, or others
  std::vector<std::string> label_names(Predict predict) const;

 private:
  std::vector<TokenShard> shards_;
  std::vector<int64_t> first_document_ = {0};  // [shards + 1]
};

class Loader {
 public:
  /// One step, as this rank sees it.
  struct Step {
    std::vector<Batch> lanes;           ///< num_local_lanes; on the CPU
    std::vector<Placement> placements;  ///< of these lanes
    int64_t epoch = 0;
    bool last_of_epoch = false;
    Cursor next;  ///< continues after this step
  };

  explicit Loader(const LoaderConfig& config);

  /// The next step. Packed rows have max_length columns; others are padded to the longest of their
  /// lane, rounded up to a multiple of 8. At the end of an epoch lanes have fewer rows, or one
  /// empty one.
  /// A document that cannot be read, or was skipped before, stays as padding in its place, so that
  /// nothing else moves.
  /// @throws graft::Error (kData) for a bad document unless on_bad_sample is kSkip; the cursor
  /// stays
  Step next();

  /// Continues at `cursor`, which a Step of the same configuration gave; any number of ranks.
  void seek(Cursor cursor);
  Cursor cursor() const { return cursor_; }

  /// From now on, in every epoch, the document is padding: the skip list of a checkpoint, or what
  /// another rank met.
  void skip(int64_t document) { skipped_.insert(document); }
  /// All skipped documents, for the checkpoint.
  const std::set<int64_t>& skipped() const { return skipped_; }

  /// Lays out one step; needs lengths only.
  StepLayout layout(Cursor cursor) const;
  int64_t steps_in_epoch(int64_t epoch) const;
  /// Epochs done, with the fraction of the current one.
  double fractional_epoch() const;
  /// Documents of an epoch that are longer than max_length.
  int64_t num_cut_documents() const;
  int64_t num_documents() const { return num_documents_; }
  /// How long the last next() took: time that training stood still for data.
  double last_wait_ms() const { return last_wait_ms_; }
  const Corpus& corpus() const { return corpus_; }

 private:
  /// The raw documents of a step's own lanes.
  struct Fetched {
    StepLayout layout;  // own placements only
    std::vector<uint32_t> tokens;
    std::vector<uint8_t> loss_mask;
    std::vector<uint32_t> token_labels;  // where these are predicted
    std::vector<int64_t> begins;         // of each placement in tokens
    std::vector<std::string> reasons;    // why a placement could not be read; empty: it was
    std::exception_ptr failure;          // anything else that went wrong
  };

  Fetched fetch(Cursor cursor) const;
  void read_runs(Fetched& fetched) const;
  void produce(std::stop_token stop, Cursor cursor);
  Fetched wait_for_step();
  Step deliver(Fetched fetched);
  bool usable(const Placement& placement, const std::string& reason);
  Piece piece_of(const Fetched& fetched, size_t index) const;
  Batch collate_lane(const Fetched& fetched, const std::vector<bool>& usable, int64_t lane) const;

  LoaderConfig config_;
  Corpus corpus_;
  int64_t num_documents_;
  Cursor cursor_;
  std::set<int64_t> skipped_;
  double last_wait_ms_ = 0;

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<Fetched> ready_;  // guarded by mutex_
  std::jthread producer_;      // last: joined before what it uses goes
};

}  // namespace graft::data
