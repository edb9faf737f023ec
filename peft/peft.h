// Peft: the adapters of a run over one base: those trained, and frozen ones under them. Attaches
// them in order, lists what is trained, saves and loads directories in HF PEFT's layout.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "models/io/safetensors.h"
#include "peft/method.h"
#include "peft/whole_tensors.h"

namespace graft::peft {

/// What an adapter_config.json should say of the base.
struct BaseFacts {
  std::string name_or_path;
  std::string task_type = "CAUSAL_LM";
  std::string fingerprint;
  std::string revision = "";             ///< empty: none was named
  std::vector<std::string> labels = {};  ///< of a classifier, in the order of its head
  std::string created_by = "";           ///< the program that saves
};

class Peft {
 public:
  /// @param seed  of initial values
  Peft(models::Model& model, at::Device device, uint64_t seed);

  /// Puts a saved adapter on the model, frozen: it is live and never trained. All frozen ones come
  /// before what is trained.
  /// @param weight  of what it adds: PEFT's add_weighted_adapter of type `cat`, live
  /// @param name    for activate(); empty: the directory
  void attach_frozen(const std::string& directory, double weight = 1, const std::string& name = "");
  /// From now on the frozen adapters with these names run, in the order of attachment; at first
  /// all do. Before anything is trained on them.
  /// @throws graft::Error for a name that none has
  void activate(const std::vector<std::string>& names);
  /// Of the values of all frozen adapters, active or not: what never changes.
  std::string frozen_hash() const;
  /// Puts the run's next method on the model and its parameters in params(); those of `init_from`
  /// must fit it. An entry with `init_from` alone gets its method.
  /// @param resume  the method's directory in a checkpoint that load() will be called with; empty:
  ///                none
  void attach(MethodEntry& entry, const std::string& resume = "");
  /// One after the other.
  void attach(std::vector<MethodEntry>& entries, const std::string& resume = "");

  /// A slot whose first values come from its matrix or from data.
  struct Start {
    Method* method;
    const LinearSite* site;
    std::string name;  ///< of the method
  };
  /// Of the methods that do not go on from an adapter, in order.
  std::vector<Start> starts() const;
  /// Of the methods that put rows in front of the tokens.
  std::vector<std::string> prompts() const;
  /// Calls Method::adopted of the methods that have starts.
  void adopted();
  bool changes_base() const;
  /// What is stored in place of the matrix of this name ("block.3.attn.q.weight").
  Tensor prepare_weight(const std::string& name, Tensor w) const;
  void base_is_prepared();
  /// Initial values that need the base's weights, then those of `init_from`.
  void initialize(BaseWeights& base);
  /// Holds the copies of base matrices in the directories attached against the base; initialize()
  /// does. @throws graft::Error (kData), see AdapterFile
  void check_base_copies(BaseWeights& base) const;
  /// Holds the fingerprints in the directories attached against the base's, which is asked for if
  /// one has any. @throws graft::Error (kData) for an adapter that was trained on another base
  void check_fingerprints(const std::function<std::string()>& base) const;

  const ParamSet& params() const { return params_; }
  const SlotMap& slots() const { return slots_; }
  void after_reduce(const StepInfo& info);
  void after_step(const StepInfo& info);
  /// Parameters were written by other hands than an optimiser's before after_step().
  void publish() { params_.publish_thawed(); }

  /// The files of one adapter.
  struct Saved {
    nlohmann::json config;  ///< adapter_config.json
    models::io::NamedTensors tensors;
    /// Of the same file: collect() gives them, one at a time and on all ranks.
    std::vector<std::pair<std::string, models::Weight*>> thawed;
    models::io::SafetensorsMetadata metadata;  ///< of the tensors' file; kFactsKey: what is ours
  };
  /// Tensors of the base that attached directories replace, by our name; each is read when called.
  std::map<std::string, std::function<Tensor()>> replaced_weights() const;

  /// Those that have something to save.
  size_t num_saved() const { return saved_.size(); }
  Saved save(size_t index, const BaseFacts& base) const;
  /// Values of every trained parameter from an adapter directory (or its numbered parts), all or
  /// nothing.
  void load(const std::string& directory);

 private:
  struct Trained {
    std::string name;
    std::shared_ptr<Method> method;
    size_t first_param, num_params, first_constant, num_constants;
    std::string init_from;
    bool goes_on;                        ///< from an adapter: nothing is left to start
    std::shared_ptr<WholeTensors> head;  ///< see attach_with_head
  };
  struct Frozen {
    std::string method_name;
    std::shared_ptr<Method> method;
    ParamSet params;
    std::string directory, name;
    double weight = 1;
    bool is_active = true;
    bool is_expert = false;  ///< a method computes with it: Method::experts
    std::shared_ptr<WholeTensors> head;
  };
  std::vector<Method*> running() const;  ///< innermost first
  void note_thawed(const std::vector<Param>& params, const std::string& method);
  void make_ready(MethodEntry& entry);
  const std::vector<size_t>& attach_experts(const Method& method);
  void check_thawed_alone() const;
  void check_replaces(const std::map<const LinearSite*, size_t>& checked) const;
  template <class Site>
  std::string owner(const Site& site, size_t place) const;
  void check_task(const std::string& directory) const;
  template <class Wanted>
  std::shared_ptr<WholeTensors> attach_with_head(Method& method, AttachContext& context,
                                                 const Wanted& wanted);
  void run_active();
  void check_composes(const std::string& method);
  std::vector<std::string> directories() const;  ///< that adapters came from
  std::vector<Param> params_of(const Trained& part) const;
  std::vector<Constant> constants_of(const Trained& part) const;

  models::Model& model_;
  at::Device device_;
  kernels::Key random_;
  SlotMap slots_;
  ParamSet params_;  ///< of the trained methods
  std::vector<Trained> trained_;
  std::vector<size_t> saved_;  ///< of trained_
  std::string trains_head_;    ///< the method that does; empty: none
  std::vector<Frozen> frozen_;
  std::map<const Method*, std::vector<size_t>> experts_;  ///< numbers in frozen_
  std::map<const void*, std::string> method_of_;          ///< of the adapters attached so far
  std::map<const models::Weight*, std::string> thawed_by_;
};

/// Reads adapter_config.json: the method it names, with its fields set.
/// @throws graft::Error (kData) for a type that no method here has, or values outside of the
/// fields' bounds
std::shared_ptr<Method> method_of_directory(const std::string& directory, std::string& name);

/// Of the base that an adapter was trained on; empty where its files do not say (PEFT's do not).
std::string base_fingerprint(const std::string& directory);

/// Name of part `index` of `count` inside an adapter directory: "" for a single method, else "0",
/// "1" ...
std::string part_directory(const std::string& directory, size_t index, size_t count);

}  // namespace graft::peft
