// Reading shards against plain pread of the same file, one thread, in turns (the machine may be
// shared: compare inside a line). One JSON line a case: GB/s of the limit (pread), ours, and ours /
// limit; "warm": the file is in the page cache.
//   first_pass_cold, first_pass: a shard is opened and read in windows of 4 MiB of tokens, all
//             checksums and values verified; the page cache dropped before, or warm
//   stream:   the same again, warm: what was verified is not verified again
//   shuffled: documents of instruction data in random order, 64 a step, warm, as the loader reads
//   loader:   packed steps of 8 x 4096 tokens from Loader::next(), warm; the limit only reads the
//             bytes of the same documents
// Usage: hdf5_bench [million tokens, default 64] [folder, default the temporary one]
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>

#include "configs/check.h"
#include "data/loader.h"
#include "data/order.h"
#include "tests/data/shards.h"

namespace {

using namespace graft::data;
using Work = std::function<void()>;
using Runs = std::vector<TokenShard::Run>;

constexpr int kRounds = 15;
constexpr int64_t kBytesPerToken = 5;  // uint32 token, uint8 mask
constexpr int64_t kWindow = 1 << 20;   // tokens

double run_s(const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The best of kRounds of each, in turns; `before` is run before each and not timed.
void compare(
    const char* name, int64_t num_tokens, const Work& limit, const Work& ours,
    const char* cache = "warm", const Work& before = [] {}) {
  double best_limit = 1e30, best_ours = 1e30;
  for (int round = 0; round < kRounds; ++round) {
    before();
    best_limit = std::min(best_limit, run_s(limit));
    before();
    best_ours = std::min(best_ours, run_s(ours));
  }
  const double gigabytes = static_cast<double>(num_tokens * kBytesPerToken) / 1e9;
  std::printf(
      "{\"bench\": \"hdf5_%s\", \"limit\": \"raw pread of the same file, page cache %s\", "
      "\"limit_gb_s\": %.2f, \"ours_gb_s\": %.2f, \"ours_over_limit\": %.2f}\n",
      name, cache, gigabytes / best_limit, gigabytes / best_ours, best_limit / best_ours);
  std::fflush(stdout);
}

/// The file of a shard, read both ways.
class Subject {
 public:
  explicit Subject(const std::string& path)
      : path_(path), shard_(path), file_(::open(path.c_str(), O_RDONLY)) {}
  ~Subject() { ::close(file_); }

  void windows() {
    Runs all;
    for (int64_t begin = 0; begin < shard_.num_tokens(); begin += kWindow)
      all.push_back({begin, std::min(kWindow, shard_.num_tokens() - begin)});
    const Work limit = [&] {
      for (const auto& run : all) pread(run.length * kBytesPerToken, run.begin * kBytesPerToken);
    };
    const auto read = [&](const TokenShard& shard) {
      for (const auto& run : all) read_shard(shard, std::span(&run, 1));
    };
    const Work first = [&] { read(TokenShard(path_)); };
    compare("first_pass_cold", shard_.num_tokens(), limit, first, "dropped",
            [&] { ::posix_fadvise(file_, 0, 0, POSIX_FADV_DONTNEED); });
    compare("first_pass", shard_.num_tokens(), limit, first);
    compare("stream", shard_.num_tokens(), limit, [&] { read(shard_); });
  }

  void shuffled() {
    constexpr int64_t kDocumentsOfStep = 64;
    const Order order(1, 0, shard_.num_samples());
    std::vector<Runs> steps(std::min<int64_t>(shard_.num_samples(), 20'000) / kDocumentsOfStep);
    int64_t position = 0, num_tokens = 0;
    for (Runs& step : steps) {
      for (int64_t i = 0; i < kDocumentsOfStep; ++i) {
        const int64_t document = order.index(position++);
        step.push_back({shard_.begin(document), shard_.length(document)});
        num_tokens += step.back().length;
      }
      std::sort(step.begin(), step.end(), [](auto a, auto b) { return a.begin < b.begin; });
    }
    compare(
        "shuffled", num_tokens,
        [&] {
          for (const Runs& step : steps) pread_documents(step);
        },
        [&] {
          for (const Runs& step : steps) read_shard(shard_, step);
        });
  }

  void loader() {
    constexpr int64_t kSteps = 200;
    LoaderConfig config;
    config.files = {path_};
    config.max_length = 4096;
    config.num_lanes = config.num_local_lanes = 8;
    Loader loader(config);
    Runs documents;
    int64_t num_tokens = 0;
    for (int64_t i = 0; i < kSteps; ++i) {
      const StepLayout step = loader.layout(loader.cursor());
      loader.seek(step.next);
      for (const Placement& p : step.placements) {
        documents.push_back({shard_.begin(p.document), p.length});
        num_tokens += p.length;
      }
    }
    compare(
        "loader", num_tokens, [&] { pread_documents(documents); },
        [&] {
          loader.seek({});
          for (int64_t i = 0; i < kSteps; ++i) loader.next();
        });
  }

 private:
  void pread(int64_t bytes, int64_t offset) {
    GRAFT_CHECK(::pread(file_, buffer_.data(), bytes, offset) == bytes, "short read at ", offset);
  }
  void pread_documents(const Runs& documents) {
    for (const auto& document : documents) {
      pread(4 * document.length, 4 * document.begin);
      pread(document.length, 4 * shard_.num_tokens() + document.begin);
    }
  }
  void read_shard(const TokenShard& shard, std::span<const TokenShard::Run> runs) {
    shard.read(runs, tokens_, loss_mask_);
  }

  std::string path_;
  TokenShard shard_;
  int file_;
  std::vector<char> buffer_ = std::vector<char>(kWindow * kBytesPerToken);
  std::vector<uint32_t> tokens_ = std::vector<uint32_t>(kWindow);
  std::vector<uint8_t> loss_mask_ = std::vector<uint8_t>(kWindow);
};

}  // namespace

int main(int argc, char** argv) {
  const int64_t num_tokens = (argc > 1 ? std::atoll(argv[1]) : 64) * 1'000'000;
  const TemporaryFolder folder;
  const std::string path =
      argc > 2 ? std::string(argv[2]) + "/hdf5_bench.h5" : folder.file("shard.h5");
  TokenShardContent content = test_content(realistic_lengths(num_tokens / 225, 1));
  for (uint32_t& token : content.tokens) token &= 0xffff;
  write_token_shard(path, content);
  content = {};
  Subject subject(path);
  subject.windows();
  subject.shuffled();
  subject.loader();
  if (argc > 2) std::filesystem::remove(path);
}
