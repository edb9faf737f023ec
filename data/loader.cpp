#include "data/loader.h"

#include <glob.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <numeric>
#include <optional>

#include "configs/check.h"
#include "data/order.h"

namespace graft::data {
namespace {

constexpr size_t kStepsAhead = 2;
constexpr int64_t kColumnMultiple = 8;

std::vector<std::string> expand(const std::string& pattern) {
  glob_t found;
  const int status = ::glob(pattern.c_str(), GLOB_NOSORT, nullptr, &found);
  std::vector<std::string> paths(found.gl_pathv,
                                 found.gl_pathv + (status == 0 ? found.gl_pathc : 0));
  ::globfree(&found);
  GRAFT_CHECK(!paths.empty(), ExitCode::kData, pattern,
              ": no such shard; data files are paths or globs, made by graft prepare");
  std::sort(paths.begin(), paths.end());  // by bytes: the same order under every locale
  return paths;
}

/// First fit over many rows: the first row with room for a document, in O(log rows).
class FirstFit {
 public:
  FirstFit(int64_t rows, int64_t columns)
      : columns_(columns),
        leaves_(std::bit_ceil(static_cast<uint64_t>(rows))),
        room_(2 * leaves_, 0) {
    std::fill_n(room_.begin() + leaves_, rows, columns);
    for (int64_t node = leaves_ - 1; node > 0; --node) update(node);
  }

  /// The row and column for a document of this length; nothing if no row has room.
  std::optional<std::pair<int64_t, int64_t>> place(int64_t length) {
    if (room_[1] < length) return std::nullopt;
    int64_t node = 1;
    while (node < leaves_) node = room_[2 * node] >= length ? 2 * node : 2 * node + 1;
    const int64_t row = node - leaves_, column = columns_ - room_[node];
    room_[node] -= length;
    while (node /= 2) update(node);
    return std::pair{row, column};
  }

 private:
  void update(int64_t node) { room_[node] = std::max(room_[2 * node], room_[2 * node + 1]); }

  int64_t columns_, leaves_;
  std::vector<int64_t> room_;  // a heap-ordered tree; the most room below each node
};

/// The tokens before the answer, if a document's targets are its label's own tokens (as far as
/// max_length leaves them): they would give the label away.
int64_t length_before_answer(const Piece& piece, std::span<const uint32_t> answer) {
  const int64_t length = std::ssize(piece.tokens);
  int64_t first = length;
  size_t same = 0;
  for (int64_t t = 0; t < length; ++t) {
    if (!piece.loss_mask[t]) continue;
    if (same == answer.size() || piece.tokens[t] != answer[same]) return length;
    if (same++ == 0) first = t;
  }
  return first;
}

}  // namespace

Corpus::Corpus(const std::vector<std::string>& files) {
  for (const std::string& pattern : files)
    for (const std::string& path : expand(pattern)) {
      const TokenShard& shard = shards_.emplace_back(path);
      const TokenShard& first = shards_.front();
      GRAFT_CHECK(shard.tokenizer_sha256() == first.tokenizer_sha256() &&
                      shard.vocab_size() == first.vocab_size(),
                  ExitCode::kData, path, ": made with another tokenizer than ", first.path());
      first_document_.push_back(first_document_.back() + shard.num_samples());
    }
  GRAFT_CHECK(num_documents() > 0, ExitCode::kData, "the data files hold no document",
              files.empty() ? "" : ": " + files.front());
}

Corpus::Place Corpus::locate(int64_t document) const {
  const auto after = std::upper_bound(first_document_.begin(), first_document_.end(), document);
  const int64_t shard = after - first_document_.begin() - 1;
  return {&shards_[shard], document - first_document_[shard]};
}

int64_t Corpus::length(int64_t document) const {
  const Place place = locate(document);
  return place.shard->length(place.row);
}

std::vector<std::string> Corpus::label_names(Predict predict) const {
  std::vector<std::string> names;
  if (predict == Predict::kTokens) return names;
  const bool of_samples = predict == Predict::kSampleLabels;
  for (const TokenShard& shard : shards_) {
    if (shard.num_samples() == 0) continue;
    const auto& labels = shard.labels();
    GRAFT_CHECK(labels && labels->of_sample.empty() != of_samples, ExitCode::kData, shard.path(),
                ": has no labels of its ",
                of_samples ? "samples ('label')" : "tokens ('token_labels')",
                "; graft prepare classification writes them");
    if (names.empty()) names = labels->names;
    GRAFT_CHECK(names == labels->names, ExitCode::kData, shard.path(), ": has other labels than ",
                shards_.front().path());
  }
  return names;
}

Loader::Loader(const LoaderConfig& config) : config_(config), corpus_(config.files) {
  GRAFT_CHECK(config.max_length > 0, "data.max_length is ", config.max_length);
  GRAFT_ASSERT(config.rows_per_lane > 0 && config.first_lane >= 0 && config.num_local_lanes >= 0 &&
                   config.first_lane + config.num_local_lanes <= config.num_lanes,
               "lanes ", config.first_lane, " + ", config.num_local_lanes, " of ",
               config.num_lanes);
  corpus_.label_names(config.predict);
  num_documents_ = corpus_.num_documents();
  if (config.max_samples > 0) num_documents_ = std::min(num_documents_, config.max_samples);
}

StepLayout Loader::layout(Cursor cursor) const {
  const int64_t rows = config_.num_lanes * config_.rows_per_lane;
  const Order order(config_.seed, cursor.epoch, num_documents_);
  FirstFit rows_of_step(rows, config_.max_length);
  StepLayout step;
  int64_t position = cursor.position;
  for (; position < num_documents_; ++position) {
    const int64_t document = config_.shuffle == Shuffle::kOn ? order.index(position) : position;
    const int64_t length = std::min(corpus_.length(document), config_.max_length);
    // A row of an unpacked step is full with one document, whatever its length.
    const auto place =
        rows_of_step.place(config_.packing == Packing::kOn ? length : config_.max_length);
    if (!place) break;
    step.placements.push_back({document, place->first, place->second, length});
  }
  step.last_of_epoch = position == num_documents_;
  step.next = step.last_of_epoch ? Cursor{cursor.epoch + 1, 0} : Cursor{cursor.epoch, position};
  return step;
}

int64_t Loader::steps_in_epoch(int64_t epoch) const {
  int64_t steps = 0;
  for (Cursor cursor{epoch, 0}; cursor.epoch == epoch; cursor = layout(cursor).next) ++steps;
  return steps;
}

double Loader::fractional_epoch() const {
  return static_cast<double>(cursor_.epoch) +
         static_cast<double>(cursor_.position) / static_cast<double>(num_documents_);
}

int64_t Loader::num_cut_documents() const {
  int64_t count = 0;
  for (int64_t document = 0; document < num_documents_; ++document)
    count += corpus_.length(document) > config_.max_length;
  return count;
}

// --- the producer's side: all reading ---

Loader::Fetched Loader::fetch(Cursor cursor) const {
  Fetched fetched;
  fetched.layout = layout(cursor);
  const int64_t first = config_.first_lane * config_.rows_per_lane;
  const int64_t last = first + config_.num_local_lanes * config_.rows_per_lane;
  std::erase_if(fetched.layout.placements,
                [&](const Placement& p) { return p.row < first || p.row >= last; });
  read_runs(fetched);
  return fetched;
}

/// Reads in the order of the files, neighbours in one access: a shuffled step touches each chunk
/// once.
void Loader::read_runs(Fetched& fetched) const {
  const auto& placements = fetched.layout.placements;
  std::vector<size_t> order(placements.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return placements[a].document < placements[b].document; });
  fetched.begins.resize(placements.size());
  fetched.reasons.resize(placements.size());
  int64_t total = 0;
  for (const size_t i : order) {
    fetched.begins[i] = total;
    total += placements[i].length;
  }
  fetched.tokens.resize(total);
  fetched.loss_mask.resize(total);
  const bool has_token_labels = config_.predict == Predict::kTokenLabels;
  if (has_token_labels) fetched.token_labels.resize(total);

  // Reads the documents order[first..last), all of one shard.
  const auto read = [&](size_t first, size_t last) {
    const TokenShard& shard = *corpus_.locate(placements[order[first]].document).shard;
    std::vector<TokenShard::Run> runs;
    int64_t count = 0;
    for (size_t i = first; i < last; ++i) {
      const Placement& p = placements[order[i]];
      const int64_t begin = shard.begin(corpus_.locate(p.document).row);
      count += p.length;
      if (!runs.empty() && runs.back().begin + runs.back().length == begin)
        runs.back().length += p.length;
      else
        runs.push_back({begin, p.length});
    }
    const int64_t to = fetched.begins[order[first]];
    shard.read(runs, std::span(fetched.tokens).subspan(to, count),
               std::span(fetched.loss_mask).subspan(to, count));
    if (has_token_labels)
      shard.read_token_labels(runs, std::span(fetched.token_labels).subspan(to, count));
  };
  const auto shard_of = [&](size_t i) {
    return corpus_.locate(placements[order[i]].document).shard;
  };
  for (size_t first = 0, last; first < order.size(); first = last) {
    for (last = first + 1; last < order.size() && shard_of(last) == shard_of(first);) ++last;
    try {
      read(first, last);
    } catch (const Error&) {  // one of them is bad: which?
      for (size_t i = first; i < last; ++i) try {
          read(i, i + 1);
        } catch (const Error& error) {
          if (error.code() != ExitCode::kData) throw;
          fetched.reasons[order[i]] = error.what();
        }
    }
  }
}

void Loader::produce(std::stop_token stop, Cursor cursor) {
  while (config_.num_epochs == 0 || cursor.epoch < config_.num_epochs) {
    Fetched fetched;
    try {
      fetched = fetch(cursor);
    } catch (...) {
      fetched.failure = std::current_exception();
    }
    cursor = fetched.layout.next;
    const bool failed = fetched.failure != nullptr;
    std::unique_lock lock(mutex_);
    if (!changed_.wait(lock, stop, [&] { return ready_.size() < kStepsAhead; })) return;
    ready_.push_back(std::move(fetched));
    changed_.notify_all();
    if (failed) return;
  }
}

// --- the caller's side ---

void Loader::seek(Cursor cursor) {
  GRAFT_CHECK(cursor.epoch >= 0 && cursor.position >= 0 && cursor.position < num_documents_,
              ExitCode::kData, "cursor (epoch ", cursor.epoch, ", position ", cursor.position,
              ") does not fit data of ", num_documents_, " documents; are these the same files?");
  producer_ = {};  // stops and joins
  ready_.clear();
  cursor_ = cursor;
}

Loader::Fetched Loader::wait_for_step() {
  GRAFT_ASSERT(config_.num_epochs == 0 || cursor_.epoch < config_.num_epochs, "no step is left");
  if (!producer_.joinable())
    producer_ = std::jthread([this, at = cursor_](std::stop_token stop) { produce(stop, at); });
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !ready_.empty(); });
  Fetched fetched = std::move(ready_.front());
  ready_.pop_front();
  changed_.notify_all();
  return fetched;
}

bool Loader::usable(const Placement& placement, const std::string& reason) {
  if (skipped_.contains(placement.document)) return false;
  if (reason.empty()) return true;
  GRAFT_CHECK(config_.on_bad_sample == OnBadSample::kSkip, ExitCode::kData, reason,
              " (data.on_bad_sample: skip leaves such rows out)");
  skipped_.insert(placement.document);
  const Corpus::Place place = corpus_.locate(placement.document);
  if (config_.report) config_.report({place.shard->path(), place.row, placement.document, reason});
  return false;
}

Piece Loader::piece_of(const Fetched& fetched, size_t index) const {
  const Placement& p = fetched.layout.placements[index];
  const auto part = [&](const auto& all) {
    return std::span(all).subspan(fetched.begins[index], p.length);
  };
  Piece piece{part(fetched.tokens), part(fetched.loss_mask), p.row, p.column};
  if (config_.predict == Predict::kTokenLabels) piece.token_labels = part(fetched.token_labels);
  if (config_.predict == Predict::kSampleLabels) {
    const Corpus::Place place = corpus_.locate(p.document);
    const ShardLabels& labels = *place.shard->labels();
    piece.label = labels.of_sample[place.row];
    const auto answer = labels.tokens_of(static_cast<int32_t>(piece.label));
    const int64_t length = length_before_answer(piece, answer);
    piece.tokens = piece.tokens.first(length);
    piece.loss_mask = piece.loss_mask.first(length);
  }
  return piece;
}

Batch Loader::collate_lane(const Fetched& fetched, const std::vector<bool>& usable,
                           int64_t lane) const {
  const int64_t first_row = lane * config_.rows_per_lane;
  int64_t longest = 1, rows = 1;  // rows at the end that nobody fills are not worth computing
  std::vector<Piece> pieces;
  for (size_t i = 0; i < usable.size(); ++i) {
    const Placement& p = fetched.layout.placements[i];
    if (p.row / config_.rows_per_lane != lane) continue;
    longest = std::max(longest, p.length);
    rows = std::max(rows, p.row - first_row + 1);
    if (!usable[i]) continue;
    pieces.push_back(piece_of(fetched, i));
    pieces.back().row -= first_row;
  }
  const int64_t rounded = (longest + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple;
  return collate(
      pieces, rows,
      config_.packing == Packing::kOn ? config_.max_length : std::min(rounded, config_.max_length));
}

Loader::Step Loader::deliver(Fetched fetched) {
  if (fetched.failure) std::rethrow_exception(fetched.failure);
  std::vector<bool> usable_placements;
  for (size_t i = 0; i < fetched.reasons.size(); ++i)
    usable_placements.push_back(usable(fetched.layout.placements[i], fetched.reasons[i]));
  Step step;
  step.epoch = cursor_.epoch;
  step.last_of_epoch = fetched.layout.last_of_epoch;
  step.next = fetched.layout.next;
  for (int64_t lane = 0; lane < config_.num_local_lanes; ++lane)
    step.lanes.push_back(collate_lane(fetched, usable_placements, config_.first_lane + lane));
  step.placements = std::move(fetched.layout.placements);
  return step;
}

Loader::Step Loader::next() {
  using std::chrono::steady_clock;
  const steady_clock::time_point start = steady_clock::now();
  try {
    Step step = deliver(wait_for_step());
    cursor_ = step.next;
    last_wait_ms_ = std::chrono::duration<double, std::milli>(steady_clock::now() - start).count();
    return step;
  } catch (...) {
    seek(cursor_);  // the step was not delivered: the next call tries it again
    throw;
  }
}

}  // namespace graft::data
