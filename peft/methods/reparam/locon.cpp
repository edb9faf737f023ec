// LoCon: y = W x + s U D x, s = alpha / r: LoRA as LyCORIS has it.
//   LyCORIS, Yeh et al. 2023, arXiv:2309.14859, sec. 3.1
// Trains D [r, in] (Kaiming-uniform, a = sqrt 5) and U [out, r] (zeros; with use_scalar as D): the
// model is unchanged at step 0. Mergeable. Names, fields and defaults are those of LyCORIS's
// `locon`; its convolutions have no place in models of matrices. Beside `lora` it has
// rank_dropout (of rows), module_dropout, a trained scalar and magnitudes of rows or columns whose
// gradient goes through the norm, which the paper of DoRA, and `dora`, hold constant. LyCORIS's
// `dropout` does nothing unless its layers are bypassed: no field here. No HF PEFT type: files in
// LyCORIS's form are read and written by `graft export`.
#include <ATen/ATen.h>

#include "kernels/lowrank/lowrank.h"
#include "peft/delta_linear.h"
#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct LoconConfig : DeltaFields {
  Targets targets;
  int r = 4;
  double alpha = 1;
  std::map<std::string, int> rank_pattern;
  std::map<std::string, double> alpha_pattern;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank, the inner size");
    f("alpha", alpha, f.positive().at_most(1e30), "the output is scaled by alpha / r");
    f("rank_pattern", rank_pattern, f.range(1, 4096), "other ranks by slot, suffix or glob");
    f("alpha_pattern", alpha_pattern, f.positive().at_most(1e30),
      "other alpha by slot, suffix or glob");
    DeltaFields::fields(f);
  }
  int rank(const LinearSite& site) const { return pattern_value(rank_pattern, site, r); }
  bool starts_as_base() const { return !weight_decompose; }
};

class LoconLinear : public DeltaLinear {
 public:
  LoconLinear(const LoconConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : DeltaLinear(c, site, random, device) {
    const int64_t r = c.rank(site);
    scale_ = c.scale(pattern_value(c.alpha_pattern, site, c.alpha), r);
    down_ = register_parameter("lora_down", draw_kaiming({r, site.info.in}, random, device));
    const Tensor up = draw_kaiming({site.info.out, r}, kernels::derive(random, 1), device);
    up_ = register_parameter("lora_up", c.use_scalar ? up : at::zeros_like(up));
  }
  static std::vector<Leaf> leaves() {
    return DeltaFields::leaves({{"lora_up", "lora_up.weight"}, {"lora_down", "lora_down.weight"}});
  }
  void initialize(const LoconConfig&, const LinearSite& site, BaseWeights& base) {
    take_magnitudes(site, base);
  }

 private:
  Tensor add(const Tensor& y, const Tensor& x, const Tensor& rows) const override {
    return kernels::lowrank_add(y, x, down_, rows.defined() ? up_ * rows.unsqueeze(1) : up_,
                                scale_);
  }
  Tensor delta() const override { return up_.mm(down_) * scale_; }

  double scale_;
  Tensor up_, down_;
};

}  // namespace

void register_locon(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<LoconConfig, LoconLinear>>(); }});
}

}  // namespace graft::peft
