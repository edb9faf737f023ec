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
  /// The fields are those of a saved adapter, which is taken as it is, however odd its sizes.
  bool from_file = false;
  std::string method = {};  ///< its name, for messages
  /// What Slot::frozen() calls the owners of the method's experts(), in their order.
  std::vector<size_t> experts = {};
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

/// A slot's matrix before it is stored, dense, float32 [out, in], on the run's device.
class PlainMatrix {
 public:
  virtual ~PlainMatrix() = default;
  /// As the model's file has it.
  /// @throws graft::Error (kUsage) if the file holds it in four bits
  virtual Tensor dense() = 0;
  /// What the run keeps of a matrix of this shape: quantised and rebuilt.
  virtual Tensor stored(const Tensor& w) = 0;
  virtual int stored_bits() const = 0;  ///< of an element: 4 or 8; 32 where nothing is quantised
};

/// The rows of the training data that a method wants to see before step 0.
struct Calibration {
  int64_t rows = 0;        ///< the first ones, in the order of the run; 0: none
  bool gradients = false;  ///< those of the loss too
  /// A document a micro-batch, whatever the run packs; else its micro-batches.
  bool one_document = false;
};

/// What passed a slot in one micro-batch of calibration, without padding.
struct Observation {
  Tensor x;         ///< [tokens, in] float32
  Tensor dy;        ///< [tokens, out] float32, of the summed loss: dW = dy^T x; undefined unless
                    ///< gradients were asked for
  Tensor predicts;  ///< [tokens] bool: the loss has a target after this token
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
  /// Directories of adapters that the method computes with and does not train. They are attached
  /// before anything trained, frozen and hashed, and no slot runs them; known once the fields are.
  virtual std::vector<std::string> experts() const { return {}; }

  // First values that come from the base's matrices or from data, unless the method goes on from a
  // saved adapter. One rank computes those of a slot, all ranks adopt its bits: singular vectors
  // may differ between machines. In this order:
  /// Rows to see first. They pass the base with the run's adapters as attach() left them.
  virtual Calibration calibration() const { return {}; }
  /// The slots that have such values.
  virtual std::vector<const LinearSite*> start_sites() const { return {}; }
  /// Each micro-batch at a slot, on the rank that will compute its values.
  virtual void observe(const LinearSite& /*site*/, const Observation& /*seen*/) {}
  /// After the last one, on that rank. @return what adopt() gets, on the CPU; of any dtype
  virtual std::vector<Tensor> start(const LinearSite& /*site*/, PlainMatrix& /*matrix*/) {
    return {};
  }
  /// A method that keeps the best of all its slots' values says which share; 0: it does not. Then
  /// scores() takes the place of start(), and adopt() gets the numbers of a slot's chosen elements:
  /// row-major, ascending, int64.
  virtual double share_chosen() const { return 0; }
  /// Of a slot's elements, from 0 up, float32 [out * in], on the CPU; asked for once.
  virtual Tensor scores(const LinearSite& /*site*/) { return {}; }
  /// On every rank, slot by slot.
  virtual void adopt(const LinearSite& /*site*/, const std::vector<Tensor>& /*values*/) {}
  /// All slots are adopted. No optimiser exists yet, so here and in adopt() a parameter may change
  /// its shape (set_data); one without elements is not saved.
  virtual void adopted() {}
  /// Shapes that start values decided, from the adapter the method goes on from; before attach().
  virtual void continue_from(const SavedAdapter& /*adapter*/) {}

  /// Whether the base holds other matrices than its file: then every matrix of a block is shown to
  /// prepare_weight before it is stored, and on all ranks base_is_prepared follows. Until then, and
  /// where it never comes (merging, a base in four bits), the method computes on the plain base.
  virtual bool changes_base() const { return false; }
  /// What is stored in place of `w` [out, in]: a pure function of it and the method's constants.
  virtual Tensor prepare_weight(const LinearSite& /*site*/, const Tensor& w) const { return w; }
  virtual void base_is_prepared() {}

  /// After the base is loaded, before the first step: initial values that need what it holds.
  virtual void initialize(BaseWeights& /*base*/) {}
  /// Gradients are summed over ranks and lanes: every rank sees the same numbers. What a loss has
  /// of parameters alone is added here, once a step.
  virtual void after_reduce(const StepInfo& /*info*/) {}
  /// The optimiser has moved the parameters.
  virtual void after_step(const StepInfo& /*info*/) {}
  /// True if the model computes the same with and without the method before the first step.
  virtual bool starts_as_base() const { return true; }
  /// True if it trains nothing itself: it acts on what the methods before it in the list train, and
  /// sees their gradients before they do.
  virtual bool acts_on_others() const { return false; }
  /// True if what it trains are values at chosen places of matrices (storage class P).
  virtual bool is_sparse() const { return false; }

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
