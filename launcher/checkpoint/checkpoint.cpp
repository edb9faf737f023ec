#include "launcher/checkpoint/checkpoint.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

#include "configs/check.h"
#include "configs/log.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/run_record.h"
#include "models/io/json_file.h"
#include "models/io/safetensors.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr const char* kTrainerFile = "trainer.json";
constexpr const char* kMoments[] = {"exp_avg", "exp_avg_sq"};

std::string name_of(int64_t step) { return fs::path(checkpoint_path("", step)).filename(); }

/// This rank's share of the moments: elements [begin, end) of all parameters in one row, as pieces
/// of parameters. Key: exp_avg/NAME/BEGIN, BEGIN the piece's first element in its parameter.
models::io::NamedTensors own_moments(const peft::ParamSet& params, AdamW& optimizer, int rank,
                                     int world) {
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
  return pieces;
}

/// Fills the moments from the pieces of all ranks of the saving run.
void load_moments(const std::string& directory, int world, const peft::ParamSet& params,
                  AdamW& optimizer) {
  const int64_t expected = 2 * params.numel();
  int64_t filled = 0;
  for (int rank = 0; rank < world; ++rank) {
    const models::io::SafetensorsFile file(directory + "/state-" + std::to_string(rank) + "-of-" +
                                           std::to_string(world) + ".safetensors");
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

Json trainer_state(Trainer& trainer, const World& world, const std::string& fingerprint) {
  const TrainState& s = trainer.state();
  const auto& skipped = trainer.loader().skipped();
  return {{"format", 1},
          {"step", s.step},
          {"max_steps", trainer.max_steps()},
          {"optimizer_steps", trainer.optimizer().num_steps()},
          {"epoch", s.cursor.epoch},
          {"position", s.cursor.position},
          {"tokens", s.tokens},
          {"non_finite_in_a_row", s.non_finite_in_a_row},
          {"best_eval_loss", s.best_step < 0 ? Json(nullptr) : Json(s.best_eval_loss)},
          {"best_step", s.best_step},
          {"skipped_documents", std::vector<int64_t>(skipped.begin(), skipped.end())},
          {"world", world.size()},
          {"lanes_per_step", trainer.num_lanes()},
          {"base_fingerprint", fingerprint}};
}

/// Whether all ranks did it; an error of one rank is everyone's.
template <class F>
void together(World& world, const char* what, F action) {
  std::string failure;
  try {
    action();
  } catch (const std::exception& error) {
    failure = detail::concat("rank ", world.rank(), ": ", error.what());
  }
  for (const std::string& text : dist::gather_texts(*world.host, failure)) {
    GRAFT_CHECK(text.empty(), ExitCode::kData, what, " failed: ", text);
  }
}

/// Keeps the newest `limit` whole checkpoints and the best one.
void prune(const std::string& checkpoints, int limit, const std::string& best) {
  std::vector<std::string> whole;
  for (const auto& entry : fs::directory_iterator(checkpoints)) {
    if (fs::exists(entry.path() / kManifestFile)) whole.push_back(entry.path().filename());
  }
  std::sort(whole.rbegin(), whole.rend());
  for (size_t i = static_cast<size_t>(limit); i < whole.size(); ++i) {
    if (whole[i] == best) continue;
    // Without its manifest it is no checkpoint any more, however far the removal gets.
    fs::remove(fs::path(checkpoints) / whole[i] / kManifestFile);
    fs::remove_all(fs::path(checkpoints) / whole[i]);
  }
}

}  // namespace

OutputDirectory::OutputDirectory(std::string path, const World& world) : path_(std::move(path)) {
  if (world.rank() != 0) return;
  std::error_code error;
  fs::create_directories(path_, error);
  GRAFT_CHECK(!error, "checkpoint.output_dir: ", path_, " cannot be made: ", error.message());
  const std::string file = path_ + "/LOCK";
  lock_ = open(file.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644);
  GRAFT_CHECK(lock_ >= 0, "checkpoint.output_dir: ", path_,
              " cannot be written: ", std::strerror(errno));
  GRAFT_CHECK(flock(lock_, LOCK_EX | LOCK_NB) == 0, "checkpoint.output_dir: ", path_,
              " is in use by another running job; choose another one");
}

OutputDirectory::~OutputDirectory() {
  if (lock_ >= 0) close(lock_);
}

void save_adapter(const std::string& directory, const Workbench& bench, const Run& run) {
  const peft::BaseFacts base{run.model.name_or_path, "CAUSAL_LM", bench.fingerprint};
  for (size_t i = 0; i < bench.adapters->num_trained(); ++i) {
    const std::string part = peft::part_directory(directory, i, bench.adapters->num_trained());
    fs::create_directories(part);
    const auto saved = bench.adapters->save(i, base);
    models::io::write_safetensors(part + "/adapter_model.safetensors", saved.tensors,
                                  {{"format", "pt"}});
    write_text(part + "/adapter_config.json", saved.config.dump(2) + "\n");
  }
}

void save_checkpoint(const std::string& output_dir, Workbench& bench, Trainer& trainer,
                     const Run& run) {
  World& world = bench.world;
  const std::string checkpoints = output_dir + "/checkpoints", name = name_of(trainer.state().step);
  const std::string temporary = checkpoints + "/.tmp-" + name,
                    final_path = checkpoints + "/" + name;
  // Ranks hold the same adapter, or one of them computes wrongly: better no checkpoint than a false
  // one.
  const std::string hash = bench.adapters->params().hash();
  const auto hashes = dist::gather_texts(*world.host, hash);
  for (size_t r = 0; r < hashes.size(); ++r) {
    GRAFT_CHECK(hashes[r] == hashes[0], ExitCode::kNumerics, "step ", trainer.state().step,
                ": the adapter of rank ", r, " differs from rank 0's; nothing was saved");
  }
  together(world, "saving a checkpoint", [&] {
    if (world.rank() == 0) fs::remove_all(temporary), fs::create_directories(temporary);
  });
  const std::string state = "state-" + std::to_string(world.rank()) + "-of-" +
                            std::to_string(world.size()) + ".safetensors";
  together(world, "saving a checkpoint", [&] {
    models::io::write_safetensors(
        temporary + "/" + state,
        own_moments(bench.adapters->params(), trainer.optimizer(), world.rank(), world.size()), {});
    if (world.rank() != 0) return;
    save_adapter(temporary, bench, run);
    write_text(temporary + "/config.yaml", configs::dump(run));
    write_text(temporary + "/" + kTrainerFile,
               trainer_state(trainer, world, bench.fingerprint).dump(2) + "\n");
  });
  together(world, "saving a checkpoint", [&] {
    if (world.rank() != 0) return;
    Manifest manifest;
    for (const auto& entry : fs::recursive_directory_iterator(temporary)) {
      if (entry.is_regular_file())
        manifest[fs::relative(entry.path(), temporary)] = facts_of(entry.path());
    }
    write_manifest(temporary, manifest);
    sync_directory(temporary);
    fs::remove_all(final_path);  // the same step of an attempt that went another way
    fs::rename(temporary, final_path);
    sync_directory(checkpoints);
    const auto limit = run.checkpoint.save_total_limit;
    if (limit)
      prune(checkpoints, *limit,
            trainer.state().best_step < 0 ? "" : name_of(trainer.state().best_step));
  });
}

std::optional<std::string> find_checkpoint(const std::string& output_dir, World& world) {
  std::string choice, passed_over;
  if (world.rank() == 0 && fs::is_directory(output_dir + "/checkpoints")) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(output_dir + "/checkpoints")) {
      const std::string name = entry.path().filename();
      if (name.starts_with("step-")) names.push_back(name);
    }
    std::sort(names.rbegin(), names.rend());
    for (const std::string& name : names) {
      const std::string problem = verify(output_dir + "/checkpoints/" + name);
      if (problem.empty()) {
        choice = output_dir + "/checkpoints/" + name;
        break;
      }
      passed_over += "\n  " + name + ": " + problem;
    }
  }
  choice = dist::broadcast_text(*world.host, choice, 0);
  passed_over = dist::broadcast_text(*world.host, passed_over, 0);
  GRAFT_CHECK(!choice.empty() || passed_over.empty(), ExitCode::kNoCheckpoint, output_dir,
              ": no checkpoint can be loaded:", passed_over,
              "\nTo start over, choose another checkpoint.output_dir.");
  if (!passed_over.empty()) log::warn("checkpoints passed over:" + passed_over);
  return choice.empty() ? std::nullopt : std::optional(choice);
}

void load_checkpoint(const std::string& directory, Workbench& bench, Trainer& trainer,
                     const Run& run) {
  const std::string problem = verify(directory);
  GRAFT_CHECK(problem.empty(), ExitCode::kNoCheckpoint, directory, ": ", problem);
  const auto conflicts =
      resume_conflicts(configs::read_file(directory + "/config.yaml"), configs::dump(run));
  GRAFT_CHECK(conflicts.empty(), directory, " was made with another configuration:\n  ",
              configs::join(conflicts, "\n  "),
              "\nPut these back, or choose another checkpoint.output_dir.");
  const Json saved = models::io::read_json_file(directory + "/" + kTrainerFile);
  const auto number = [&](const char* key) {
    GRAFT_CHECK(saved.contains(key) && saved[key].is_number_integer(), ExitCode::kNoCheckpoint,
                directory, "/", kTrainerFile, ": ", key, " is missing");
    return saved[key].get<int64_t>();
  };
  GRAFT_CHECK(number("lanes_per_step") == trainer.num_lanes(), "the checkpoint's step has ",
              number("lanes_per_step"), " micro-batches, this run's ", trainer.num_lanes(),
              " (ranks x train.gradient_accumulation_steps = ", bench.world.size(), " x ",
              run.train.gradient_accumulation_steps, "); set the accumulation to ",
              number("lanes_per_step"), " / ranks");
  GRAFT_CHECK(number("max_steps") <= trainer.max_steps(), directory, " belongs to a run of ",
              number("max_steps"), " steps, this one has ", trainer.max_steps(),
              "; a resumed run can be made longer, not shorter");
  GRAFT_CHECK(saved.value("base_fingerprint", "") == bench.fingerprint, ExitCode::kData, directory,
              ": was made on a base with fingerprint ", saved.value("base_fingerprint", ""),
              ", this one has ", bench.fingerprint);
  bench.adapters->load(directory);
  load_moments(directory, static_cast<int>(number("world")), bench.adapters->params(),
               trainer.optimizer());
  trainer.optimizer().set_num_steps(number("optimizer_steps"));
  TrainState state;
  state.step = number("step");
  state.cursor = {number("epoch"), number("position")};
  state.tokens = number("tokens");
  state.non_finite_in_a_row = number("non_finite_in_a_row");
  state.best_step = number("best_step");
  if (state.best_step >= 0) state.best_eval_loss = saved.at("best_eval_loss").get<double>();
  trainer.restore(state);
  for (const auto& document : saved.at("skipped_documents"))
    trainer.loader().skip(document.get<int64_t>());
}

}  // namespace graft::launcher
