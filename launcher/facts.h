// Facts about models and files as one JSON object, and the same for people. What the verbs that
// only look print.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "models/model.h"

namespace graft::launcher {

using Facts = nlohmann::ordered_json;

/// On one line; bytes of foreign files that are not UTF-8 are replaced.
std::string facts_json(const Facts& facts);
/// `key: value` lines, sections indented, lists joined by commas.
std::string facts_text(const Facts& facts);

int64_t num_parameters(models::Model& model);
/// "960", "4.88 M", "70.55 B".
std::string count_text(int64_t n);

}  // namespace graft::launcher
