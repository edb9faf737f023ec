// AdaLoRA: y = W x + s B diag(E) A x, s = alpha / (init_r + 1e-5): ranks go to the matrices that
// need them.       Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient
//                  Fine-Tuning", arXiv:2303.10512, alg. 1
// Trains A [init_r, in] and B [out, init_r] (normal, 0.02) and E [init_r, 1] (zeros): the model is
// unchanged at step 0. Mergeable. orth_reg_weight times the mean of |A A^T - I| and |B^T B - I| is
// added to the loss, as its gradient, once a step. After tinit steps all but the `budget` ranks of
// highest score (rank_scores.h) over all slots get E = 0; the budget falls with the third power to
// target_r a slot, tfinal steps before the end, and then the choice stands.
// Formulas, fields and files are HF PEFT's (AdaLoraConfig). Steps count from 1, so that the last
// one has the whole choice, and total_step is the run's. PEFT cuts rows off when it saves, which
// are read here; ours keep them all, with E = 0, and so can be trained on.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/rank_scores.h"

namespace graft::peft {
namespace {

struct AdaloraConfig {
  Targets targets;
  int init_r = 12, target_r = 8;
  double lora_alpha = 8, lora_dropout = 0;
  int tinit = 0, tfinal = 0, deltaT = 1;
  double beta1 = 0.85, beta2 = 0.85, orth_reg_weight = 0.5;
  std::string init_lora_weights = "true";
  std::map<std::string, int> kept;  ///< no field: rows by module, in a file of PEFT's

  void fields(configs::Fields& f) {
    f("init_r", init_r, f.range(1, 4096), "rank of every slot at first");
    f("target_r", target_r, f.range(1, 4096), "mean rank of the slots at the end");
    f("lora_alpha", lora_alpha, f.at_least(0).at_most(1e30), "scaled by lora_alpha / init_r");
    f("lora_dropout", lora_dropout, f.at_least(0).below(1), "probability, on the adapter's input");
    f("tinit", tinit, f.at_least(0), "first steps, with all ranks");
    f("tfinal", tfinal, f.at_least(0), "last steps, with the ranks that are left");
    f("deltaT", deltaT, f.at_least(1), "steps from one choice to the next");
    f("beta1", beta1, f.positive().below(1), "how long scores remember");
    f("beta2", beta2, f.positive().below(1), "how long their deviations remember");
    f("orth_reg_weight", orth_reg_weight, f.at_least(0), "how much A and B are to be orthogonal");
    f("init_lora_weights", init_lora_weights, f.one_of({"true", "false"}),
      "false: all normal, not as the base");
  }
  int rank(const LinearSite&) const { return init_r; }
  static PeftForm peft_form() {
    return {.type = "ADALORA",
            .bias_only = "lora_only",
            .inert = {"r", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
                      "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
                      "total_step", "rank_pattern", "use_rslora", "alpha_pattern"}};
  }
  bool starts_as_base() const { return init_lora_weights == "true"; }
  int64_t fixed_steps() const { return int64_t{tinit} + tfinal; }
};

class AdaloraLinear : public models::LinearAdapter {
 public:
  AdaloraLinear(const AdaloraConfig& c, const LinearSite& site, kernels::Key random,
                at::Device device)
      : scale_((c.lora_alpha > 0 ? c.lora_alpha : c.init_r) / (c.init_r + 1e-5)),
        dropout_(c.lora_dropout),
        random_(random) {
    GRAFT_CHECK(c.target_r <= c.init_r, "adalora: target_r = ", c.target_r,
                ", at most init_r = ", c.init_r, " is possible");
    const auto found = c.kept.find(site.hf_path);
    const int64_t rows = found == c.kept.end() ? c.init_r : found->second;
    const double deviation = c.starts_as_base() ? 0.02 : 1;
    const auto draw = [&](int64_t n, int64_t m, int number) {
      return draw_normal({n, m}, deviation, kernels::derive(random, number), device);
    };
    a_ = register_parameter("lora_a", draw(rows, site.info.in, 1));
    b_ = register_parameter("lora_b", draw(site.info.out, rows, 2));
    e_ = register_parameter("lora_e", draw(rows, 1, 3) * (c.starts_as_base() ? 0 : 1));
    scores_.emplace(std::array<Tensor, 3>{a_, b_, e_});
  }
  static std::vector<Leaf> leaves() {
    return {{"lora_a", "lora_A"}, {"lora_b", "lora_B"}, {"lora_e", "lora_E"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    return kernels::lowrank_add(base(x), dropout(x, dropout_, pass, random_), a_ * e_, b_, scale_);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (scale_ * b_.mm(a_ * e_)).to(w.scalar_type());
  }

  void add_penalty(double weight) const { add_orthogonality(a_, b_, a_.size(0), weight); }
  const RankScores& scores() const { return *scores_; }

 private:
  double scale_, dropout_;
  kernels::Key random_;
  Tensor a_, b_, e_;
  std::optional<RankScores> scores_;
};

class Adalora : public LinearMethod<AdaloraConfig, AdaloraLinear> {
 public:
  void after_reduce(const StepInfo& info) override {
    GRAFT_CHECK(config_.fixed_steps() < info.max_steps,
                "adalora: tinit + tfinal = ", config_.fixed_steps(),
                ", less than the steps of the run, ", info.max_steps, ", is needed");
    const at::NoGradGuard no_grad;
    max_steps_ = info.max_steps;
    for (const auto& adapter : adapters_)
      adapter->add_penalty(config_.orth_reg_weight / 2 / static_cast<double>(adapters_.size()));
  }
  void after_step(const StepInfo& info) override {
    const at::NoGradGuard no_grad;
    const int64_t step = info.step + 1, last = info.max_steps - config_.tfinal;
    if (step < last) {
      for (const auto& adapter : adapters_) adapter->scores().update(config_.beta1, config_.beta2);
    }
    const bool is_due = step > config_.tinit && step % config_.deltaT == 0;
    if (step == last || (step < last && is_due)) choose(step, last);
    if (step >= last || is_due) {
      for (const auto& adapter : adapters_) adapter->scores().keep_chosen();
    }
  }
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    nlohmann::json config = LinearMethod::to_peft_config(slots);
    config["total_step"] = std::max(max_steps_, config_.fixed_steps() + 1);
    config["rank_pattern"] = pattern_;
    return config;
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    const auto pattern = adapter.config.find("rank_pattern");
    if (pattern != adapter.config.end() && pattern->is_object()) {
      pattern_ = *pattern;
      for (const auto& [key, rows] : pattern_.items()) {  // "<module>.lora_E": [true, false ...]
        const auto is_flag = [](const auto& row) { return row.is_boolean(); };
        GRAFT_CHECK(rows.is_array() && std::all_of(rows.begin(), rows.end(), is_flag),
                    ExitCode::kData, "adapter_config.json: rank_pattern.", key,
                    " is no list of true and false");
        config_.kept[key.substr(0, key.rfind('.'))] =
            static_cast<int>(std::count(rows.begin(), rows.end(), true));
      }
    }
    const auto total = adapter.config.find("total_step");
    if (total != adapter.config.end() && total->is_number_integer())
      max_steps_ = total->get<int64_t>();
    LinearMethod::from_peft_config(adapter);
  }

 protected:
  void attach_to(AttachContext& context, const LinearSite& site) override {
    LinearMethod::attach_to(context, site);
    adapters_.back()->scores().list(context, site);
  }

 private:
  /// All but the best `budget` triples go.
  void choose(int64_t step, int64_t last) const {
    std::vector<const RankScores*> slots;
    for (const auto& adapter : adapters_) slots.push_back(&adapter->scores());
    const double left =
        1 - static_cast<double>(step - config_.tinit) / static_cast<double>(last - config_.tinit);
    RankScores::choose_best(slots, config_.target_r * static_cast<int64_t>(slots.size()),
                            std::pow(left, 3));
  }

  int64_t max_steps_ = 0;   ///< of the run, or of the one that wrote the file
  nlohmann::json pattern_;  ///< PEFT's rank_pattern, of a file with rows cut off
};

}  // namespace

void register_adalora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Adalora>(); }});
}

}  // namespace graft::peft
