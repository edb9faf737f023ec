// Super-Tuning: y = (W + S) x + b, S sparse, at the elements where W is largest. Supra, its hybrid:
// with r a LoRA beside it, y += (lora_alpha / r) B A x.                            arXiv:2607.09287
// Trains the values of S, a share 1 - sparsity of a matrix (zeros: the model is unchanged at step
// 0), and A [r, in] (Kaiming-uniform) and B [out, r] (zeros). Places: of the largest |W|, or the
// smallest (select_top: false), in the order of torch.topk; saved, or found again in the base
// (save_precomputed_indices: false). Mergeable. Builds S in every pass, as SHiRA does. Fields and
// files are those of HF PEFT's SupertuningConfig.
#include <ATen/ATen.h>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/places.h"

namespace graft::peft {
namespace {

struct SupertuningConfig {
  Targets targets;
  double sparsity = 0.99;
  bool select_top = true;
  std::optional<int> r;
  std::optional<double> lora_alpha;
  double lora_dropout = 0;
  bool init_weights = true;
  bool save_precomputed_indices = true;

  void fields(configs::Fields& f) {
    f("sparsity", sparsity, f.at_least(0).below(1), "share of a matrix that stays as it is");
    f("select_top", select_top, "train the largest elements; false: the smallest");
    f("r", r, f.range(1, 4096), "rank of a LoRA beside them; null: none");
    f("lora_alpha", lora_alpha, f.positive().at_most(1e30), "it is scaled by this / r; null: by 2");
    f.require(r || !lora_alpha, "lora_alpha", "needs r");
    f("lora_dropout", lora_dropout, f.at_least(0).below(1), "probability, on its input");
    f("init_weights", init_weights, "false: random values, not as the base");
    f("save_precomputed_indices", save_precomputed_indices, "save the places too");
  }
  int rank(const LinearSite&) const { return r.value_or(0); }
  static PeftForm peft_form() { return {.type = "SUPERTUNING"}; }
  bool starts_as_base() const { return init_weights; }
};

class SupertuningLinear : public models::LinearAdapter {
 public:
  static constexpr bool kIsSparse = true;
  SupertuningLinear(const SupertuningConfig& c, const LinearSite& site, kernels::Key random,
                    at::Device device)
      : in_(site.info.in), out_(site.info.out), dropout_(c.lora_dropout), random_(random) {
    const auto n =
        static_cast<int64_t>(static_cast<double>(in_ * out_) * (1 - c.sparsity));  // as Python
    GRAFT_CHECK(n > 0, "peft: supertuning: ", site.name, ": sparsity = ", c.sparsity,
                " leaves nothing to train of ", in_ * out_, " elements");
    places_ = at::zeros({n}, at::TensorOptions().dtype(at::kInt).device(device));
    if (c.save_precomputed_indices) register_buffer("indices", places_);
    checked_ = {places_, in_ * out_, site.name + ": supertuning_indices"};
    values_ =
        register_parameter("values", draw_normal({n}, c.init_weights ? 0 : 1, random, device));
    if (!c.r) return;
    const int64_t r = *c.r;
    scale_ = c.lora_alpha.value_or(2.0 * *c.r) / *c.r;
    a_ = register_parameter("lora_a", draw_kaiming({r, in_}, kernels::derive(random, 1), device));
    b_ = register_parameter(
        "lora_b", c.init_weights ? at::zeros({out_, r}, a_.options())
                                 : draw_kaiming({out_, r}, kernels::derive(random, 2), device));
  }
  static std::vector<Leaf> leaves() {
    return {{"values", "supertuning_values"},
            {"indices", "supertuning_indices"},
            {"lora_a", "supertuning_lora_A.weight"},
            {"lora_b", "supertuning_lora_B.weight"}};
  }
  void initialize(const SupertuningConfig& c, const LinearSite& site, BaseWeights& base) {
    const Tensor size = base.weight(site).cpu().abs().flatten();
    places_.copy_(std::get<1>(size.topk(places_.size(0), 0, /*largest=*/c.select_top)));
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    Tensor y = base(x);
    y = y + at::linear(x, sparse().to(x.scalar_type())).to(y.scalar_type());
    if (!a_.defined()) return y;
    return kernels::lowrank_add(y, dropout(x, dropout_, pass, random_), a_, b_, scale_);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const Tensor s = sparse();
    return w + (a_.defined() ? s + scale_ * b_.mm(a_) : s).to(w.scalar_type());
  }

 private:
  Tensor sparse() const {
    return at::zeros({out_ * in_}, values_.options())
        .scatter_add(0, checked_.checked(), values_)
        .view({out_, in_});
  }

  int64_t in_, out_;
  double dropout_, scale_ = 0;
  kernels::Key random_;
  Places checked_;
  Tensor places_, values_, a_, b_;
};

}  // namespace

void register_supertuning(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] {
                  return std::make_unique<LinearMethod<SupertuningConfig, SupertuningLinear>>();
                }});
}

}  // namespace graft::peft
