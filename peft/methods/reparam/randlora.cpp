// RandLoRA: y = W x + b + s sum_p b_p (l_kj g_j * a_k)^T x, p = k n + j, s = randlora_alpha / r: a
// sum of r n random products, n = ceil(min(in, out) / r), so of full rank.
//   Albert et al. 2025, arXiv:2502.00987
// a_k is row k of A, b_p column p of [B_1 ... B_n]: HF PEFT's terms. Those of the paper, sum_j B_j
// diag(l_j) A diag(g_j), have column k of B_j there: pairing paper. The one has as many random
// products as the other; a file means what it was trained with.
// Trains randlora_lambda l [r, n] (zeros) and randlora_gamma g [n, min(in, out)] (1 / max(n, min)):
// the model is unchanged at step 0. A [r, 1, widest min] and B [widest max, n, r] are random,
// frozen and shared by all slots; where out < in the sum is transposed. Mergeable. Fields and files
// are those of HF PEFT's RandLoraConfig. PEFT repeats A and B in its files for every slot; we read
// that and write them once. Their seed, projection_prng_key, means the same numbers here as in
// PyTorch where it has bfloat16.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/projection.h"

namespace graft::peft {
namespace {

struct RandloraConfig {
  Targets targets;
  int r = 32;
  int projection_prng_key = 0;
  bool save_projection = true;
  bool sparse = false;
  bool very_sparse = false;
  double randlora_dropout = 0;
  double randlora_alpha = 640;
  std::string pairing = "peft";
  Tensor a, b;  ///< no fields: what the slots share

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 65536), "rank of each product; a smaller one trains more");
    f("projection_prng_key", projection_prng_key, f.at_least(0), "seed of the shared matrices");
    f("save_projection", save_projection, "save the shared matrices too, not only their seed");
    f("sparse", sparse, "shared matrices of -1, 0, 1 with one in 3 not zero");
    f("very_sparse", very_sparse, "with one in sqrt(width) not zero");
    f("randlora_dropout", randlora_dropout, f.at_least(0).below(1), "on the adapter's input");
    f("randlora_alpha", randlora_alpha, f.positive().at_most(1e30), "scaled by this / r");
    f("pairing", pairing, f.one_of({"peft", "paper"}), "which columns of B meet which rows of A");
  }
  static PeftForm peft_form() {
    return {.type = "RANDLORA",
            .bias_only = "randlora_only",
            .inert = {"init_weights"},
            .ours = {"pairing"}};
  }
  bool is_pefts() const { return pairing == "peft"; }
  int64_t num_products(int64_t narrow) const { return (narrow + r - 1) / r; }
  void draw(const Widths& width) {
    const int64_t narrow = std::min(width.in, width.out), wide = std::max(width.in, width.out);
    const int64_t n = num_products(narrow);
    const auto generator = torch_generator(static_cast<uint64_t>(projection_prng_key));
    if (sparse || very_sparse) {
      const double one_in = very_sparse ? std::sqrt(static_cast<double>(narrow)) : 3;
      a = signs(at::rand({r, 1, narrow}, generator), one_in);
      b = signs(at::rand({wide, n, r}, generator), one_in);
    } else {
      std::vector<Tensor> parts;
      a = torch_kaiming_uniform({r, 1, narrow}, std::sqrt(5.0), generator, at::kBFloat16);
      for (int64_t j = 0; j < n; ++j) {
        parts.push_back(
            torch_kaiming_uniform({wide, 1, r}, std::sqrt(5.0), generator, at::kBFloat16));
      }
      b = at::cat(parts, 1);
    }
    a = (a / a.std()).to(at::kFloat);
    b = (b / b.std()).to(at::kFloat);
  }
  static Tensor signs(const Tensor& uniform, double one_in) {
    const double share = 1 / (2 * one_in);
    return (uniform > 1 - share).to(at::kFloat) - (uniform < share).to(at::kFloat);
  }
};

class RandloraLinear : public models::LinearAdapter {
 public:
  RandloraLinear(const RandloraConfig& c, const LinearSite& site, kernels::Key random,
                 at::Device device)
      : scale_(c.randlora_alpha / c.r),
        dropout_(c.randlora_dropout),
        is_wide_(site.info.out < site.info.in),
        random_(random) {
    const int64_t narrow = std::min(site.info.in, site.info.out);
    const int64_t wide = std::max(site.info.in, site.info.out), n = c.num_products(narrow);
    a_ = c.a.slice(2, 0, narrow);
    b_ = c.b.slice(0, 0, wide).slice(1, 0, n);
    if (c.pairing == "paper") b_ = b_.transpose(1, 2);
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    lambda_ = register_parameter("lambda", at::zeros({c.r, n}, options));
    gamma_ = register_parameter(
        "gamma", at::full({n, narrow}, 1.0 / static_cast<double>(std::max(n, narrow)), options));
  }
  static std::vector<Leaf> leaves() {
    return {{"lambda", "randlora_lambda"}, {"gamma", "randlora_gamma"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const auto [down, up] = factors();
    return kernels::lowrank_add(base(x), dropout(x, dropout_, pass, random_), down, up, scale_);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const auto [down, up] = factors();
    return w + (scale_ * up.mm(down)).to(w.scalar_type());
  }

 private:
  /// [r n, in] and [out, r n].
  std::pair<Tensor, Tensor> factors() const {
    const auto type = lambda_.scalar_type();
    const Tensor a =
        (a_.to(type) * (lambda_.unsqueeze(2) * gamma_)).flatten(0, 1);  // [r n, narrow]
    const Tensor b = b_.to(type).flatten(1);                            // [wide, r n]
    if (is_wide_) return {b.t(), a.t()};
    return {a, b};
  }

  double scale_, dropout_;
  bool is_wide_;
  kernels::Key random_;
  Tensor a_, b_, lambda_, gamma_;
};

class Randlora : public LinearMethod<RandloraConfig, RandloraLinear> {
 protected:
  void before_slots(AttachContext& context) override {
    config_.draw(widest(sites_));
    config_.a = config_.a.to(context.device), config_.b = config_.b.to(context.device);
  }
  void attach_to(AttachContext& context, const LinearSite& site) override {
    LinearMethod::attach_to(context, site);
    if (!config_.save_projection) return;
    for (const auto& [name, value] :
         {std::pair("randlora_A", config_.a), {"randlora_B", config_.b}}) {
      const std::string copy = site.hf_path + "." + name;
      context.params.add(Constant{.name = context.prefix + copy,
                                  .hf_key = "base_model.model." + copy,
                                  .value = value,
                                  .may_be_left_out = true,
                                  .is_saved = false});
      if (&site == sites_.back()) add_projection(context, name, value);
    }
  }
};

}  // namespace

void register_randlora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Randlora>(); }});
}

}  // namespace graft::peft
