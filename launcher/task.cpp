#include "launcher/task.h"

#include "configs/check.h"
#include "models/base.h"

namespace graft::launcher {

models::Task task_of(const RunConfig& run) {
  for (const models::TaskNames& task : models::kTasks) {
    if (run.train.task == task.name) return task.task;
  }
  GRAFT_ASSERT(false, run.train.task);
}

data::Predict predicted_by(const RunConfig& run) {
  switch (task_of(run)) {
    case models::Task::kSequenceClassification:
      return data::Predict::kSampleLabels;
    case models::Task::kTokenClassification:
      return data::Predict::kTokenLabels;
    default:
      return data::Predict::kTokens;
  }
}

std::vector<std::string> labels_of(const RunConfig& run) {
  if (task_of(run) == models::Task::kCausalLm) return {};
  const auto& rows = run.data.train.values.empty() ? run.data.eval : run.data.train;
  return data::Corpus(rows.values).label_names(predicted_by(run));
}

nlohmann::json base_config(const RunConfig& run, size_t num_labels) {
  nlohmann::json config = models::read_base_config(run.model.name_or_path);
  const models::Task task = task_of(run);
  if (task != models::Task::kCausalLm) {
    models::make_classifier(config, task, static_cast<int64_t>(num_labels));
    return config;
  }
  const models::ModelInfo info = models::make_model(config)->info();
  GRAFT_CHECK(info.task == task, run.model.name_or_path, ": a ", info.hf_class,
              " has labels, no next token; set train.task: ", models::names_of(info.task).name);
  return config;
}

void check_held_out(const RunConfig& run, const data::Corpus& train, const data::Corpus& held_out) {
  const auto &a = train.shards().front(), &b = held_out.shards().front();
  GRAFT_CHECK(a.tokenizer_sha256() == b.tokenizer_sha256(), ExitCode::kData,
              "data.eval: ", b.path(), " was made with another tokenizer than ", a.path(),
              " of data.train");
  const data::Predict predict = predicted_by(run);
  GRAFT_CHECK(train.label_names(predict) == held_out.label_names(predict), ExitCode::kData,
              "data.eval: ", b.path(), " has other labels than ", a.path(), " of data.train");
}

}  // namespace graft::launcher
