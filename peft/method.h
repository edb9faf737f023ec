// Method: one PEFT method. It looks at a model's slots, attaches adapters, and may act at points of
// a step. Only fields() and attach() are required. A method never calls a collective: every rank
// makes the same calls with the same numbers. peft/README.md shows how to add one.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "configs/registry.h"
#include "configs/schema.h"
#include "kernels/random/key.h"
#include "models/model.h"
#include "peft/param_set.h"
#include "peft/slot_map.h"

namespace graft::peft {

struct SavedAdapter;  // peft/adapter_file.h

/// What attach() gets.
struct AttachContext {
  const SlotMap& slots;
  const models::ModelInfo& info;
  ParamSet& params;
  kernels::Key random;  ///< for initial values: a pure function of (seed, slot, leaf), the same on
                        ///< every rank
  at::Device device;
  std::string prefix;  ///< of parameter names: the method's place in the list
};

/// The base's weights after loading, dense, one at a time. Collective: every rank asks for the same
/// ones in order.
class BaseWeights {
 public:
  virtual ~BaseWeights() = default;
  virtual Tensor weight(
      const LinearSite& site) = 0;                  ///< a copy, float32 [out, in]; embedding [V, D]
  virtual Tensor bias(const LinearSite& site) = 0;  ///< a copy, float32 [out]
};

struct StepInfo {
  int64_t step = 0;  ///< of the run, from 0
  int64_t max_steps = 0;
};

/// One file a method.
class Method {
 public:
  virtual ~Method() = default;
  virtual void fields(configs::Fields& f) = 0;
  virtual void attach(AttachContext& context) = 0;
  /// After the base is loaded, before the first step: initial values that need weights.
  virtual void initialize(BaseWeights& /*base*/) {}
  /// Gradients are summed over ranks and lanes: every rank sees the same numbers.
  virtual void after_reduce(const StepInfo& /*info*/) {}
  /// The optimiser has moved the parameters.
  virtual void after_step(const StepInfo& /*info*/) {}
  /// True if the model computes the same with and without the method before the first step.
  virtual bool starts_as_base() const { return true; }

  /// PEFT's name of the method ("LORA"); empty where PEFT has none.
  virtual std::string peft_type() const { return ""; }
  /// Whether it is this method's, of those with its peft_type: DoRA is LORA with a flag.
  virtual bool is_in(const SavedAdapter& /*adapter*/) const { return true; }
  /// The method's own entries of adapter_config.json, and back. Reading refuses entries that change
  /// the mathematics and are not known here.
  virtual nlohmann::json to_peft_config(const SlotMap& slots) const;
  virtual void from_peft_config(const SavedAdapter& adapter);
};

/// What `graft methods` shows beside the fields.
struct MethodFacts {
  std::string name;
  std::string group;    ///< "reparam"
  std::string paper;    ///< "arXiv:2106.09685"
  std::string summary;  ///< one line: the formula
};

using MethodRegistry = configs::Registry<Method>;

/// All methods of methods.def.
const MethodRegistry& methods();
const std::vector<MethodFacts>& method_facts();

/// One entry of the `peft:` list of a run.
struct MethodEntry {
  std::string name;
  std::shared_ptr<Method> method;        ///< null when init_from alone says what it is
  std::optional<std::string> init_from;  ///< a PEFT directory to start from

  void fields(configs::Fields& f);
};

}  // namespace graft::peft
