// How LoRA's A and B may start from the base's matrices or from data, shared by the methods that
// have an A and a B: the fields, the pair itself, and what is computed for a slot.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/eva.h"
#include "peft/first_factors.h"
#include "peft/lora_fields.h"
#include "peft/method.h"

namespace graft::peft {

struct LoftqFields {
  int loftq_bits = 4, loftq_iter = 1;
  void fields(configs::Fields& f);
};
struct EvaFields {
  double rho = 2, tau = 0.99;
  bool use_label_mask = true, whiten = false, adjust_scaling_factors = true;
  void fields(configs::Fields& f);
};
struct CordaFields {
  std::string corda_method = "ipm";
  void fields(configs::Fields& f);
};
struct LoraGaFields : GradientFactors {
  void fields(configs::Fields& f);
};

struct LoraStartFields : LoraFields {
  LoftqFields loftq_config;
  EvaFields eva_config;
  CordaFields corda_config;
  LoraGaFields lora_ga_config;
  int calibration_samples = 64;

  void fields(configs::Fields& f);
  bool starts_as_base() const {
    return LoraFields::starts_as_base() || init_lora_weights == "eva" ||
           init_lora_weights == "mica";
  }
  bool is_start(std::string_view name) const { return init_lora_weights == name; }
  bool is_pissa() const { return init_lora_weights.starts_with("pissa"); }
  /// A and B come from the matrix or from data.
  bool is_computed() const;
  /// The base gives up what A and B start as.
  bool takes_from_base() const;
  /// Refuses a slot that cannot start so.
  void check_start(const LinearSite& site) const;
  Calibration calibration() const;
  /// EVA: ranks by the share of variance that each slot's directions explain.
  void decide(const std::vector<const LinearSite*>& sites, const std::vector<Tensor>& ratios);
  /// EVA: the ranks that a saved adapter has.
  void take_decisions(const SavedAdapter& adapter);

  /// What a file says of a LoRA of twice the rank, [A; A_0] and [B, -B_0], which is right on the
  /// untouched base; our entries keep what it started as. And back.
  void write(nlohmann::json& config, const std::vector<const LinearSite*>& sites,
             const SlotMap& slots) const;
  static SavedAdapter read(SavedAdapter adapter);
  static PeftForm peft_form();
};

/// A and B of a slot.
struct LoraPair {
  Tensor a, b;  ///< trained [r, in], [out, r]
  double scale = 1;
  /// What the base gave up, A_0 and -B_0; undefined: nothing.
  Tensor taken_a, minus_taken_b;
  bool base_is_prepared = false;

  /// Over the base as it is: with what it gives up once it is prepared, it is not there to give.
  Tensor whole_a() const { return is_whole() ? at::cat({a, taken_a}) : a; }
  Tensor whole_b() const { return is_whole() ? at::cat({b, minus_taken_b}, 1) : b; }

 private:
  bool is_whole() const { return taken_a.defined() && !base_is_prepared; }
};

/// What is computed for the slots of a method before step 0.
class LoraStarter {
 public:
  /// A slot that will be seen; all are listed before the first one is. Slots that see one input get
  /// as many candidates (EVA), whatever their own ranks.
  void list(const LoraStartFields& c, const LinearSite& site, models::Task task);
  void observe(const LoraStartFields& c, const LinearSite& site, const Observation& seen);
  /// A and B, then A_0 and -B_0 if the base gives up something. EVA: the directions and what share
  /// of the variance each explains.
  std::vector<Tensor> start(const LoraStartFields& c, const LinearSite& site, PlainMatrix& matrix);

 private:
  struct Statistics {
    Tensor sum;
    int64_t count = 0;
    std::optional<IncrementalPca> pca;
  };
  /// The inputs of the tokens that are targets themselves, as HF PEFT's label mask.
  Tensor with_targets(const Observation& seen) const;

  std::map<std::string, Statistics> statistics_;  ///< by slot
  std::map<std::string, int64_t> candidates_;     ///< EVA: directions looked for, by input
  bool predicts_next_ = true;                     ///< a label stands at the token before its own
};

}  // namespace graft::peft
