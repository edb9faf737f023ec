// Evaluation: the held-out loss of a base with its adapters, and its raw outputs.
#pragma once

#include <cstdint>
#include <string>

#include "launcher/workbench.h"

namespace graft::launcher {

struct EvalResult {
  double loss = 0;  ///< mean over targets
  int64_t targets = 0;
  int64_t hits = 0;  ///< targets whose logit is the largest; counted if eval.metrics has accuracy
  int64_t documents = 0;

  double accuracy() const {
    return targets > 0 ? static_cast<double>(hits) / static_cast<double>(targets) : 0;
  }
};

enum class Adapters { kOff, kOn };

/// The mean loss over `data.eval`, at most `eval.max_samples` documents in file order. Collective.
EvalResult evaluate(Workbench& bench, const Run& run, Adapters adapters = Adapters::kOn);

/// Writes the logits of each eval row in order, `row.0` [L, V] float32, `row.1` ... (padding cut
/// off); of a sequence classifier [1, labels], those at its last token. One rank only.
void write_logits(Workbench& bench, const Run& run, const std::string& path);

}  // namespace graft::launcher
