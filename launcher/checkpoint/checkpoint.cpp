#include "launcher/checkpoint/checkpoint.h"

#include <algorithm>
#include <exception>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>
#include <vector>

#include "configs/check.h"
#include "configs/log.h"
#include "launcher/adapter_folder.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/checkpoint/moments.h"
#include "launcher/inputs.h"
#include "launcher/version.h"
#include "models/io/json_file.h"
#include "models/io/safetensors.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int kTrainerFormat = 1;
constexpr const char* kTrainerFile = "trainer.json";

int64_t configured_accumulation(const Run& run) {
  return run.accumulation_in_file.value_or(run.train.gradient_accumulation_steps);
}

Json trainer_state(Trainer& trainer, const Workbench& bench, const Run& run) {
  const TrainState& s = trainer.state();
  const auto& skipped = trainer.loader().skipped();
  return {{"format", kTrainerFormat},
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
          {"world", bench.world.size()},
          {"lanes_per_step", trainer.num_lanes()},
          {"accumulation_in_file", configured_accumulation(run)},
          {"inputs", trainer.inputs()},
          {"base_fingerprint", bench.fingerprint}};
}

/// trainer.json of a checkpoint that was verified.
class SavedState {
 public:
  explicit SavedState(const std::string& directory)
      : path_(directory + "/" + kTrainerFile), values_(models::io::read_json_file(path_)) {
    GRAFT_CHECK(number("format") == kTrainerFormat, ExitCode::kNoCheckpoint, path_, ": format ",
                number("format"), " is not known to this program, which reads ", kTrainerFormat);
  }
  const Json& at(const char* key) const {
    GRAFT_CHECK(values_.contains(key), ExitCode::kNoCheckpoint, path_, ": ", key, " is missing");
    return values_.at(key);
  }
  int64_t number(const char* key) const {
    GRAFT_CHECK(at(key).is_number_integer(), ExitCode::kNoCheckpoint, path_, ": ", key, " is ",
                at(key).dump(), ", expected an integer");
    return at(key).get<int64_t>();
  }
  /// A resumed run can be made longer, not shorter: its learning rate has fallen too far.
  void check_not_shorter(int64_t max_steps) const {
    GRAFT_CHECK(number("max_steps") <= max_steps, path_, " belongs to a run of ",
                number("max_steps"), " steps, this one has ", max_steps,
                "; a resumed run can be made longer, not shorter");
  }

 private:
  std::string path_;
  Json values_;
};

/// Lanes per step stay: on other ranks than the file was written for the accumulation follows them,
/// each time the job is started again. Another accumulation for the same ranks is a change.
void keep_lanes(const SavedState& saved, const World& world, Run& run) {
  const int64_t lanes = saved.number("lanes_per_step"), ranks = world.size();
  int& accumulation = run.train.gradient_accumulation_steps;
  if (accumulation * ranks == lanes) return;
  GRAFT_CHECK(lanes % ranks == 0, "the checkpoint's step has ", lanes, " micro-batches, which ",
              ranks, " ranks cannot share evenly; start as many ranks as divide it");
  GRAFT_CHECK(
      ranks != saved.number("world") || accumulation == saved.number("accumulation_in_file"),
      "the checkpoint's step has ", lanes, " micro-batches, this run's ", accumulation * ranks,
      " (ranks x train.gradient_accumulation_steps = ", ranks, " x ", accumulation,
      "); set the accumulation to ", lanes / ranks);
  log::info(detail::concat("train.gradient_accumulation_steps: ", lanes / ranks, " instead of ",
                           accumulation, ", so that on ", ranks, " ranks a step stays ", lanes,
                           " micro-batches"));
  run.accumulation_in_file = accumulation;
  accumulation = static_cast<int>(lanes / ranks);
}

/// Why a checkpoint cannot be loaded, looked at by rank 0 for all; empty: it can.
std::string verify_together(const std::string& directory, World& world) {
  return dist::broadcast_text(*world.host, world.rank() == 0 ? verify(directory) : "", 0);
}

/// The counters of a run. The best adapter counts only while its checkpoint is there, unless no
/// step is left that could find another.
TrainState train_state(const SavedState& saved, const OutputDirectory& output,
                       const Trainer& trainer, World& world) {
  TrainState state;
  state.step = saved.number("step");
  state.cursor = {saved.number("epoch"), saved.number("position")};
  state.tokens = saved.number("tokens");
  state.non_finite_in_a_row = saved.number("non_finite_in_a_row");
  const int64_t best = saved.number("best_step");
  if (best < 0) return state;
  const std::string problem = verify_together(checkpoint_path(output.path(), best), world);
  if (problem.empty() || state.step >= trainer.max_steps()) {
    state.best_step = best;
    state.best_eval_loss = saved.at("best_eval_loss").get<double>();
  } else {
    log::warn(detail::concat("the checkpoint of step ", best, ", the best so far, is lost: ",
                             problem, "; the best is sought among later steps"));
  }
  return state;
}

/// Whether all ranks did it; an error of one rank is everyone's.
template <class F>
void together(World& world, F action) {
  std::string failure;
  try {
    action();
  } catch (const std::exception& error) {
    failure = detail::concat("rank ", world.rank(), ": ", error.what());
  }
  for (const std::string& text : dist::gather_texts(*world.host, failure)) {
    GRAFT_CHECK(text.empty(), ExitCode::kData, "saving a checkpoint failed: ", text);
  }
}

/// Ranks hold the same adapter, or one of them computes wrongly: better no checkpoint than a false
/// one.
void check_same_adapter(const Workbench& bench, int64_t step) {
  const auto hashes =
      dist::gather_texts(*bench.world.host, bench.adapters->params().replicated_hash());
  for (size_t r = 0; r < hashes.size(); ++r) {
    GRAFT_CHECK(hashes[r] == hashes[0], ExitCode::kNumerics, "step ", step,
                ": the adapter of rank ", r, " differs from rank 0's; nothing was saved");
  }
}

/// Writes an adapter's tensors on rank 0. Thawed weights come from all ranks, one at a time; they
/// go on coming when rank 0 cannot write, so that no rank is left waiting for it.
void write_tensors(const std::string& path, const peft::Peft::Saved& saved, const World& world) {
  std::vector<models::io::ComingTensor> tensors;
  for (const auto& [name, tensor] : saved.tensors) {
    tensors.push_back(
        {name, tensor.scalar_type(), tensor.sizes().vec(), [&tensor = tensor] { return tensor; }});
  }
  for (const auto& [name, weight] : saved.thawed)
    tensors.push_back({name, at::kFloat, weight->shape(), [w = weight] { return w->collect(); }});
  bool begun = false;
  std::exception_ptr failure;
  const auto write_to = [&](const models::io::ByteSink& sink) {
    begun = true;
    models::io::write_safetensors(
        [&](std::span<const std::byte> bytes) {
          try {
            if (!failure && sink) sink(bytes);
          } catch (...) {
            failure = std::current_exception();
          }
        },
        tensors, saved.metadata);
    if (failure) std::rethrow_exception(failure);
  };
  if (world.rank() != 0) return write_to({});
  try {
    models::io::write_file(path, write_to);
  } catch (...) {
    if (!begun) write_to({});
    throw;
  }
}

/// Collective where weights are thawed; rank 0 writes.
void write_adapter(const std::string& directory, const Workbench& bench, const Run& run) {
  const std::string task(models::names_of(bench.model->info().task).peft_type);
  const peft::BaseFacts base{run.model.name_or_path,          task,         bench.fingerprint,
                             run.model.revision.value_or(""), bench.labels, version_text()};
  for (size_t i = 0; i < bench.adapters->num_saved(); ++i) {
    const std::string part = peft::part_directory(directory, i, bench.adapters->num_saved());
    const auto saved = bench.adapters->save(i, base);
    if (bench.world.rank() == 0) fs::create_directories(part);
    write_tensors(part + kAdapterWeights, saved, bench.world);
    if (bench.world.rank() == 0) write_text(part + kAdapterConfig, saved.config.dump(2) + "\n");
  }
}

/// This rank's files of a checkpoint: its share of the moments, and on rank 0 what all ranks share.
void write_parts(const std::string& directory, const Workbench& bench, Trainer& trainer,
                 const Run& run) {
  const World& world = bench.world;
  save_moments(directory, world.rank(), world.size(), bench.adapters->params(),
               trainer.optimizer());
  write_adapter(directory, bench, run);
  if (world.rank() != 0) return;
  write_text(directory + "/config.yaml", configs::dump(run));
  write_text(directory + "/" + kTrainerFile, trainer_state(trainer, bench, run).dump(2) + "\n");
}

/// The manifest of all files that stand in the folder now.
void seal(const std::string& directory) {
  Manifest manifest;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    if (entry.is_regular_file())
      manifest[fs::relative(entry.path(), directory)] = facts_of(entry.path());
  }
  write_manifest(directory, manifest);
}

}  // namespace

std::optional<std::string> checkpoint_to_resume(const std::string& resume, OutputDirectory& output,
                                                World& world, const Run& run) {
  auto newest = output.newest_checkpoint(world);
  if (!newest && world.rank() == 0) output.check_unused(configs::dump(run));
  if (resume == "auto") return newest;
  GRAFT_CHECK(
      resume != "never" || !newest, "--resume never: ", output.path(), " holds a run already (",
      newest.value_or(""),
      "). Use --resume auto to continue it, another checkpoint.output_dir, or remove the folder.");
  if (resume == "never") return std::nullopt;
  GRAFT_CHECK(fs::exists(resume), "--resume: ", resume, " does not exist");
  GRAFT_CHECK(!newest || fs::equivalent(resume, *newest), "--resume ", resume, ": ", output.path(),
              " goes on to ", newest.value_or(""),
              "; to branch off, choose another checkpoint.output_dir");
  const std::string problem = verify_together(resume, world);
  GRAFT_CHECK(problem.empty(), ExitCode::kNoCheckpoint, resume, ": ", problem);
  return resume;
}

void prepare_resume(const std::string& directory, const World& world, Run& run) {
  const auto conflicts =
      resume_conflicts(configs::read_file(directory + "/config.yaml"), configs::dump(run));
  GRAFT_CHECK(conflicts.empty(), directory, " was made with another configuration:\n  ",
              configs::join(conflicts, "\n  "),
              "\nPut these back, or choose another checkpoint.output_dir.");
  const SavedState saved(directory);
  keep_lanes(saved, world, run);
  const data::Loader loader(train_loader_config(run, world));
  saved.check_not_shorter(schedule_of(run, loader).max_steps);
  const Json& before = saved.at("inputs");
  GRAFT_CHECK(before.is_object(), ExitCode::kData, directory, "/", kTrainerFile, ": inputs is ",
              before.type_name(), ", expected an object");
  const Json inputs = input_facts(run, loader.corpus());
  for (const auto& [key, now] : inputs.items()) {
    const Json then = before.value(key, Json());
    GRAFT_CHECK(then == now, ExitCode::kData, key, ": the files changed since ", directory,
                " was made: ", then.dump(), " then, ", now.dump(),
                " now. Put them back, or choose another checkpoint.output_dir.");
  }
}

void load_checkpoint(const std::string& directory, const OutputDirectory& output, Workbench& bench,
                     Trainer& trainer) {
  const SavedState saved(directory);
  GRAFT_CHECK(saved.at("base_fingerprint") == bench.fingerprint, ExitCode::kData, directory,
              ": was made on a base with fingerprint ", saved.at("base_fingerprint").dump(),
              ", this one has ", bench.fingerprint);
  bench.adapters->load(directory);
  load_moments(directory, static_cast<int>(saved.number("world")), bench.adapters->params(),
               trainer.optimizer());
  trainer.optimizer().set_num_steps(saved.number("optimizer_steps"));
  trainer.restore(train_state(saved, output, trainer, bench.world));
  for (const auto& document : saved.at("skipped_documents")) {
    GRAFT_CHECK(document.is_number_integer(), ExitCode::kData, directory, "/", kTrainerFile,
                ": skipped_documents holds a ", document.type_name(), ", expected integers");
    trainer.loader().skip(document.get<int64_t>());
  }
}

void save_checkpoint(OutputDirectory& output, Workbench& bench, Trainer& trainer, const Run& run) {
  World& world = bench.world;
  const TrainState& state = trainer.state();
  const std::string path = checkpoint_path(output.path(), state.step);
  check_same_adapter(bench, state.step);
  std::optional<FolderReplacement> folder;  // of rank 0; gone again if any rank fails
  together(world, [&] {
    if (world.rank() == 0) folder.emplace(path);
  });
  together(world, [&] { write_parts(FolderReplacement::partial_path(path), bench, trainer, run); });
  together(world, [&] {
    if (world.rank() != 0) return;
    seal(folder->partial_path());
    folder->commit();
    const auto limit = run.checkpoint.save_total_limit;
    if (limit) output.prune(state.step, *limit, state.best_step);
  });
}

void load_best_adapter(const OutputDirectory& output, Workbench& bench, Trainer& trainer) {
  World& world = bench.world;
  const std::string best = checkpoint_path(output.path(), trainer.state().best_step);
  const std::string problem = verify_together(best, world);
  GRAFT_CHECK(problem.empty(), ExitCode::kNoCheckpoint, "the best adapter, ", best, ": ", problem,
              ". eval.load_best_model_at_end=false takes that of the last step.");
  bench.adapters->load(best);
}

void save_adapter(const OutputDirectory& output, const Workbench& bench, const Run& run) {
  std::optional<FolderReplacement> folder;
  if (bench.world.rank() == 0) folder.emplace(output.adapter_path());
  write_adapter(FolderReplacement::partial_path(output.adapter_path()), bench, run);
  if (folder) folder->commit();
}

}  // namespace graft::launcher
