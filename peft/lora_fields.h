// What LoRA and the methods that add a twist to it share: fields, scale, first values, and their
// form in PEFT's files.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/random/key.h"
#include "peft/adapter_file.h"
#include "peft/peft_form.h"
#include "peft/targets.h"

namespace graft::peft {

struct LoraFields {
  Targets targets;
  int r = 8;
  double lora_alpha = 8;
  double lora_dropout = 0;
  bool use_rslora = false;
  std::map<std::string, int> rank_pattern;
  std::map<std::string, double> alpha_pattern;
  std::string init_lora_weights = "true";
  double loraplus_lr_ratio = 1;

  /// Ranks that data decided, by module path, in place of the fields'; a slot that is not there has
  /// none.
  struct Decision {
    int rank;
    double alpha;
  };
  std::optional<std::map<std::string, Decision>> decided = {};
  Decision decision(const LinearSite& site) const;

  void fields(configs::Fields& f);
  /// Orthogonal factors have a product of zero up to rounding only.
  bool starts_as_base() const {
    return init_lora_weights == "true" || init_lora_weights == "gaussian";
  }
  /// LoRA+: B learns faster than A, and what is as wide as the output with it; in PEFT all vectors.
  double learning_rate_factor(std::string_view leaf) const;
  int rank(const LinearSite& site) const { return decision(site).rank; }
  double scale(const LinearSite& site) const;
  /// A [r, in] and B [out, r] at step 0, float32.
  std::pair<Tensor, Tensor> start(const LinearSite& site, kernels::Key key,
                                  at::Device device) const;
  static PeftForm peft_form();
  /// The adapter with an initialisation that is a value of init_lora_weights.
  /// @throws graft::Error (kData) for one that took A and B out of the base's matrices
  static SavedAdapter with_known_start(SavedAdapter adapter);
};

}  // namespace graft::peft
