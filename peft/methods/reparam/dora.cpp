// DoRA: y = (m / n) * ((W + s B A) x) + b, n the lengths of the rows of W + s B A, s = alpha / r.
//   Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, eq. 5
// Trains A [r, in] and B [out, r] as LoRA does and m [out], at first n: the model is unchanged at
// step 0. Mergeable. In gradients n is a constant (sec. 4.3). It is had without a matrix out x in:
//   n^2 = |W|^2 + 2 s <B, W A^T> + s^2 <B A A^T, B>, row by row,
// where W A^T is the layer itself, run on the rows of A, and |W|^2 does not change; only over
// another adapter |W|^2 is taken of the dense matrix in each pass. lora_dropout falls on x in the
// part (m / n - 1) W x too, as in HF PEFT, which the defaults follow; the paper has none. Files are
// PEFT's of LoRA with use_dora; PEFT also adapts embeddings.
#include <ATen/ATen.h>

#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/lora_method.h"

namespace graft::peft {
namespace {

struct DoraConfig : LoraStartFields {
  void fields(configs::Fields& f) {
    LoraStartFields::fields(f);
    f.require(!is_start("mica"), "init_lora_weights", "mica is for lora; dora trains B");
  }
  static PeftForm peft_form() {
    PeftForm form = LoraStartFields::peft_form();
    form.fixed["use_dora"] = true;
    return form;
  }
};

class DoraLinear : public models::LinearAdapter {
 public:
  DoraLinear(const DoraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : below_(site.slot->adapters()), dropout_(c.lora_dropout), random_(random) {
    const auto [a, b] = c.start(site, random, device);
    pair_.a = register_parameter("lora_a", a);
    pair_.b = register_parameter("lora_b", b);
    pair_.scale = c.scale(site);
    m_ = register_parameter("magnitude", at::ones({site.info.out}, a.options()));
  }
  static std::vector<Leaf> leaves() {
    return {{"lora_a", "lora_A.weight"},
            {"lora_b", "lora_B.weight"},
            {"magnitude", "lora_magnitude_vector"}};
  }
  void initialize(const DoraConfig&, const LinearSite& site, BaseWeights& base) {
    Tensor w = base.weight(site).to(m_.device());
    for (const auto& adapter : below_) w = adapter->merged(w);
    square_ = w.square().sum(1);
    m_.copy_(norms(square_, w.mm(pair_.whole_a().t())));
  }

  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const Tensor y = base(x), dropped = dropout(x, dropout_, pass, random_);
    const auto type = y.scalar_type();
    const auto [bias, n] = bias_and_norms(x, base);
    const Tensor gain = m_ / n;
    const Tensor plain = (dropped.is_same(x) ? y : base(dropped)) - bias.to(type);
    return y + kernels::lowrank_add((gain - 1).to(type) * plain, dropped, pair_.whole_a(),
                                    gain.unsqueeze(1) * pair_.whole_b(), pair_.scale);
  }
  bool needs_weight() const override { return true; }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const Tensor v = w + (pair_.scale * pair_.whole_b().mm(pair_.whole_a())).to(w.scalar_type());
    return v * (m_ / v.norm(2, 1).clamp_min(kShortest)).unsqueeze(1).to(w.scalar_type());
  }
  LoraPair& pair() { return pair_; }

 private:
  static constexpr double kShortest = 1e-6;  // a row of zeros has no direction

  /// @param wa  W A^T [out, r]
  Tensor norms(const Tensor& square, const Tensor& wa) const {
    const Tensor a = pair_.whole_a(), b = pair_.whole_b();
    const Tensor cross = (b * wa).sum(1), own = (b.mm(a.mm(a.t())) * b).sum(1);
    return (square + 2 * pair_.scale * cross + pair_.scale * pair_.scale * own)
        .clamp_min(kShortest * kShortest)
        .sqrt();
  }
  /// The layer on a row of zeros is its bias, on the rows of A it is A W^T beside.
  std::pair<Tensor, Tensor> bias_and_norms(const Tensor& x, const models::LinearOp& base) const {
    const at::NoGradGuard constants;
    const Tensor rows = at::constant_pad_nd(pair_.whole_a(), {0, 0, 1, 0}).to(x.scalar_type());
    const Tensor out = base(rows).to(at::kFloat);
    const Tensor square = below_.empty() ? square_ : base.weight().to(at::kFloat).square().sum(1);
    return {out[0], norms(square, (out.slice(0, 1) - out[0]).t())};
  }

  std::vector<std::shared_ptr<models::LinearAdapter>> below_;
  double dropout_;
  kernels::Key random_;
  LoraPair pair_;
  Tensor m_;
  Tensor square_;  ///< [out], the rows of W: a constant
};

class Dora : public LoraMethod<DoraConfig, DoraLinear> {
 public:
  bool is_in(const SavedAdapter& adapter) const override {
    const auto flag = adapter.config.find("use_dora");
    return flag != adapter.config.end() && *flag == true;
  }
};

}  // namespace

void register_dora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Dora>(); }});
}

}  // namespace graft::peft
