// ParamSet: everything trainable, in a fixed order: the order of gradients, of moments and of what
// is saved; and the constants that are saved beside it. Most of it is replicated (storage class R);
// a thawed weight of the base is cut over the ranks as its block is (class S): every rank trains
// the elements it owns.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "models/weight.h"

namespace graft::peft {

using at::Tensor;

struct Param {
  std::string name;  ///< "0.block.3.attn.q.lora_a": method's place in the list, slot, leaf
  std::string
      hf_key;     ///< in files: "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
  Tensor value;   ///< float32 leaf that requires grad; of a thawed weight its master, once loaded
  int stage = 0;  ///< where the trunk finds its gradient
  /// The last stage that uses it, if there are several: its gradient is the sum over them.
  int last_stage = stage;
  double learning_rate_factor = 1;
  /// Where the run's is highest, in place of the run's times the factor.
  std::optional<double> learning_rate = {};
  /// A constant that files hold behind the value, in the same tensor along `tail_dim`; undefined:
  /// none.
  Tensor tail = {};
  int64_t tail_dim = 0;
  models::Weight* thawed = nullptr;  ///< class S

  int64_t numel() const { return thawed == nullptr ? value.numel() : thawed->numel(); }
  /// Of several ranks each has a part of it.
  bool is_cut() const { return thawed != nullptr && thawed->ranges().size() > 1; }
  /// The value as files hold it.
  Tensor saved() const;
  /// Sets value and tail from what a file holds.
  void set(const Tensor& saved) const;
};

/// A tensor that an adapter computes with and does not train (VeRA's projections, the places of a
/// sparse delta).
struct Constant {
  std::string name, hf_key;
  Tensor value;                  ///< of any dtype
  bool may_be_left_out = false;  ///< a file without it means the value it has
  bool is_saved = true;          ///< false: read where a file has it, not written
};

/// What is kept of a parameter through a run, element by element: moments of an optimiser, or what
/// a method compares it with.
struct ParamState {
  std::string name;  ///< "exp_avg"
  size_t param;      ///< in the ParamSet's order
  Tensor value;
  int64_t elements = 1;  ///< of the parameter, that one element of `value` stands for
};

class ParamSet {
 public:
  void add(Param param);
  void add(Constant constant);
  /// From initialize() on: checkpoints hold it with the moments, adapters do not.
  void keep(ParamState state) { kept_.push_back(std::move(state)); }
  const std::vector<ParamState>& kept() const { return kept_; }
  /// Gives a parameter its tail.
  void set_tail(const std::string& name, Tensor tail, int64_t dim);
  void set_learning_rate(const std::string& name, double rate);
  const std::vector<Param>& all() const { return params_; }
  const std::vector<Constant>& constants() const { return constants_; }
  bool empty() const { return params_.empty(); }
  int64_t numel() const;  ///< over all ranks
  bool has_thawed() const;
  /// The base is loaded: thawed weights get their values. publish(): those have changed.
  void bind_thawed();
  void publish_thawed();
  int lowest_stage() const;  ///< of an empty set: INT_MAX
  /// XXH3-128 over names and bytes, hex. Of the replicated ones: equal on all ranks, or one of them
  /// is broken.
  std::string hash() const;
  std::string replicated_hash() const;

 private:
  std::string hash(bool with_thawed) const;
  Param& named(const std::string& name);

  std::vector<Param> params_;
  std::vector<Constant> constants_;
  std::vector<ParamState> kept_;
  std::unordered_set<std::string> names_;
};

}  // namespace graft::peft
