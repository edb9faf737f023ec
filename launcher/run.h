// Run: a whole run file: the sections of RunConfig and the list of methods.
#pragma once

#include <string>
#include <vector>

#include "launcher/run_config.h"
#include "peft/method.h"

namespace graft::launcher {

struct Run : RunConfig {
  std::vector<peft::MethodEntry> peft;
  void fields(Fields& f);
};

/// Keys whose values differ between two resolved runs, as `key: a -> b`, without those that a
/// resumed run may change.
/// @param saved, current  YAML as `configs::dump` writes it
std::vector<std::string> resume_conflicts(const std::string& saved, const std::string& current);

}  // namespace graft::launcher
