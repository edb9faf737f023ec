// OFT: y = W R^T x + b, R block-diagonal with orthogonal blocks R_k of a skew-symmetric Q_k.
//                                              Qiu et al. 2023, arXiv:2306.07280
// Trains the entries of each Q_k [b, b] above its diagonal, as oft_R [in / b, b (b - 1) / 2] (one
// row with block_share); zeros: the model is unchanged at step 0. Mergeable. Fields and files are
// those of HF PEFT, which turns a layer's inputs, as the paper's z = (R W)^T x does. LyCORIS's
// diag-oft turns the outputs, y = R^T W x + b, and scales them (rotate, rescaled): not PEFT's any
// more. Its `constraint` bounds all |Q_k| of a slot together; here each has its bound (coft).
//   use_cayley_neumann: R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 (5 terms)     Qiu et al. 2025,
//   otherwise           R = (I - Q) (I + Q)^-1, Cayley's                arXiv:2506.19847
// The first approximates the transpose of the second: the same file means another model in each.
// coft: |Q_k| stays below eps / sqrt(rows of oft_R). PEFT writes module_dropout but never applies
// it, so it is no field here. As in PEFT a block size (or a number of blocks, r) that does not
// divide `in` stands for the nearest that does, the lower of two.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "configs/check.h"
#include "peft/linear_method.h"
#include "peft/rotation.h"

namespace graft::peft {
namespace {

struct OftConfig {
  Targets targets;
  int r = 0;
  int oft_block_size = 32;
  bool coft = false;
  double eps = 6e-5;
  bool block_share = false;
  bool use_cayley_neumann = true;
  int num_cayley_neumann_terms = 5;
  std::string rotate = "inputs";
  bool rescaled = false;

  void fields(configs::Fields& f) {
    f("r", r, f.range(0, 65536), "number of blocks of a slot, instead of their size; 0: by size");
    f("oft_block_size", oft_block_size, f.range(0, 65536), "size of the blocks; 0: by number");
    f("coft", coft, "keep the rotations small: each |Q| below eps / sqrt(number of blocks)");
    f("eps", eps, f.positive(), "of coft");
    f("block_share", block_share, "one block for all places of a slot");
    f("use_cayley_neumann", use_cayley_neumann, "a short power series; false: exactly orthogonal");
    f("num_cayley_neumann_terms", num_cayley_neumann_terms, f.range(1, 64), "of that series");
    f("rotate", rotate, f.one_of({"inputs", "outputs"}),
      "what is turned; outputs: LyCORIS's diag-oft, the bias left alone");
    f("rescaled", rescaled, "train a scale of each output too");
  }
  static PeftForm peft_form() {
    return {.type = "OFT",
            .bias_only = "oft_only",
            .inert = {"init_weights", "module_dropout"},
            .ours = {"rotate", "rescaled"}};
  }
  bool is_pefts() const { return rotate == "inputs" && !rescaled; }
  int64_t width(const LinearSite& site) const {
    return rotate == "inputs" ? site.info.in : site.info.out;
  }
  /// The divisor of `width` nearest to a number.
  static int64_t divisor(int64_t width, int64_t wanted) {
    if (wanted >= width) return width;
    int64_t above = wanted, below = wanted;
    while (width % above != 0) ++above;
    while (width % below != 0) --below;
    return wanted - below <= above - wanted ? below : above;
  }
  int64_t block_size(int64_t width) const {
    GRAFT_CHECK((r == 0) != (oft_block_size == 0), "peft: oft: r = ", r,
                " and oft_block_size = ", oft_block_size, ": set one of them and the other to 0");
    return r == 0 ? divisor(width, oft_block_size) : width / divisor(width, r);
  }
};

class OftLinear : public models::LinearAdapter {
 public:
  OftLinear(const OftConfig& c, const LinearSite& site, kernels::Key, at::Device device)
      : is_exact_(!c.use_cayley_neumann),
        terms_(c.num_cayley_neumann_terms),
        on_outputs_(c.rotate == "outputs"),
        b_(c.block_size(c.width(site))) {
    GRAFT_CHECK(b_ > 1, "peft: oft: ", site.name, " with ", c.width(site), " ", c.rotate,
                " gets blocks of size 1, which cannot turn anything; ask for larger ones");
    const int64_t rows = c.block_share ? 1 : c.width(site) / b_;
    if (c.coft) limit_ = c.eps / std::sqrt(static_cast<double>(rows));
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    q_ = register_parameter("oft_r", at::zeros({rows, b_ * (b_ - 1) / 2}, options));
    if (c.rescaled) rescale_ = register_parameter("rescale", at::ones({site.info.out}, options));
    if (site.info.has_bias) bias_ = register_buffer("bias", at::zeros({site.info.out}, options));
  }
  static std::vector<Leaf> leaves() { return {{"oft_r", "oft_R.weight"}, {"rescale", "rescale"}}; }
  void initialize(const OftConfig& c, const LinearSite& site, BaseWeights& base) {
    if (bias_.defined() && !c.is_pefts()) bias_.copy_(base.bias(site));
  }

  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    Tensor y = base(on_outputs_ ? x : rotate_blocks(x, change()));
    if (!on_outputs_ && !rescale_.defined()) return y;
    const Tensor plain = bias_.defined() ? y - bias_.to(y.scalar_type()) : y;
    const Tensor turned = on_outputs_ ? rotate_blocks(plain, change()) : plain;
    return y + ((rescale_.defined() ? turned * rescale_ : turned) - plain).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const Tensor turned = on_outputs_ ? rotate_blocks(w.t(), change()).t()
                                      : rotate_blocks(w, change().transpose(1, 2));
    return rescale_.defined() ? turned * rescale_.unsqueeze(1).to(w.scalar_type()) : turned;
  }
  /// Back to the nearest Q of coft.
  void project() { q_.copy_(limited()); }

 private:
  /// Within coft's bound; the gradient is that of the result, as if q_ had been moved there.
  Tensor limited() const {
    if (limit_ == 0) return q_;
    const Tensor q = q_.detach(), norm = q.norm(2, 1, /*keepdim=*/true) * std::sqrt(2.0);
    const Tensor factor = (limit_ / norm.clamp_min(limit_)).masked_fill(norm <= limit_, 1);
    return q_ + (q * factor - q);
  }
  Tensor change() const {
    const Tensor q = skew_matrices(limited(), b_);
    return is_exact_ ? cayley_change(q) : neumann_change(q, terms_);
  }

  bool is_exact_;
  int terms_;
  bool on_outputs_;
  int64_t b_;
  double limit_ = 0;
  Tensor q_, rescale_, bias_;
};

class Oft : public LinearMethod<OftConfig, OftLinear> {
 public:
  void after_step(const StepInfo&) override {
    const at::NoGradGuard no_grad;
    for (const auto& adapter : adapters_) adapter->project();
  }
};

}  // namespace

void register_oft(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Oft>(); }});
}

}  // namespace graft::peft
