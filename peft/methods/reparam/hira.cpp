// HiRA: y = (W o (1 + B A)) x: the update W o (B A) has a rank of up to rank(W) r.
//   Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation", ICLR 2025,
//   openreview TwJrTz9cRS, eq. 3
// Trains A [r, in] (Kaiming-uniform, a = sqrt 5, or normal with deviation 1 / r) and B [out, r]
// (zeros): the model is unchanged at step 0. On an embedding A [r, V] is zero and B [D, r] normal.
// init_weights false: A and B normal everywhere, as PEFT has it. Mergeable. A bias is not touched.
// Needs the dense matrix in every pass: no product of activations gives W o (B A). Fields and files
// are those of HF PEFT's HiraConfig; there is no alpha.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct HiraConfig {
  Targets targets;
  int r = 32;
  double hira_dropout = 0;
  std::string init_weights = "true";
  std::map<std::string, int> rank_pattern;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank of the factor that multiplies W");
    f("hira_dropout", hira_dropout, f.at_least(0).below(1),
      "probability, on the input of the update; not on embeddings");
    f("init_weights", init_weights, f.one_of({"true", "gaussian", "false"}),
      "of A; false: A and B normal, not as the base");
    f("rank_pattern", rank_pattern, f.range(1, 4096), "other ranks by slot, suffix or glob");
  }
  static PeftForm peft_form() { return {.type = "HIRA"}; }
  bool starts_as_base() const { return init_weights != "false"; }
  int64_t rank(const LinearSite& site) const { return pattern_value(rank_pattern, site, r); }
};

class HiraLinear : public models::LinearAdapter {
 public:
  HiraLinear(const HiraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : dropout_(c.hira_dropout), random_(random) {
    const int64_t r = c.rank(site);
    const auto normal = [&](int64_t rows, int64_t columns, double deviation, int number) {
      return draw_normal({rows, columns}, deviation, kernels::derive(random, number), device);
    };
    const double deviation = c.init_weights == "false" ? 1 : 1 / static_cast<double>(r);
    a_ = register_parameter("hira_A", c.init_weights == "true"
                                          ? draw_kaiming({r, site.info.in}, random, device)
                                          : normal(r, site.info.in, deviation, 1));
    b_ = register_parameter("hira_B", c.init_weights == "false"
                                          ? normal(site.info.out, r, 1, 2)
                                          : at::zeros({site.info.out, r}, a_.options()));
  }
  static std::vector<Leaf> leaves() {  // of both classes
    return {{"hira_A", "hira_A"},
            {"hira_B", "hira_B"},
            {"hira_embedding_A", "hira_embedding_A"},
            {"hira_embedding_B", "hira_embedding_B"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const Tensor y = base(x), w = base.weight();
    const Tensor update = w * b_.mm(a_).to(w.scalar_type());
    const Tensor dropped = dropout(x, dropout_, pass, random_);
    return y + at::linear(dropped, update.to(x.scalar_type())).to(y.scalar_type());
  }
  bool needs_weight() const override { return true; }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override { return w + w * b_.mm(a_).to(w.scalar_type()); }

 private:
  double dropout_;
  kernels::Key random_;
  Tensor a_, b_;
};

/// A row is multiplied by 1 + its column of B A.
class HiraEmbedding : public models::LinearAdapter {
 public:
  HiraEmbedding(const HiraConfig& c, const LinearSite& site, kernels::Key random,
                at::Device device) {
    const int64_t r = c.rank(site);
    const double deviation = c.starts_as_base() ? 0 : 1;
    a_ = register_parameter("hira_embedding_A", draw_normal({r, site.info.in}, deviation,
                                                            kernels::derive(random, 1), device));
    b_ = register_parameter("hira_embedding_B", draw_normal({site.info.out, r}, 1, random, device));
  }
  Tensor forward(const Tensor& ids, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(ids);
    return y + y * at::embedding(a_.t(), ids).matmul(b_.t()).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + w * a_.t().mm(b_.t()).to(w.scalar_type());
  }

 private:
  Tensor a_, b_;
};

class Hira : public LinearMethod<HiraConfig, HiraLinear> {
  void attach_to(AttachContext& context, const LinearSite& site) override {
    if (site.info.kind != models::LinearKind::kEmbedding)
      return LinearMethod::attach_to(context, site);
    attach_linear(
        context, site,
        std::make_shared<HiraEmbedding>(config_, site, site_key(context, site), context.device),
        HiraLinear::leaves());
  }
};

}  // namespace

void register_hira(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Hira>(); }});
}

}  // namespace graft::peft
