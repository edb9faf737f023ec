// The task of a run: what is predicted, and with it which labels the rows must have and which head
// the base gets.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "data/loader.h"
#include "launcher/run.h"
#include "models/model.h"

namespace graft::launcher {

models::Task task_of(const RunConfig& run);
data::Predict predicted_by(const RunConfig& run);

/// The names of what a run's classifier tells apart: the labels of `data.train`, else of
/// `data.eval`; none where tokens are predicted.
/// @throws graft::Error (kData) for rows without labels
std::vector<std::string> labels_of(const RunConfig& run);

/// The config of the run's base, for its task: a classifier gets a head over so many labels.
/// @throws graft::Error for a base that is for another task
nlohmann::json base_config(const RunConfig& run, size_t num_labels);

/// Rows trained and held out are of one tokenizer and have the same labels.
/// @throws graft::Error (kData)
void check_held_out(const RunConfig& run, const data::Corpus& train, const data::Corpus& held_out);

}  // namespace graft::launcher
