#include "launcher/checkpoint/moments.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <vector>

#include "configs/check.h"
#include "models/io/safetensors.h"

namespace graft::launcher {
namespace {

std::string state_file(const std::string& directory, int rank, int world) {
  return directory + "/state-" + std::to_string(rank) + "-of-" + std::to_string(world) +
         ".safetensors";
}

/// The optimiser's, and what methods keep.
std::vector<peft::ParamState> all_states(const peft::ParamSet& params, const StepRule& optimizer) {
  std::vector<peft::ParamState> all = optimizer.states();
  all.insert(all.end(), params.kept().begin(), params.kept().end());
  return all;
}

std::string key_of(const peft::ParamState& state, const peft::ParamSet& params) {
  return state.name + "/" + params.all()[state.param].name + "/";
}

/// Number of the first element that this rank has of a parameter.
int64_t first_of(const peft::Param& param) {
  return param.is_cut() ? param.thawed->own_range().begin : 0;
}

}  // namespace

void save_moments(const std::string& directory, int rank, int world, const peft::ParamSet& params,
                  const StepRule& optimizer) {
  std::vector<int64_t> begins{0};  // of the parameters that all ranks have, in one row
  for (const peft::Param& param : params.all())
    begins.push_back(begins.back() + (param.is_cut() ? 0 : param.value.numel()));
  const int64_t total = begins.back(), share = (total + world - 1) / world;
  const int64_t begin = std::min(total, share * rank), end = std::min(total, begin + share);
  models::io::NamedTensors pieces;
  for (const peft::ParamState& state : all_states(params, optimizer)) {
    const peft::Param& param = params.all()[state.param];
    const int64_t at = begins[state.param], size = begins[state.param + 1] - at;
    // An element goes with the first of those of the parameter that it stands for.
    const auto index = [&](int64_t element) {
      return (std::clamp<int64_t>(element - at, 0, size) + state.elements - 1) / state.elements;
    };
    const int64_t from = param.is_cut() ? 0 : index(begin);
    const int64_t to = param.is_cut() ? state.value.numel() : index(end);
    if (from >= to) continue;
    pieces.emplace_back(key_of(state, params) + std::to_string(first_of(param) + from),
                        state.value.flatten().slice(0, from, to).cpu());
  }
  models::io::write_safetensors(state_file(directory, rank, world), pieces, {});
}

void load_moments(const std::string& directory, int world, const peft::ParamSet& params,
                  const StepRule& optimizer) {
  struct Row {
    Tensor values;
    int64_t first;
  };
  std::map<std::string, Row> rows;
  int64_t expected = 0, filled = 0;
  for (const peft::ParamState& state : all_states(params, optimizer)) {
    const peft::Param& param = params.all()[state.param];
    expected += param.is_cut() ? param.numel() : state.value.numel();
    rows[key_of(state, params)] = {state.value.view(-1), first_of(param)};
  }
  for (int rank = 0; rank < world; ++rank) {
    const models::io::SafetensorsFile file(state_file(directory, rank, world));
    for (const auto& entry : file.entries()) {
      const size_t end = entry.name.rfind('/') + 1;
      const auto found = rows.find(entry.name.substr(0, end));
      GRAFT_CHECK(found != rows.end(), ExitCode::kData, file.path(), ": unexpected tensor ",
                  entry.name);
      const auto& [row, first] = found->second;
      const Tensor piece = file.read(entry.name);
      int64_t begin = -1;
      std::from_chars(entry.name.data() + end, entry.name.data() + entry.name.size(), begin);
      GRAFT_CHECK(begin >= 0, ExitCode::kData, file.path(), ": ", entry.name,
                  " does not end with the number of its first element");
      const int64_t from = std::max(begin, first);
      const int64_t to = std::min(begin + piece.numel(), first + row.numel());
      if (from < to)
        row.slice(0, from - first, to - first).copy_(piece.slice(0, from - begin, to - begin));
      filled += piece.numel();
    }
  }
  GRAFT_CHECK(filled == expected, ExitCode::kData, directory, ": holds ", filled,
              " elements of the state of optimiser and methods, expected ", expected);
}

}  // namespace graft::launcher
