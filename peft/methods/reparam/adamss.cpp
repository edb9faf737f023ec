// AdaMSS: y = W x + b + B_s A_s P [x; 1], each output in one subspace s of K.        NeurIPS 2025
// P [r, in (+ 1)] holds the first right singular vectors of [W, b] (of W where there is no b).
// Trains A [K subspace_rank, r] (orthonormal rows) and B [out, subspace_rank] (zeros): the model is
// unchanged at step 0. P is frozen and saved; it comes from subspace iteration, as PyTorch's
// svd_lowrank has it with random_seed. The subspaces are clusters of the rows of the left singular
// vectors (k-means), saved as the number of each output's. Mergeable where there is no bias.
// use_asa: subspaces of lower scores are left as they are, more and more of them, until the rest is
// asa_target_subspaces over all slots (as in PEFT one less, where equals would be cut apart).
// Fields and files are those of HF PEFT's AdamssConfig with num_subspaces 1. PEFT clusters by
// scikit-learn's generator when it loads and its file does not say how, so files with several
// subspaces cannot be interchanged: PEFT's are refused, ours have no PEFT type. use_dynamic_rank
// (fewer ranks where singular values are small) is left out.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/subspaces.h"

namespace graft::peft {
namespace {

struct AdamssConfig {
  Targets targets;
  int r = 100, num_subspaces = 1, subspace_rank = 1, random_seed = 0;
  std::string init_weights = "orthogonal";
  bool use_asa = false;
  int asa_target_subspaces = 50, init_warmup = 50, final_warmup = 1000, mask_interval = 100;
  double asa_importance_beta = 0.85, asa_uncertainty_beta = 0.85, asa_schedule_exponent = 3;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 65536), "singular vectors, at most those of the matrix");
    f("num_subspaces", num_subspaces, f.range(1, 4096), "of a slot; PEFT reads files with 1 only");
    f("subspace_rank", subspace_rank, f.range(1, 4096), "rank of the update of a subspace");
    f("random_seed", random_seed, f.at_least(0), "of the subspace iteration and of the clusters");
    f("init_weights", init_weights, f.one_of({"orthogonal", "false"}),
      "B zero; false: B normal, not as the base");
    f("use_asa", use_asa, "stop training the subspaces that the loss needs least");
    f("asa_target_subspaces", asa_target_subspaces, f.at_least(1), "of all slots, at the end");
    f("init_warmup", init_warmup, f.at_least(0), "step of the first choice, from 0");
    f("final_warmup", final_warmup, f.at_least(1), "step of the last choice");
    f("mask_interval", mask_interval, f.at_least(1), "steps from one choice to the next");
    f("asa_importance_beta", asa_importance_beta, f.at_least(0).below(1), "how long scores last");
    f("asa_uncertainty_beta", asa_uncertainty_beta, f.at_least(0).below(1),
      "how long their deviations last");
    f("asa_schedule_exponent", asa_schedule_exponent, f.positive().at_most(100),
      "how early most are stopped");
    f.require(!use_asa || init_warmup < final_warmup, "init_warmup", "is not below final_warmup");
  }
  static PeftForm peft_form() {
    return {.type = "ADAMSS", .fixed = {{"use_dynamic_rank", false}}, .inert = {"svd_threshold"}};
  }
  bool is_pefts() const { return num_subspaces == 1; }
  bool starts_as_base() const { return init_weights == "orthogonal"; }
  /// Subspaces that go on after a step, of `all`.
  int64_t target(int64_t step, int64_t all) const {
    const double left = static_cast<double>(final_warmup - step) / (final_warmup - init_warmup);
    return static_cast<int64_t>(asa_target_subspaces +
                                static_cast<double>(all - asa_target_subspaces) *
                                    std::pow(left, asa_schedule_exponent));
  }
};

class AdamssLinear : public models::LinearAdapter {
 public:
  AdamssLinear(const AdamssConfig& c, const LinearSite& site, kernels::Key random,
               at::Device device)
      : in_(site.info.in), count_(c.num_subspaces), has_bias_(site.info.has_bias) {
    const int64_t width = in_ + (has_bias_ ? 1 : 0), out = site.info.out;
    const int64_t r = std::min({int64_t{c.r}, out, width}), rank = c.subspace_rank;
    GRAFT_CHECK(rank <= r, "peft: adamss: ", site.name, ": subspace_rank = ", rank,
                ", at most r = ", r, " is possible");
    GRAFT_CHECK(count_ <= out, "peft: adamss: ", site.name, ": num_subspaces = ", count_,
                ", at most the ", out, " outputs is possible");
    std::vector<Tensor> starts;
    for (int64_t s = 0; s < count_; ++s) {
      const auto key = s == 0 ? random : kernels::derive(random, s + 1);
      starts.push_back(std::get<0>(at::linalg_qr(draw_normal({r, rank}, 1, key, at::kCPU))).t());
    }
    a_ = register_parameter("a", at::cat(starts).contiguous().to(device));
    const double deviation = c.starts_as_base() ? 0 : 0.01;
    b_ = register_parameter(
        "b", draw_normal({out, rank}, deviation, kernels::derive(random, 1), device));
    p_ = register_buffer("p", at::zeros({r, width}, b_.options()).detach());
    subspaces_ = at::zeros({out}, b_.options().dtype(at::kInt)).detach();
    if (count_ > 1) register_buffer("subspaces", subspaces_);
    scores_.emplace(a_, b_, subspaces_, count_, site.name);
  }
  static std::vector<Leaf> leaves() {
    return {{"a", "adamss_A.0"},
            {"b", "adamss_B.0"},
            {"p", "adamss_newB"},
            {"subspaces", "adamss_subspaces"}};
  }
  void initialize(const AdamssConfig& c, const LinearSite& site, BaseWeights& base) {
    Tensor w = base.weight(site).cpu();
    if (has_bias_) w = at::cat({w, base.bias(site).cpu().unsqueeze(1)}, 1);
    const auto [left, right] = singular_vectors(w, p_.size(0), c.random_seed);
    p_.copy_(right);
    if (count_ == 1) return;
    const Tensor cluster = clusters_of(left, count_, c.random_seed);
    subspaces_.copy_(cluster);
    for (int64_t k = 0; k < count_; ++k) {  // A: what the rows of the cluster span first
      const Tensor rows = left.index_select(0, at::nonzero(cluster == k).flatten());
      const Tensor first = std::get<2>(at::linalg_svd(rows, false)).slice(0, 0, b_.size(1));
      a_.slice(0, k * b_.size(1)).slice(0, 0, first.size(0)).copy_(first);
    }
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    Tensor y = base(x);
    if (has_bias_) y = y + up().mv(a_.mv(p_.select(1, in_))).to(y.scalar_type());
    return kernels::lowrank_add(y, x, a_.mm(p_.slice(1, 0, in_)), up(), 1);
  }
  bool mergeable() const override { return !has_bias_; }
  Tensor merged(const Tensor& w) const override {
    return w + up().mm(a_.mm(p_)).to(w.scalar_type());
  }
  SubspaceScores& scores() { return *scores_; }

 private:
  Tensor up() const {  // [out, K subspace_rank]
    if (count_ == 1) return b_;
    return (scores_->members().unsqueeze(2) * b_.unsqueeze(1)).flatten(1);
  }

  int64_t in_, count_;
  bool has_bias_;
  Tensor a_, b_, p_, subspaces_;
  std::optional<SubspaceScores> scores_;
};

class Adamss : public LinearMethod<AdamssConfig, AdamssLinear> {
 public:
  void after_reduce(const StepInfo&) override {
    const at::NoGradGuard no_grad;
    if (!config_.use_asa) return;
    for (const auto& adapter : adapters_) adapter->scores().hold();
  }
  void after_step(const StepInfo& info) override {
    const at::NoGradGuard no_grad;
    if (!config_.use_asa) return;
    for (const auto& adapter : adapters_) adapter->scores().restore();
    if (info.step < config_.init_warmup || info.step > config_.final_warmup) return;
    for (const auto& adapter : adapters_)
      adapter->scores().update(config_.asa_importance_beta, config_.asa_uncertainty_beta);
    if (info.step % config_.mask_interval != 0) return;
    std::vector<SubspaceScores*> slots;
    for (const auto& adapter : adapters_) slots.push_back(&adapter->scores());
    const int64_t all = config_.num_subspaces * static_cast<int64_t>(slots.size());
    SubspaceScores::keep_best(slots, config_.target(info.step, all));
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    LinearMethod::from_peft_config(adapter);
    GRAFT_CHECK(
        config_.is_pefts() || adapter.config.value("peft_type", nlohmann::ordered_json()).is_null(),
        ExitCode::kData, "adapter_config.json: num_subspaces = ", config_.num_subspaces,
        ": which outputs belong to which subspace does not stand in PEFT's file; PEFT "
        "clusters again by scikit-learn when it loads. Only num_subspaces = 1 can be read");
  }

 protected:
  void attach_to(AttachContext& context, const LinearSite& site) override {
    LinearMethod::attach_to(context, site);
    if (config_.use_asa) adapters_.back()->scores().list(context, site);
  }
};

}  // namespace

void register_adamss(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Adamss>(); }});
}

}  // namespace graft::peft
