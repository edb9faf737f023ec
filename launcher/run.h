// Run: a whole run file: the sections of RunConfig and the list of methods.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "launcher/run_config.h"
#include "peft/method.h"

namespace graft::launcher {

struct Run : RunConfig {
  std::vector<peft::MethodEntry> peft;
  /// train.gradient_accumulation_steps as the file has it, where a resume on other ranks set
  /// another.
  std::optional<int> accumulation_in_file;
  void fields(Fields& f);
};

/// Reads a run file; entries of `peft` that have only `init_from` get its method.
/// @throws graft::Error (kUsage) with every mistake; (kData) for an `init_from` that is no adapter
Run load_run(const std::string& path, const std::vector<std::string>& overrides);

/// Keys whose values differ between two resolved runs, as `key: a -> b`, without those that a
/// resumed run may change.
/// @param saved, current  YAML as `configs::dump` writes it
std::vector<std::string> resume_conflicts(const std::string& saved, const std::string& current);

}  // namespace graft::launcher
