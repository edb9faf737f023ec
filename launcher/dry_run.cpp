#include "launcher/dry_run.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "configs/check.h"
#include "data/loader.h"
#include "launcher/facts.h"
#include "launcher/plan/memory.h"
#include "launcher/progress.h"
#include "launcher/task.h"
#include "launcher/tokenizer_pipe.h"
#include "launcher/trainer.h"
#include "models/base.h"
#include "models/match.h"
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
  parts.model = models::make_model(base_config(run, labels_of(run).size()));
  parts.adapters = std::make_unique<peft::Peft>(*parts.model, at::kCPU, 0);
  attach_frozen(*parts.adapters, run.model);
  parts.adapters->attach(run.peft);
  return parts;
}

/// The text of one document of a lane; consecutive targets between [[ and ]], behind a label its
/// name.
/// @param names  of the labels, none where tokens are predicted
std::string marked_text(const data::Batch& batch, const data::Placement& place, int64_t row,
                        const std::vector<std::string>& names, TokenizerPipe& tokenizer) {
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
  for (int64_t i = 0; i < place.length && !names.empty(); ++i) {
    const int64_t label = labels_L[i].item<int64_t>();
    const std::string token = tokenizer.decode({tokens_L[i].item<int64_t>()});
    text += label < 0 ? token : "[[" + token + "|" + names[static_cast<size_t>(label)] + "]]";
  }
  for (int64_t i = 0; i < place.length && names.empty(); ++i) {
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
  const auto names = loader.corpus().label_names(predicted_by(run));
  const int64_t rows = run.train.per_device_train_batch_size;
  std::string text;
  for (size_t i = 0; i < std::min(kSamples, step.placements.size()); ++i) {
    const data::Placement& place = step.placements[i];
    const auto lane = static_cast<size_t>(place.row / rows - first_lane);
    const auto where = loader.corpus().locate(place.document);
    text += "\n\n" + where.shard->path() + " row " + std::to_string(where.row) + ", " +
            std::to_string(place.length) + " tokens; learnt is what stands in [[ ]]:\n" +
            marked_text(step.lanes[lane], place, place.row % rows, names, tokenizer);
  }
  return text;
}

/// Checks that throw, each reported at a key of the run file.
class FileChecks {
 public:
  explicit FileChecks(configs::Fields& f) : f_(f) {}

  /// @param check  may throw graft::Error
  template <class F>
  void at(const std::string& key, F check) {
    try {
      check();
    } catch (const Error& error) {
      if (error.code() == ExitCode::kBug) throw;
      f_.require(false, key, message(error.what(), key));
    }
  }
  /// The element of a list that may be written as one value.
  static std::string element(const std::string& key, const configs::StringOrList& list, size_t i) {
    return list.is_single ? key : key + "." + std::to_string(i);
  }

 private:
  /// On one line, without the key (or the section) that it may begin with.
  static std::string message(std::string text, const std::string& key) {
    const size_t colon = text.find(": ");
    if (colon != std::string::npos && (key + ".").starts_with(text.substr(0, colon) + "."))
      text.erase(0, colon + 2);
    std::replace(text.begin(), text.end(), '\n', ' ');
    const auto both_blank = [](char a, char b) { return a == ' ' && b == ' '; };
    text.erase(std::unique(text.begin(), text.end(), both_blank), text.end());
    return text;
  }

  configs::Fields& f_;
};

/// None for rows without labels too, which is told where the shards are checked.
size_t count_labels(const Run& run) {
  try {
    return labels_of(run).size();
  } catch (const Error&) {
    return 0;
  }
}

std::unique_ptr<models::Model> check_model(FileChecks& checks, const Run& run) {
  std::unique_ptr<models::Model> model;
  const std::string& path = run.model.name_or_path;
  if (path.empty()) return model;
  const size_t labels = count_labels(run);
  const bool as_it_is = task_of(run) != models::Task::kCausalLm && labels == 0;
  checks.at("model.name_or_path", [&] {
    model =
        models::make_model(as_it_is ? models::read_base_config(path) : base_config(run, labels));
    if (run.model.weights == "load")
      models::match_weights(*model, *models::open_base(path, *model, 0));
  });
  return model;
}

/// Without a model only that the directories are adapters.
void check_adapters(FileChecks& checks, Run& run, models::Model* model) {
  std::optional<peft::Peft> adapters;
  if (model != nullptr) adapters.emplace(*model, at::kCPU, 0);
  const configs::StringOrList& frozen = run.model.adapters;
  std::string method;
  for (size_t i = 0; i < frozen.values.size(); ++i) {
    checks.at(checks.element("model.adapters", frozen, i), [&] {
      if (!adapters) peft::method_of_directory(frozen.values[i], method);
      if (adapters) attach_frozen(*adapters, run.model, i);
    });
  }
  if (adapters && run.model.active_adapters) {
    checks.at("model.active_adapters", [&] { adapters->activate(*run.model.active_adapters); });
  }
  for (size_t i = 0; i < run.peft.size(); ++i) {
    peft::MethodEntry& entry = run.peft[i];
    const std::string key = "peft." + std::to_string(i);
    if (entry.init_from) {
      checks.at(key + ".init_from", [&] { peft::method_of_directory(*entry.init_from, method); });
    }
    if (!adapters || (entry.method == nullptr && !entry.init_from)) continue;
    checks.at(key, [&] { adapters->attach(entry); });
  }
}

/// @param model  may be null
std::optional<data::Corpus> check_shards(FileChecks& checks, const std::string& key,
                                         const configs::StringOrList& files, data::Predict predict,
                                         models::Model* model) {
  std::optional<data::Corpus> corpus;
  if (files.values.empty()) return corpus;
  checks.at(key, [&] {
    try {
      corpus.emplace(files.values);
    } catch (const Error&) {  // said of each one that is wrong; of all, where none is
      for (size_t i = 0; i < files.values.size(); ++i) {
        checks.at(checks.element(key, files, i),
                  [&] { data::Corpus(std::vector{files.values[i]}); });
      }
      throw;
    }
    corpus->label_names(predict);
    if (model != nullptr) check_vocabulary(*corpus, model->info());
  });
  return corpus;
}

void check_files(Run& run, configs::Fields& f) {
  FileChecks checks(f);
  const auto model = check_model(checks, run);
  check_adapters(checks, run, model.get());
  const data::Predict predict = predicted_by(run);
  const auto train = check_shards(checks, "data.train", run.data.train, predict, model.get());
  const auto held_out = check_shards(checks, "data.eval", run.data.eval, predict, model.get());
  if (train && held_out) checks.at("data.eval", [&] { check_held_out(run, *train, *held_out); });
}

}  // namespace

Run load_checked_run(const std::string& path, const std::vector<std::string>& overrides) {
  return configs::load_config<Run>(path, overrides, check_files);
}

std::string dry_run(Run& run, const World& world) {
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
         bytes_text(lane) + " a micro-batch under way, " +
         bytes_text(step_rule_of(run.train, parts.adapters->params())->state_bytes()) + " " +
         run.train.optim + ", " + bytes_text(free_memory_bytes(world)) + " free a rank" +
         samples_text(run, loader, config.first_lane);
}

}  // namespace graft::launcher
