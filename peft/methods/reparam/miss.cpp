// MiSS: y = W x + D^T S x, where S x [r] is the sum of x over its pieces of r elements: the update
// repeats one block D^T [out, r] along the inputs.   Kang and Yin 2024, arXiv:2409.15371
// init_weights bat: with W and the update in blocks [r, r], the block (g, c) of the update is
// W_gc D_g + D_g (the paper's Bat). init_weights mini: D repeats along the outputs every mini_r.
// Trains D [r, out]; bat: [out / r, r, r]; mini: [r, mini_r]. Init: zeros, so the model is
// unchanged at step 0. Mergeable. Bat needs the dense matrix in every pass: each row of blocks has
// an x of its own. Fields and files are those of HF PEFT's MissConfig; miss_dropout does not act on
// Bat.
#include <ATen/ATen.h>

#include <numeric>

#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct MissConfig {
  Targets targets;
  int r = 64;
  double miss_dropout = 0;
  int mini_r = 1;
  std::string init_weights = "true";

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 1 << 20), "size of the pieces of the input");
    f("miss_dropout", miss_dropout, f.at_least(0).below(1), "probability, on the adapter's input");
    f("mini_r", mini_r, f.range(1, 1 << 20), "with init_weights mini: outputs until D repeats");
    f("init_weights", init_weights, f.one_of({"true", "bat", "mini", "false"}),
      "true, bat, mini: the formula; false: as true from random values, not as the base");
  }
  static PeftForm peft_form() { return {.type = "MISS", .bias_only = "MiSS_only"}; }
  bool starts_as_base() const { return init_weights != "false"; }
};

class MissLinear : public models::LinearAdapter {
 public:
  MissLinear(const MissConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : in_(site.info.in),
        out_(site.info.out),
        r_(c.r),
        dropout_(c.miss_dropout),
        bat_(c.init_weights == "bat"),
        random_(random) {
    const bool mini = c.init_weights == "mini";
    GRAFT_CHECK(r_ <= in_, "peft: ", site.name, ": r = ", r_, ", at most ", in_, " inputs");
    GRAFT_CHECK(!bat_ || (in_ % r_ == 0 && out_ % r_ == 0), "peft: ", site.name, ": r = ", r_,
                " does not divide [", out_, ", ", in_, "]; init_weights bat needs one of ",
                divisors_of(std::gcd(in_, out_)));
    GRAFT_CHECK(!mini || out_ % c.mini_r == 0, "peft: ", site.name, ": mini_r = ", c.mini_r,
                " does not divide the ", out_, " outputs; take one of ", divisors_of(out_));
    std::vector<int64_t> shape = {r_, mini ? c.mini_r : out_};
    if (bat_) shape = {out_ / r_, r_, r_};
    Tensor block = draw_kaiming(shape, random, device);
    if (c.starts_as_base()) block.zero_();
    block_ = register_parameter("miss_block", block);
  }
  static std::vector<Leaf> leaves() { return {{"miss_block", "miss_block"}}; }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const Tensor y = base(x);
    if (bat_) return y + at::linear(x, bat(base.weight()).to(x.scalar_type())).to(y.scalar_type());
    const Tensor dropped = at::constant_pad_nd(dropout(x, dropout_, pass, random_), {0, padding()});
    const Tensor sums = dropped.unflatten(-1, {-1, r_}).sum(-2);
    return y + sums.matmul(block().to(x.scalar_type())).to(y.scalar_type());
  }
  bool needs_weight() const override { return bat_; }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    if (bat_) return w + bat(w);
    const Tensor rows = block().t().repeat({1, (in_ + padding()) / r_});
    return w + rows.slice(1, 0, in_).to(w.scalar_type());
  }

 private:
  int64_t padding() const { return (r_ - in_ % r_) % r_; }
  Tensor block() const { return block_.repeat({1, out_ / block_.size(1)}); }  ///< [r, out]
  /// The update of a matrix, in its dtype.
  Tensor bat(const Tensor& w) const {
    const Tensor d = block_.to(w.scalar_type());
    const Tensor w_CGRS = w.reshape({out_ / r_, r_, in_ / r_, r_}).permute({2, 0, 1, 3});
    return (w_CGRS.matmul(d) + d).permute({1, 2, 0, 3}).reshape({out_, in_});
  }

  int64_t in_, out_, r_;
  double dropout_;
  bool bat_;
  kernels::Key random_;
  Tensor block_;
};

}  // namespace

void register_miss(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<MissConfig, MissLinear>>(); }});
}

}  // namespace graft::peft
