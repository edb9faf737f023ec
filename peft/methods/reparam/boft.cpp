// BOFT: y = s * (W (B_m ... B_1)^T x) + b, B_i = P_i R_i P_i^T, R_i block-diagonal and orthogonal.
//                                               Liu et al. 2024, arXiv:2311.06243
// Trains R as boft_R [m, in / k, k, k] (R_i is Cayley's matrix of the skew part of its blocks;
// zeros) and s as boft_s [out, 1] (ones): the model is unchanged at step 0. Mergeable. m is
// boft_n_butterfly_factor, k boft_block_size. Like HF PEFT, whose fields and files these are, it
// turns a layer's inputs, and s leaves the bias alone; rotate: outputs is LyCORIS's boft, y = s *
// (B_m ... B_1 W x) + b with blocks over the outputs. Where PEFT cannot compile its CUDA extension
// it takes m = 1 but writes the m that was asked for: such a file is refused here for the shape of
// boft_R; set boft_n_butterfly_factor to 1 in it.
//
// P_i puts the pieces of k / 2 elements of each run of 2^(i-1) k in another order: those with even
// numbers first. That is a transposition, so no matrix of in x in is ever built.
#include <ATen/ATen.h>

#include "configs/check.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/rotation.h"

namespace graft::peft {
namespace {

struct BoftConfig {
  Targets targets;
  int boft_block_size = 4;
  int boft_block_num = 0;
  int boft_n_butterfly_factor = 1;
  double boft_dropout = 0;
  std::string rotate = "inputs";

  void fields(configs::Fields& f) {
    f("boft_block_size", boft_block_size, f.range(0, 65536), "size of the blocks; 0: by number");
    f("boft_block_num", boft_block_num, f.range(0, 65536), "number of blocks instead; 0: by size");
    f("boft_n_butterfly_factor", boft_n_butterfly_factor, f.range(1, 16),
      "block-diagonal factors, each over runs twice as long");
    f("boft_dropout", boft_dropout, f.at_least(0).below(1),
      "share of one factor's blocks set to I");
    f("rotate", rotate, f.one_of({"inputs", "outputs"}), "what is turned; outputs: as LyCORIS");
  }
  static PeftForm peft_form() {
    return {
        .type = "BOFT", .bias_only = "boft_only", .inert = {"init_weights"}, .ours = {"rotate"}};
  }
  bool is_pefts() const { return rotate == "inputs"; }
  int64_t width(const LinearSite& site) const {
    return rotate == "inputs" ? site.info.in : site.info.out;
  }
  int64_t block_size(const LinearSite& site) const {
    GRAFT_CHECK((boft_block_num == 0) != (boft_block_size == 0),
                "peft: boft: boft_block_size = ", boft_block_size,
                " and boft_block_num = ", boft_block_num, ": set one of them and the other to 0");
    const int64_t n = width(site);
    const int64_t k = boft_block_num == 0 ? boft_block_size : n / boft_block_num;
    const int64_t longest = k << (boft_n_butterfly_factor - 1);
    GRAFT_CHECK(k > 1 && n % longest == 0 && (boft_block_num == 0 || k * boft_block_num == n),
                "peft: boft: ", site.name, " has ", n, " ", rotate, ": blocks of ", k, " with ",
                boft_n_butterfly_factor, " factors need a multiple of ", longest, "; ", sizes(n));
    GRAFT_CHECK(boft_n_butterfly_factor == 1 || k % 2 == 0, "peft: boft: ", site.name,
                ": several factors need blocks of an even size, not ", k, "; ", sizes(n));
    return k;
  }
  /// What would do for `n` elements.
  std::string sizes(int64_t n) const {
    const int64_t runs = int64_t{1} << (boft_n_butterfly_factor - 1);
    if (n % (runs > 1 ? 2 * runs : 1) != 0)
      return "no size is one, take a smaller boft_n_butterfly_factor";
    return (runs > 1 ? "take an even one of " : "take one of ") + divisors_of(n / runs);
  }
};

class BoftLinear : public models::LinearAdapter {
 public:
  BoftLinear(const BoftConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : k_(c.block_size(site)),
        on_outputs_(c.rotate == "outputs"),
        dropout_(c.boft_dropout),
        random_(random) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    r_ = register_parameter(
        "boft_r", at::zeros({c.boft_n_butterfly_factor, c.width(site) / k_, k_, k_}, options));
    s_ = register_parameter("boft_s", at::ones({site.info.out, 1}, options));
    if (site.info.has_bias) bias_ = register_buffer("bias", at::zeros({site.info.out}, options));
  }
  static std::vector<Leaf> leaves() { return {{"boft_r", "boft_R"}, {"boft_s", "boft_s"}}; }
  void initialize(const BoftConfig&, const LinearSite& site, BaseWeights& base) {
    if (bias_.defined()) bias_.copy_(base.bias(site));
  }

  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const Tensor changes = without_some(change(), pass), s = s_.view({-1});
    if (on_outputs_) {
      const Tensor y = base(x), plain = bias_.defined() ? y - bias_.to(y.scalar_type()) : y;
      return y + (all_factors(plain, changes.transpose(2, 3)) * s - plain).to(y.scalar_type());
    }
    Tensor turned = x;
    for (int64_t i = r_.size(0) - 1; i >= 0; --i) turned = factor(turned, changes[i], i);
    const Tensor y = base(turned);
    const Tensor scaled = bias_.defined() ? y * s + (1 - s) * bias_ : y * s;  // in float32
    return scaled.to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const Tensor back = change().transpose(2, 3), rows = w.to(at::kFloat);
    const Tensor turned = on_outputs_ ? all_factors(rows.t(), back).t() : all_factors(rows, back);
    return (turned * s_).to(w.scalar_type());
  }

 private:
  /// R_i - I of all factors.
  Tensor change() const {
    const Tensor blocks = r_.view({-1, k_, k_});
    return cayley_change(0.5 * (blocks - blocks.transpose(1, 2))).view(r_.sizes());
  }
  /// x P R P^T of factor i.
  Tensor factor(const Tensor& x, const Tensor& change, int64_t i) const {
    if (i == 0) return rotate_blocks(x, change);
    const int64_t half = int64_t{1} << i;
    const Tensor spread = x.reshape({-1, 2, half, k_ / 2}).transpose(1, 2).reshape(x.sizes());
    const Tensor turned = rotate_blocks(spread, change);
    return turned.reshape({-1, half, 2, k_ / 2}).transpose(1, 2).reshape(x.sizes());
  }
  Tensor all_factors(Tensor x, const Tensor& changes) const {
    for (int64_t i = 0; i < r_.size(0); ++i) x = factor(x, changes[i], i);
    return x;
  }
  /// In training, of one factor drawn at random that share of blocks is I.
  Tensor without_some(const Tensor& changes, const models::Pass& pass) const {
    if (dropout_ == 0 || !pass.training) return changes;
    const int64_t m = changes.size(0), n = changes.size(1);
    const Tensor u = at::empty({n + 1}, r_.options().requires_grad(false));
    kernels::uniform(u, kernels::derive(pass.random, random_.stream));
    const auto dropped = u.slice(0, 0, n).argsort().slice(0, 0, static_cast<int64_t>(dropout_ * n));
    const Tensor chosen = at::arange(m, u.options()).eq((u[n] * m).floor());  // [m]
    const Tensor out = at::zeros({n}, u.options()).index_fill(0, dropped, 1);
    return changes * (1 - chosen.to(at::kFloat).unsqueeze(1) * out).view({m, n, 1, 1});
  }

  int64_t k_;
  bool on_outputs_;
  double dropout_;
  kernels::Key random_;
  Tensor r_, s_, bias_;
};

}  // namespace

void register_boft(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<BoftConfig, BoftLinear>>(); }});
}

}  // namespace graft::peft
