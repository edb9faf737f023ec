// C3A: y = W x + C x / in, C of circulant blocks [b, b]: block (m, n) is w_mn[(j - k) mod b] at row
// k and column j, so the update is a correlation, computed by the fast Fourier transform.
//   Chen et al. 2024, "Parameter-Efficient Fine-Tuning via Circular Convolution", arXiv:2407.19342
// Trains w [out / b, in / b, b]: in out / b numbers, of any rank. Init: Xavier-uniform on the whole
// matrix's sizes, so the model is NOT the base at step 0 unless init_weights is true (zeros).
// Mergeable. The transforms run in float32. Fields and files are those of HF PEFT's C3AConfig,
// whose block_size is 256 by default and whose division by `in` the paper does not have
// (divide_by_in: false, not PEFT's any more). PEFT
// 0.21.2's own backward gives the input a wrong gradient (torch.autograd.gradcheck), so layers
// below train differently there.
#include <ATen/ATen.h>

#include <cmath>
#include <numeric>

#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct C3aConfig {
  Targets targets;
  configs::Auto<int> block_size;
  std::map<std::string, int> block_size_pattern;
  std::string init_weights = "xavier_uniform";
  bool divide_by_in = true;

  void fields(configs::Fields& f) {
    f("block_size", block_size, f.at_least(1),
      "b, a divisor of in and out; auto: the largest one up to 256");
    f("block_size_pattern", block_size_pattern, f.at_least(1),
      "other block sizes by slot, suffix or glob");
    f("init_weights", init_weights,
      f.one_of({"xavier_uniform", "kaiming_uniform", "gaussian", "true", "false"}),
      "true: zeros, the base; false: as xavier_uniform");
    f("divide_by_in", divide_by_in, "the update is C / in, as PEFT has it; false: C, the paper's");
  }
  static PeftForm peft_form() {
    return {.type = "C3A", .bias_only = "c3a_only", .ours = {"divide_by_in"}};
  }
  bool is_pefts() const { return divide_by_in; }
  bool starts_as_base() const { return init_weights == "true"; }

  int64_t block(const LinearSite& site) const {
    const auto common = static_cast<int>(std::gcd(site.info.in, site.info.out));
    int largest = std::min(common, 256);
    while (common % largest != 0) --largest;
    const int block = pattern_value(block_size_pattern, site, block_size.value.value_or(largest));
    GRAFT_CHECK(common % block == 0, "peft: ", site.name, ": block_size = ", block,
                " does not divide both ", site.info.in, " and ", site.info.out, "; divisors of ",
                common, " do");
    return block;
  }
};

class C3aLinear : public models::LinearAdapter {
 public:
  C3aLinear(const C3aConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : in_(site.info.in),
        out_(site.info.out),
        b_(c.block(site)),
        divisor_(c.divide_by_in ? static_cast<double>(in_) : 1) {
    const std::vector<int64_t> shape = {out_ / b_, in_ / b_, b_};
    const auto in = static_cast<double>(in_), out = static_cast<double>(out_);
    const double bound =
        c.init_weights == "kaiming_uniform" ? std::sqrt(1 / in) : std::sqrt(6 / (in + out));
    Tensor w = c.init_weights == "gaussian" ? draw_normal(shape, 1, random, device)
                                            : draw_uniform(shape, bound, random, device);
    if (c.starts_as_base()) w.zero_();
    w_MNB_ = register_parameter("c3a_kernel", w);
  }
  static std::vector<Leaf> leaves() { return {{"c3a_kernel", "c3a_kernel"}}; }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x);
    const Tensor x_f = at::fft_rfft(x.to(at::kFloat).unflatten(-1, {-1, b_}));
    const Tensor w_f = at::fft_rfft(w_MNB_).conj();
    const Tensor y_f = at::einsum("...nf,mnf->...mf", {x_f, w_f});
    return y + (at::fft_irfft(y_f, b_).flatten(-2) / divisor_).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const Tensor k = at::arange(b_, w_MNB_.options().dtype(at::kLong));
    const Tensor places = (k.unsqueeze(0) - k.unsqueeze(1)).remainder(b_);
    const Tensor delta_MNKJ = w_MNB_.index({at::indexing::Ellipsis, places});
    const Tensor delta = delta_MNKJ.permute({0, 2, 1, 3}).reshape({out_, in_}) / divisor_;
    return w + delta.to(w.scalar_type());
  }

 private:
  int64_t in_, out_, b_;
  double divisor_;
  Tensor w_MNB_;
};

class C3a : public LinearMethod<C3aConfig, C3aLinear> {
 public:
  /// PEFT knows no `auto`: each slot's own size is written.
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    nlohmann::json entries = LinearMethod::to_peft_config(slots);
    if (config_.block_size.value) return entries;
    entries["block_size"] = 256;
    for (const LinearSite* site : sites_)
      entries["block_size_pattern"][site->hf_path] = config_.block(*site);
    return entries;
  }
};

}  // namespace

void register_c3a(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<C3a>(); }});
}

}  // namespace graft::peft
