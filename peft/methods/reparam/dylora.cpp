// DyLoRA: y = W x + s B_b A_b x with the first b ranks of A and B, b drawn each step: any first
// ranks work alone.
//   Valipour et al. 2023, "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic
//   Search-Free Low-Rank Adaptation", arXiv:2210.07558, alg. 1
// Trains A [r, in] (Kaiming-uniform, a = sqrt 5) and B [out, r] (zeros): the model is unchanged at
// step 0. Mergeable. b is a multiple of block_size, uniform, the same for all slots (or one each:
// per_slot, as LyCORIS and kohya), a function of seed and step. Outside of training the first
// inference_r ranks work, all by default. update: piece trains the newest block_size of the b ranks
// only (the paper's frozen mode, LyCORIS, kohya), prefix all of them; where a rank rests, the
// optimiser's momentum goes on moving it. s: sqrt_rank, alpha / sqrt(r b), is the authors' code;
// rank, alpha / b, the paper's equation; pieces, alpha block_size / b, LyCORIS. No HF PEFT type;
// with all ranks and either of the first two it is LoRA.
#include <ATen/ATen.h>

#include <cmath>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "kernels/random/random.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/lora_fields.h"

namespace graft::peft {
namespace {

struct DyloraConfig {
  Targets targets;
  int r = 8, block_size = 1;
  double lora_alpha = 8, lora_dropout = 0;
  configs::Auto<int> inference_r;
  std::string update = "piece", scale_by = "sqrt_rank";
  bool per_slot = false;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank, the inner size");
    f("block_size", block_size, f.range(1, 4096),
      "ranks that come and go together, a divisor of r");
    f("lora_alpha", lora_alpha, f.positive().at_most(1e30), "scaled by lora_alpha / scale_by");
    f("lora_dropout", lora_dropout, f.at_least(0).below(1), "probability, on the adapter's input");
    f("inference_r", inference_r, f.range(1, 4096), "ranks outside of training; auto: all");
    f("update", update, f.one_of({"piece", "prefix"}),
      "train the newest block of the ranks in use, or all of them");
    f("scale_by", scale_by, f.one_of({"sqrt_rank", "rank", "pieces"}),
      "sqrt(r times the ranks in use), the ranks in use, or their blocks");
    f("per_slot", per_slot, "draw the ranks in use for each slot, not once a step");
    f.require(r % block_size == 0, "block_size", "a divisor of r is needed");
    f.require(inference_r.value.value_or(1) <= r, "inference_r", "at most r is possible");
  }
  int rank(const LinearSite&) const { return r; }
};

class DyloraLinear : public models::LinearAdapter {
 public:
  DyloraLinear(const DyloraConfig& c, const LinearSite& site, kernels::Key random,
               at::Device device)
      : config_(c), random_(random) {
    LoraFields lora;
    lora.r = c.r;
    const auto [a, b] = lora.start(site, random, device);
    a_ = register_parameter("lora_a", a);
    b_ = register_parameter("lora_b", b);
    ranks_ = register_buffer("ranks", at::full({1}, c.r, at::kLong));  // read on the host
  }
  static std::vector<Leaf> leaves() {
    return {{"lora_a", "lora_A.weight"}, {"lora_b", "lora_B.weight"}, {"ranks", "ranks"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const int64_t b = pass.training ? ranks() : inference_ranks();
    return kernels::lowrank_add(base(x), dropout(x, config_.lora_dropout, pass, random_),
                                a_.slice(0, 0, b), b_.slice(1, 0, b), scale(b));
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const int64_t b = inference_ranks();
    return w + (scale(b) * b_.slice(1, 0, b).mm(a_.slice(0, 0, b))).to(w.scalar_type());
  }

  /// Draws the ranks of the next step.
  void draw(kernels::Key key) const {
    const Tensor u = at::empty({1}, at::kFloat);
    kernels::uniform(u, config_.per_slot ? kernels::derive(key, random_.stream) : key);
    const int blocks = config_.r / config_.block_size;
    ranks_.fill_((static_cast<int>(u.item<double>() * blocks) + 1) * config_.block_size);
  }
  /// Takes the gradients of all ranks but the newest block.
  void keep_piece() const {
    const int64_t older = ranks() - config_.block_size;
    a_.grad().slice(0, 0, older).zero_();
    b_.grad().slice(1, 0, older).zero_();
  }

 private:
  int64_t ranks() const { return ranks_.item<int64_t>(); }
  int64_t inference_ranks() const { return config_.inference_r.value.value_or(config_.r); }
  double scale(int64_t ranks) const {
    const auto b = static_cast<double>(ranks);
    if (config_.scale_by == "rank") return config_.lora_alpha / b;
    if (config_.scale_by == "pieces") return config_.lora_alpha * config_.block_size / b;
    return config_.lora_alpha / std::sqrt(config_.r * b);
  }

  DyloraConfig config_;
  kernels::Key random_;
  Tensor a_, b_, ranks_;
};

class Dylora : public LinearMethod<DyloraConfig, DyloraLinear> {
 public:
  void attach(AttachContext& context) override {
    LinearMethod::attach(context);
    random_ = site_key(context, "ranks");
    draw(0);
  }
  void after_reduce(const StepInfo&) override {
    const at::NoGradGuard no_grad;
    if (config_.update == "prefix") return;
    for (const auto& adapter : adapters_) adapter->keep_piece();
  }
  void after_step(const StepInfo& info) override { draw(info.step + 1); }

 private:
  void draw(int64_t step) const {
    for (const auto& adapter : adapters_) adapter->draw(kernels::derive(random_, step));
  }
  kernels::Key random_{};
};

}  // namespace

void register_dylora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Dylora>(); }});
}

}  // namespace graft::peft
