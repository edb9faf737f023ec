// IncreLoRA: y = W x + (alpha / ranks) B diag(E) A x: ranks are added where they are needed.
//   Zhang et al. 2023, "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient
//   Fine-tuning", arXiv:2308.12043, alg. 1
// Trains A [max_r, in] and B [out, max_r] (normal, 0.02) and E [max_r, 1] (zeros): the model is
// unchanged at step 0. Mergeable. The first lora_r ranks are in use, and behind them incre_rank_num
// in reserve, whose A and B learn ahead at E = 1e-5 (advance_learn). After init_warmup steps, every
// incre_interval steps, the top_h slots of highest score take their reserve into use, until there
// are target_r ranks a slot on average; then reserves get E = 0. The score is that of the whole
// update (rank_scores.h), smoothed, times its smoothed deviation. orth_reg_weight times the mean of
// |A A^T - I| and |B^T B - I| is added to the loss, as its gradient, once a step. The authors' code
// (FeiyuZhang98/IncreLoRA) takes the score of a step's last micro-batch, here those of all
// are added up; what a slot computes jumps there as it grows (not with scale_by: initial_rank); its
// penalty holds rows against themselves, the paper's and ours against all; new ranks warm up their
// rate, which rows of ours cannot. No HF PEFT type.
#include <ATen/ATen.h>

#include <algorithm>

#include "configs/check.h"
#include "configs/log.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/rank_scores.h"

namespace graft::peft {
namespace {

struct IncreloraConfig {
  Targets targets;
  int lora_r = 1, target_r = 2;
  configs::Auto<int> max_r, incre_rank_num;
  double lora_alpha = 16, lora_dropout = 0;
  std::string scale_by = "current_rank";
  int init_warmup = 1000, incre_interval = 1000, top_h = 2;
  bool advance_learn = true;
  double beta1 = 0.85, beta2 = 0.85, orth_reg_weight = 0.1;

  void fields(configs::Fields& f) {
    f("lora_r", lora_r, f.range(1, 4096), "rank of every slot at first");
    f("target_r", target_r, f.range(1, 4096), "mean rank of the slots at the end");
    f("max_r", max_r, f.range(1, 65536), "the most a slot may grow to; auto: 4 target_r");
    f("incre_rank_num", incre_rank_num, f.range(1, 4096), "ranks added at once; auto: target_r/2");
    f("lora_alpha", lora_alpha, f.positive().at_most(1e30), "scaled by lora_alpha / rank");
    f("lora_dropout", lora_dropout, f.at_least(0).below(1), "probability, on the adapter's input");
    f("scale_by", scale_by, f.one_of({"current_rank", "initial_rank"}),
      "that rank: now, or lora_r");
    f("init_warmup", init_warmup, f.at_least(0), "first steps, without growth");
    f("incre_interval", incre_interval, f.at_least(1), "steps from one growth to the next");
    f("top_h", top_h, f.at_least(1), "slots that grow at once");
    f("advance_learn", advance_learn, "train A and B of the reserve before they are in use");
    f("beta1", beta1, f.positive().below(1), "how long scores remember");
    f("beta2", beta2, f.positive().below(1), "how long their deviations remember");
    f("orth_reg_weight", orth_reg_weight, f.at_least(0), "how much A and B are to be orthogonal");
  }
  static double learning_rate_factor(std::string_view leaf) { return leaf == "score" ? 0 : 1; }
  int64_t most() const { return std::max(max_r.value.value_or(4 * target_r), lora_r); }
  int64_t added() const { return incre_rank_num.value.value_or(std::max(target_r / 2, 1)); }
};

class IncreloraLinear : public models::LinearAdapter {
 public:
  IncreloraLinear(const IncreloraConfig& c, const LinearSite& site, kernels::Key random,
                  at::Device device)
      : config_(c), random_(random) {
    GRAFT_CHECK(std::max(c.lora_r, c.target_r) <= c.most(), "increlora: lora_r = ", c.lora_r,
                ", target_r = ", c.target_r, ", at most max_r = ", c.most(), " is possible");
    const auto key_b = kernels::derive(random, 1);
    a_ = register_parameter("lora_a", draw_normal({c.most(), site.info.in}, 0.02, random, device));
    b_ = register_parameter("lora_b", draw_normal({site.info.out, c.most()}, 0.02, key_b, device));
    e_ = register_parameter("lora_e", at::zeros({c.most(), 1}, a_.options()));
    score_ = register_parameter("score", at::zeros({1}, a_.options()));
    ranks_ = register_buffer("ranks", at::full({1}, c.lora_r, at::kLong));  // read on the host
    importance_ = register_buffer("importance", at::zeros({1}, a_.options()));
    deviation_ = register_buffer("deviation", at::zeros({1}, a_.options()));
  }
  static std::vector<Leaf> leaves() {
    return {{"lora_a", "lora_A"}, {"lora_b", "lora_B"},         {"lora_e", "lora_E"},
            {"ranks", "ranks"},   {"importance", "importance"}, {"deviation", "deviation"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const Tensor dropped = dropout(x, config_.lora_dropout, pass, random_);
    const Tensor a = factor_a(), b = factor_b();
    const Tensor y = kernels::lowrank_add(base(x), dropped, a, b, 1);
    return pass.training && is_growing_ ? scored(y, dropped, a.detach(), b.detach(), score_) : y;
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + factor_b().mm(factor_a()).to(w.scalar_type());
  }

  /// Adds the penalty; E of the reserve stays. The score is taken before gradients are clipped.
  void before_step(double penalty) {
    add_orthogonality(a_, b_, learning(), penalty);
    e_.grad().slice(0, ranks()).zero_();
    seen_ = score_.grad() / kScoreShrink;
    idle_a_ = a_.slice(0, learning()).clone(), idle_b_ = b_.slice(1, learning()).clone();
  }
  /// What does not learn yet is to grow from where it was drawn: weight decay is undone.
  void after_step(bool is_growing) const {
    a_.slice(0, learning()).copy_(idle_a_), b_.slice(1, learning()).copy_(idle_b_);
    if (is_growing) smooth_score(seen_, {importance_, deviation_}, config_.beta1, config_.beta2);
  }
  double score() const { return (importance_ * deviation_).item<double>(); }
  int64_t ranks() const { return ranks_.item<int64_t>(); }
  bool grow() const {  // false: it is full
    if (ranks() + config_.added() > config_.most()) return false;
    return ranks_.add_(config_.added()), true;
  }
  void set_reserve(bool is_growing) {
    is_growing_ = is_growing;
    e_.slice(0, ranks(), end()).fill_(is_growing && config_.advance_learn ? 1e-5 : 0);
  }

 private:
  int64_t end() const { return std::min(ranks() + config_.added(), config_.most()); }
  int64_t learning() const { return config_.advance_learn ? end() : ranks(); }
  Tensor factor_a() const {
    const int64_t r = config_.scale_by == "current_rank" ? ranks() : config_.lora_r;
    const double scale = config_.lora_alpha / (static_cast<double>(r) + 1e-5);
    return a_.slice(0, 0, end()) * (scale * e_.slice(0, 0, end()));
  }
  Tensor factor_b() const { return b_.slice(1, 0, end()); }
  IncreloraConfig config_;
  kernels::Key random_;
  Tensor a_, b_, e_, score_, ranks_, importance_, deviation_, seen_, idle_a_, idle_b_;
  bool is_growing_ = true;
};

class Increlora : public LinearMethod<IncreloraConfig, IncreloraLinear> {
 public:
  void after_reduce(const StepInfo& info) override {
    const at::NoGradGuard no_grad;
    if (info.step == 0) warn_if_too_short(info.max_steps);
    for (const auto& adapter : adapters_)
      adapter->before_step(config_.orth_reg_weight / 2 / static_cast<double>(adapters_.size()));
  }
  void after_step(const StepInfo& info) override {
    const at::NoGradGuard no_grad;
    const int64_t step = info.step + 1;
    const bool was_growing = missing() > 0;
    for (const auto& adapter : adapters_) adapter->after_step(was_growing);
    if (step > config_.init_warmup && step % config_.incre_interval == 0) grow();
    const bool is_growing = missing() > 0;
    for (const auto& adapter : adapters_) adapter->set_reserve(is_growing);
  }

 private:
  int64_t missing() const {
    int64_t ranks = config_.target_r * static_cast<int64_t>(adapters_.size());
    for (const auto& adapter : adapters_) ranks -= adapter->ranks();
    return ranks;
  }
  /// The slots of highest score that have room; of equal ones the first.
  void grow() const {
    auto slots = adapters_;
    std::stable_sort(slots.begin(), slots.end(),
                     [](const auto& a, const auto& b) { return a->score() > b->score(); });
    int left = config_.top_h;
    for (const auto& slot : slots) {
      if (left > 0 && missing() > 0 && slot->grow()) --left;
    }
  }
  void warn_if_too_short(int64_t steps) const {
    const int64_t every = config_.incre_interval;
    const int64_t growths = std::max<int64_t>(steps / every - config_.init_warmup / every, 0);
    const int64_t added = growths * config_.top_h * config_.added();
    if (added < missing())
      log::warn(detail::concat("increlora: target_r is out of reach: ", steps, " steps add ", added,
                               " ranks of ", missing()));
  }
};

}  // namespace

void register_increlora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Increlora>(); }});
}

}  // namespace graft::peft
