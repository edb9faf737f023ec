#include "launcher/dry_run.h"

#include <ATen/ATen.h>

#include <optional>

#include "configs/check.h"
#include "data/loader.h"
#include "launcher/facts.h"
#include "launcher/plan/memory.h"
#include "launcher/progress.h"
#include "launcher/tokenizer_pipe.h"
#include "launcher/trainer.h"
#include "models/base.h"
#include "peft/peft.h"

namespace graft::launcher {
namespace {

constexpr size_t kSamples = 2;

struct Unloaded {
  std::unique_ptr<models::Model> model;
  std::unique_ptr<peft::Peft> adapters;
};

Unloaded unloaded(Run& run) {
  Unloaded parts;
  parts.model = models::make_model(models::read_base_config(run.model.name_or_path));
  parts.adapters = std::make_unique<peft::Peft>(*parts.model, at::kCPU, 0);
  for (const std::string& directory : run.model.adapters.values)
    parts.adapters->attach_frozen(directory);
  parts.adapters->attach(run.peft);
  return parts;
}

/// The text of one document of a lane; consecutive targets between [[ and ]].
std::string marked_text(const data::Batch& batch, const data::Placement& place, int64_t row,
                        TokenizerPipe& tokenizer) {
  const auto part = [&](const at::Tensor& t_BL) {
    return t_BL[row].narrow(0, place.column, place.length);
  };
  const at::Tensor tokens_L = part(batch.tokens_BL), labels_L = part(batch.labels_BL);
  std::string text;
  std::vector<int64_t> run;
  bool target = false;
  const auto flush = [&] {
    if (!run.empty()) text += target ? "[[" + tokenizer.decode(run) + "]]" : tokenizer.decode(run);
    run.clear();
  };
  for (int64_t i = 0; i < place.length; ++i) {
    const bool is_target = i > 0 && labels_L[i - 1].item<int64_t>() >= 0;
    if (is_target != target) flush();
    target = is_target;
    run.push_back(tokens_L[i].item<int64_t>());
  }
  flush();
  return text;
}

std::string samples_text(const Run& run, data::Loader& loader, int64_t first_lane) {
  TokenizerPipe tokenizer(run.model.name_or_path);
  const data::Loader::Step step = loader.next();
  const int64_t rows = run.train.per_device_train_batch_size;
  std::string text;
  for (size_t i = 0; i < std::min(kSamples, step.placements.size()); ++i) {
    const data::Placement& place = step.placements[i];
    const auto lane = static_cast<size_t>(place.row / rows - first_lane);
    const auto where = loader.corpus().locate(place.document);
    text += "\n\n" + where.shard->path() + " row " + std::to_string(where.row) + ", " +
            std::to_string(place.length) + " tokens; learnt is what stands in [[ ]]:\n" +
            marked_text(step.lanes[lane], place, place.row % rows, tokenizer);
  }
  return text;
}

}  // namespace

void check_files(Run& run) {
  const auto parts = unloaded(run);
  std::optional<data::Corpus> train, held_out;
  if (!run.data.train.values.empty()) train.emplace(run.data.train.values);
  if (!run.data.eval.values.empty()) held_out.emplace(run.data.eval.values);
  if (train) check_vocabulary(*train, parts.model->info());
  if (held_out) check_vocabulary(*held_out, parts.model->info());
  if (train && held_out) check_same_tokenizer(*train, *held_out);
}

std::string dry_run(Run& run, const World& world) {
  check_files(run);
  const auto parts = unloaded(run);
  const at::ScalarType dtype = compute_dtype(run.model.dtype, world.device);
  warn_of_size(run, world, parts.model->info(), dtype);
  const data::LoaderConfig config = train_loader_config(run, world);
  data::Loader loader(config);
  const auto recompute =
      run.train.gradient_checkpointing ? models::Recompute::kOn : models::Recompute::kOff;
  const int64_t rows = run.train.per_device_train_batch_size;
  const int64_t lane =
      lane_bytes(parts.model->info(), rows * run.data.max_length, recompute, dtype);
  return "base     " + run.model.name_or_path + "  " + count_text(num_parameters(*parts.model)) +
         " parameters, " + run.model.quantization + "\ntrain    " +
         count_text(parts.adapters->params().numel()) + " parameters\ndata     " +
         std::to_string(loader.num_documents()) + " documents, " +
         std::to_string(loader.num_cut_documents()) + " longer than data.max_length " +
         std::to_string(run.data.max_length) + " (cut)\nstep     " +
         std::to_string(config.num_lanes) + " x " + std::to_string(rows) + " x " +
         std::to_string(run.data.max_length) + " tokens, " +
         std::to_string(schedule_of(run, loader).max_steps) + " steps\nmemory   " +
         bytes_text(lane) + " a micro-batch under way, " + bytes_text(free_memory_bytes(world)) +
         " free a rank" + samples_text(run, loader, config.first_lane);
}

}  // namespace graft::launcher
