#include "launcher/checkpoint/moments.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "configs/check.h"
#include "models/io/safetensors.h"

namespace graft::launcher {
namespace {

constexpr const char* kMoments[] = {"exp_avg", "exp_avg_sq"};

std::string state_file(const std::string& directory, int rank, int world) {
  return directory + "/state-" + std::to_string(rank) + "-of-" + std::to_string(world) +
         ".safetensors";
}

}  // namespace

void save_moments(const std::string& directory, int rank, int world, const peft::ParamSet& params,
                  AdamW& optimizer) {
  const int64_t total = params.numel(), share = (total + world - 1) / world;
  const int64_t begin = std::min(total, share * rank), end = std::min(total, begin + share);
  models::io::NamedTensors pieces;
  int64_t at = 0;
  for (size_t i = 0; i < params.all().size(); ++i) {
    const int64_t size = params.all()[i].value.numel();
    const int64_t from = std::max(begin, at) - at, to = std::min(end, at + size) - at;
    at += size;
    if (from >= to) continue;
    for (const auto& [moment, tensors] : {std::pair{kMoments[0], &optimizer.first_moments()},
                                          std::pair{kMoments[1], &optimizer.second_moments()}}) {
      pieces.emplace_back(
          std::string(moment) + "/" + params.all()[i].name + "/" + std::to_string(from),
          (*tensors)[i].flatten().slice(0, from, to).cpu());
    }
  }
  models::io::write_safetensors(state_file(directory, rank, world), pieces, {});
}

void load_moments(const std::string& directory, int world, const peft::ParamSet& params,
                  AdamW& optimizer) {
  const int64_t expected = 2 * params.numel();
  int64_t filled = 0;
  for (int rank = 0; rank < world; ++rank) {
    const models::io::SafetensorsFile file(state_file(directory, rank, world));
    for (const auto& entry : file.entries()) {
      const size_t first = entry.name.find('/'), last = entry.name.rfind('/');
      GRAFT_CHECK(first != last, ExitCode::kData, file.path(), ": unexpected tensor ", entry.name);
      const std::string moment = entry.name.substr(0, first),
                        name = entry.name.substr(first + 1, last - first - 1);
      const int64_t begin = std::stoll(entry.name.substr(last + 1));
      const Tensor piece = file.read(entry.name);
      for (size_t i = 0; i < params.all().size(); ++i) {
        if (params.all()[i].name != name) continue;
        auto& moments =
            moment == kMoments[0] ? optimizer.first_moments() : optimizer.second_moments();
        moments[i].view(-1).narrow(0, begin, piece.numel()).copy_(piece);
        filled += piece.numel();
      }
    }
  }
  GRAFT_CHECK(filled == expected, ExitCode::kData, directory, ": holds ", filled,
              " elements of moments, expected ", expected);
}

}  // namespace graft::launcher
