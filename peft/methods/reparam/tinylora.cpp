// TinyLoRA: y = W x + b + B R A x, R = sum_i v_i P_i, with W ~ (U sqrt S) (sqrt S V^T) cut at rank
// r: B the left part, A the right one.  "Learning to Reason in 13 Parameters", arXiv:2602.04118
// Trains v [u] of each group of slots (zeros: the model is unchanged at step 0; init_weights
// uniform: within init_v_bound; false: PEFT leaves it as the memory was, here zeros too).
// weight_tying 0: a group a slot; 1: one for all; between, neighbours. A and B are frozen and
// saved. P [u, r, r] is random and frozen, of the seed and the slot's number among those adapted,
// drawn as PyTorch does, so files may leave it out (save_projection: false). Mergeable. Fields and
// files are those of HF PEFT's TinyLoraConfig.
#include <ATen/ATen.h>

#include <cmath>

#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/projection.h"

namespace graft::peft {
namespace {

struct TinyloraConfig {
  Targets targets;
  int r = 2;
  int u = 64;
  double weight_tying = 0;
  int projection_seed = 42;
  bool save_projection = true;
  double init_v_bound = 0.02;
  double tinylora_dropout = 0;
  std::string init_weights = "true";
  Tensor v;            ///< no fields: the next slot's
  int64_t number = 0;  ///< and its number

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "singular directions, at most those of the matrix");
    f("u", u, f.range(1, 1 << 20), "values trained for a group of slots");
    f("weight_tying", weight_tying, f.range(0, 1), "0: each slot its own v; 1: one for all");
    f("projection_seed", projection_seed, f.at_least(0), "of P");
    f("save_projection", save_projection, "save P too, not only its seed");
    f("init_v_bound", init_v_bound, f.positive(), "of v's first values with init_weights uniform");
    f("tinylora_dropout", tinylora_dropout, f.at_least(0).below(1), "on the adapter's input");
    f("init_weights", init_weights, f.one_of({"true", "uniform", "false"}),
      "true: v zero; uniform: random, not as the base");
  }
  static PeftForm peft_form() { return {.type = "TINYLORA", .bias_only = "tinylora_only"}; }
  bool starts_as_base() const { return init_weights != "uniform"; }
};

class TinyloraLinear : public models::LinearAdapter {
 public:
  TinyloraLinear(const TinyloraConfig& c, const LinearSite& site, kernels::Key random,
                 at::Device device)
      : dropout_(c.tinylora_dropout), random_(random), v_(c.v) {
    const int64_t r = std::min({int64_t{c.r}, site.info.in, site.info.out});
    const auto generator = torch_generator(static_cast<uint64_t>(c.projection_seed + c.number));
    const double deviation = 1 / std::sqrt(static_cast<double>(r));
    p_ = at::normal(0, deviation, {c.u, r, r}, generator).to(device);
    if (c.save_projection) register_buffer("tinylora_P", p_);
    a_ = register_buffer("tinylora_A", at::zeros({r, site.info.in}, p_.options()));
    b_ = register_buffer("tinylora_B", at::zeros({site.info.out, r}, p_.options()));
  }
  static std::vector<Leaf> leaves() {
    return {
        {"tinylora_A", "tinylora_A"}, {"tinylora_B", "tinylora_B"}, {"tinylora_P", "tinylora_P"}};
  }
  void initialize(const TinyloraConfig&, const LinearSite& site, BaseWeights& base) {
    const auto [u, s, vh] = at::linalg_svd(base.weight(site), /*full_matrices=*/false);
    const int64_t r = a_.size(0);
    const Tensor root = s.slice(0, 0, r).sqrt();
    a_.copy_(root.unsqueeze(1) * vh.slice(0, 0, r));
    b_.copy_(u.slice(1, 0, r) * root);
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    return kernels::lowrank_add(base(x), dropout(x, dropout_, pass, random_), mixed().mm(a_), b_,
                                1);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + b_.mm(mixed()).mm(a_).to(w.scalar_type());
  }

 private:
  Tensor mixed() const {
    return v_.matmul(p_.to(v_.scalar_type()).flatten(1)).view({p_.size(1), p_.size(2)});
  }  ///< R

  double dropout_;
  kernels::Key random_;
  Tensor v_, p_, a_, b_;
};

class Tinylora : public LinearMethod<TinyloraConfig, TinyloraLinear> {
 protected:
  void before_slots(AttachContext& context) override {
    const auto count = static_cast<int64_t>(sites_.size());
    const double apart = static_cast<double>(count) * (1 - config_.weight_tying);
    const int64_t groups = std::max<int64_t>(1, std::llrint(apart));  // as Python rounds
    group_size_ = std::max<int64_t>(1, count / groups);
    values_.clear();
    for (int64_t group = 0; group < groups; ++group) {
      const auto first = sites_.begin() + group * group_size_;
      const bool is_last = group + 1 == groups;
      const std::vector<const LinearSite*> users(first,
                                                 is_last ? sites_.end() : first + group_size_);
      const double bound = config_.starts_as_base() ? 0 : config_.init_v_bound;
      const auto key = kernels::derive(context.random, group);
      const std::string name = "tinylora_v." + std::to_string(group);
      values_.push_back(draw_uniform({config_.u}, bound, key, context.device));
      add_shared(context, name, "base_model." + name, values_.back(), users);
    }
  }
  void attach_to(AttachContext& context, const LinearSite& site) override {
    config_.number = static_cast<int64_t>(adapters_.size());
    const size_t group =
        std::min(adapters_.size() / static_cast<size_t>(group_size_), values_.size() - 1);
    config_.v = values_[group];
    const bool is_first = adapters_.size() == group * static_cast<size_t>(group_size_);
    LinearMethod::attach_to(context, site);
    if (is_first) adapters_.back()->register_parameter("tinylora_v", config_.v);
  }

 private:
  int64_t group_size_ = 1;
  std::vector<Tensor> values_;  ///< v, by group
};

}  // namespace

void register_tinylora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Tinylora>(); }});
}

}  // namespace graft::peft
