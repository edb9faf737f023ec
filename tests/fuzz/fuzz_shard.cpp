// libFuzzer target: any bytes as a token shard are read or refused with an Error (kData); nothing
// else may happen. libhdf5 opens by a real path, so each input is written to a file: put TMPDIR on
// a memory file system. Start from real shards as the corpus.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "configs/check.h"
#include "data/shard_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  using namespace graft;
  static const std::string path =
      std::filesystem::temp_directory_path() / ("fuzz_shard." + std::to_string(::getpid()));
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(bytes), size);
  try {
    const data::TokenShard shard(path);
    std::vector<uint32_t> tokens;
    std::vector<uint8_t> loss_mask;
    for (int64_t sample = 0; sample < shard.num_samples(); ++sample) {
      tokens.resize(shard.length(sample));
      loss_mask.resize(shard.length(sample));
      shard.read(shard.begin(sample), tokens, loss_mask);
      for (const uint32_t token : tokens)
        if (token >= shard.vocab_size()) std::abort();
    }
  } catch (const Error& error) {
    if (error.code() != ExitCode::kData) std::abort();
  }
  std::filesystem::remove(path);
  return 0;
}
