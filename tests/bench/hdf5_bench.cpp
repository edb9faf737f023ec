// Reading shards against plain pread of the same file, warm page cache, one thread, in turns (the
// machine may be shared: compare inside a line). One JSON line a case: GB/s of the limit (pread),
// ours, and ours / limit.
//   first_pass_from_disk, first_pass: a shard just opened, in windows of 4 MiB of tokens, all
//   checksums verified; the
//             page cache dropped before, or warm
//   stream:   the same, warm, after the first pass: values are still checked
//   shuffled: documents of instruction data in random order, 64 a step, through TokenShard as the
//   loader reads loader:   packed steps of 8 x 4096 tokens from Loader::next(); the limit reads the
//   same documents' bytes
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

constexpr int kRounds = 7;
constexpr int64_t kBytesPerToken = 5;  // uint32 token, uint8 mask

double run_s(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The best of kRounds of each, in turns; `before` is run before each and not timed.
void compare(
    const char* name, double bytes, const std::function<void()>& limit,
    const std::function<void()>& ours, const std::function<void()>& before = [] {}) {
  double best_limit = 1e30, best_ours = 1e30;
  for (int round = 0; round < kRounds; ++round) {
    before();
    best_limit = std::min(best_limit, run_s(limit));
    before();
    best_ours = std::min(best_ours, run_s(ours));
  }
  std::printf(
      "{\"bench\": \"hdf5_%s\", \"limit_gb_s\": %.2f, \"ours_gb_s\": %.2f, \"ratio\": %.2f}\n",
      name, bytes / best_limit / 1e9, bytes / best_ours / 1e9, best_limit / best_ours);
}

void pread_all(int file, char* to, int64_t bytes, int64_t offset) {
  GRAFT_CHECK(::pread(file, to, bytes, offset) == bytes, "short read at ", offset);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t num_tokens = (argc > 1 ? std::atoll(argv[1]) : 64) * 1'000'000;
  const TemporaryFolder folder;
  const std::string path =
      argc > 2 ? std::string(argv[2]) + "/hdf5_bench.h5" : folder.file("shard.h5");
  std::vector<int64_t> lengths = realistic_lengths(num_tokens / 225, 1);
  TokenShardContent content = test_content(lengths);
  for (uint32_t& token : content.tokens) token &= 0xffff;
  write_token_shard(path, content);
  const TokenShard shard(path);
  const int file = ::open(path.c_str(), O_RDONLY);

  constexpr int64_t kWindow = 1 << 20;  // tokens
  std::vector<uint32_t> tokens(kWindow);
  std::vector<uint8_t> mask(kWindow);
  std::vector<char> buffer(kWindow * kBytesPerToken);
  const auto windows = [&](auto read) {
    for (int64_t begin = 0; begin < shard.num_tokens(); begin += kWindow)
      read(begin, std::min(kWindow, shard.num_tokens() - begin));
  };
  const double shard_bytes = static_cast<double>(shard.num_tokens() * kBytesPerToken);
  const auto stream_file = [&] {
    windows([&](int64_t begin, int64_t count) {
      pread_all(file, buffer.data(), count * kBytesPerToken, begin * kBytesPerToken);
    });
  };
  const auto stream_shard = [&](const TokenShard& from) {
    windows([&](int64_t begin, int64_t count) {
      from.read(begin, std::span(tokens).first(count), std::span(mask).first(count));
    });
  };
  compare(
      "first_pass_from_disk", shard_bytes, stream_file, [&] { stream_shard(TokenShard(path)); },
      [&] { ::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED); });
  compare("first_pass", shard_bytes, stream_file, [&] { stream_shard(TokenShard(path)); });
  compare("stream", shard_bytes, stream_file, [&] { stream_shard(shard); });

  const int64_t num_documents = std::min<int64_t>(shard.num_samples(), 20'000);
  const Order order(1, 0, shard.num_samples());
  const auto documents = [&](auto read) {
    for (int64_t first = 0; first + 64 <= num_documents; first += 64) {
      int64_t step[64];
      for (int64_t i = 0; i < 64; ++i) step[i] = order.index(first + i);
      std::sort(step, step + 64);
      for (const int64_t document : step) read(shard.begin(document), shard.length(document));
    }
  };
  double document_tokens = 0;
  documents([&](int64_t, int64_t length) { document_tokens += static_cast<double>(length); });
  const auto pread_document = [&](int64_t begin, int64_t length) {
    pread_all(file, buffer.data(), 4 * length, 4 * begin);
    pread_all(file, buffer.data(), length, 4 * shard.num_tokens() + begin);
  };
  compare(
      "shuffled", document_tokens * kBytesPerToken, [&] { documents(pread_document); },
      [&] {
        documents([&](int64_t begin, int64_t length) {
          shard.read(begin, std::span(tokens).first(length), std::span(mask).first(length));
        });
      });

  LoaderConfig config;
  config.files = {path};
  config.max_length = 4096;
  config.num_lanes = config.num_local_lanes = 8;
  const int64_t num_steps = 100;
  double loader_tokens = 0;
  Loader loader(config);
  std::vector<Placement> placements;
  for (int64_t i = 0; i < num_steps; ++i) {
    const StepLayout step = loader.layout(loader.cursor());
    loader.seek(step.next);
    placements.insert(placements.end(), step.placements.begin(), step.placements.end());
  }
  for (const Placement& p : placements) loader_tokens += static_cast<double>(p.length);
  compare(
      "loader", loader_tokens * kBytesPerToken,
      [&] {
        for (const Placement& p : placements) pread_document(shard.begin(p.document), p.length);
      },
      [&] {
        loader.seek({});
        for (int64_t i = 0; i < num_steps; ++i) loader.next();
      });
  ::close(file);
  if (argc > 2) std::filesystem::remove(path);
}
