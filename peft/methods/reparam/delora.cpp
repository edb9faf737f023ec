// DeLoRA: y = W x + b + (l / r) sum_i b_i (a_i . (n * x)) / (|a_i| |b_i|), n_j = |column j of W|.
//                                                Bini et al. 2025, arXiv:2503.18225
// Trains A [r, in] (Kaiming-uniform), B [out, r] (zeros) and the bound l, delora_lambda [1]: the
// model is unchanged at step 0. n is delora_w_norm [in], taken from the base at the start and
// saved. Mergeable. Fields and files are those of HF PEFT's DeloraConfig. The paper scales by |W|
// as a whole (norms: matrix), PEFT by the norms of its columns, the default; a file holds them, so
// PEFT computes either. As in PEFT lengths below 1e-4 count as that.
#include <ATen/ATen.h>

#include <map>

#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct DeloraConfig {
  Targets targets;
  int r = 8;
  double delora_lambda = 15;
  double module_dropout = 0;
  std::string norms = "columns";
  std::map<std::string, int> rank_pattern;
  std::map<std::string, double> lambda_pattern;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank, the inner size");
    f("delora_lambda", delora_lambda, f.positive().at_most(1e30), "first bound of the update");
    f("module_dropout", module_dropout, f.at_least(0).below(1), "on the adapter's input");
    f("norms", norms, f.one_of({"columns", "matrix"}),
      "n: of each column of W, or |W| in all places");
    f("rank_pattern", rank_pattern, f.range(1, 4096), "other ranks by slot, suffix or glob");
    f("lambda_pattern", lambda_pattern, f.positive().at_most(1e30), "other delora_lambda by slot");
  }
  int rank(const LinearSite& site) const { return pattern_value(rank_pattern, site, r); }
  static PeftForm peft_form() {
    return {
        .type = "DELORA", .bias_only = "delora_only", .inert = {"init_weights"}, .ours = {"norms"}};
  }
};

class DeloraLinear : public models::LinearAdapter {
 public:
  DeloraLinear(const DeloraConfig& c, const LinearSite& site, kernels::Key random,
               at::Device device)
      : dropout_(c.module_dropout), random_(random) {
    const int64_t r = c.rank(site);
    const double bound = pattern_value(c.lambda_pattern, site, c.delora_lambda);
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    a_ = register_parameter("delora_a", draw_kaiming({r, site.info.in}, random, device));
    b_ = register_parameter("delora_b", at::zeros({site.info.out, r}, options));
    lambda_ = register_parameter("delora_lambda", at::full({1}, bound, options));
    norms_ = register_buffer("delora_w_norm", at::ones({site.info.in}, options));
  }
  static std::vector<Leaf> leaves() {
    return {{"delora_a", "delora_A"},
            {"delora_b", "delora_B"},
            {"delora_lambda", "delora_lambda"},
            {"delora_w_norm", "delora_w_norm"}};
  }
  void initialize(const DeloraConfig& c, const LinearSite& site, BaseWeights& base) {
    const Tensor w = base.weight(site);
    norms_.copy_(c.norms == "matrix" ? w.norm() : w.norm(2, 0));
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    return kernels::lowrank_add(base(x), dropout(x, dropout_, pass, random_), scaled_a(), b_, 1);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + b_.mm(scaled_a()).to(w.scalar_type());
  }

 private:
  /// A with all factors put into it.
  Tensor scaled_a() const {
    const Tensor lengths = a_.norm(2, 1).clamp_min(1e-4) * b_.norm(2, 0).clamp_min(1e-4);
    return a_ * norms_ * (lambda_ / static_cast<double>(a_.size(0)) / lengths).unsqueeze(1);
  }

  double dropout_;
  kernels::Key random_;
  Tensor a_, b_, lambda_, norms_;
};

}  // namespace

void register_delora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<DeloraConfig, DeloraLinear>>(); }});
}

}  // namespace graft::peft
