// Poly: y = W x + b + (1 / r) B_t A_t x, A_t = sum_s p_ts A_s: each task mixes skills, LoRAs that
// all tasks share, with p = g / sum g, g_ts = sigmoid(Z_ts); in training g is drawn, a relaxed
// Bernoulli variable of logits Z.
//   Ponti et al. 2022, arXiv:2202.13914
// n_splits: inputs and outputs in as many pieces, each with p of its own
// (multi-head routing, Caccia et al. 2022, arXiv:2211.03831).
// Trains A [splits, skills, in / splits, r] (Kaiming-uniform), B [splits, skills, r, out / splits]
// (zeros: the model is unchanged at step 0) and Z [tasks, splits skills] (within 0.001). Mergeable,
// for its task. Fields and files are those of HF PEFT's PolyConfig. PEFT is given the task of each
// row with the rows; here a run has one, task_id, so runs after one another train the tasks.
#include <ATen/ATen.h>

#include <numeric>

#include "configs/check.h"
#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct PolyConfig {
  Targets targets;
  int r = 8;
  int n_tasks = 1;
  int n_skills = 4;
  int n_splits = 1;
  int task_id = 0;
  bool init_weights = true;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank, the inner size");
    f("n_tasks", n_tasks, f.range(1, 65536), "tasks that share the skills");
    f("n_skills", n_skills, f.range(1, 4096), "LoRAs that a task mixes");
    f("n_splits", n_splits, f.range(1, 4096), "pieces of inputs and outputs, mixed apart");
    f("task_id", task_id, f.at_least(0), "the run's task");
    f.require(task_id < n_tasks, "task_id", "is not below n_tasks");
    f("init_weights", init_weights, "B zero; false: Kaiming-uniform, not as the base");
  }
  int rank(const LinearSite&) const { return r; }
  static PeftForm peft_form() {
    return {.type = "POLY", .fixed = {{"poly_type", "poly"}}, .ours = {"task_id"}};
  }
  bool starts_as_base() const { return init_weights; }
};

class PolyLinear : public models::LinearAdapter {
 public:
  PolyLinear(const PolyConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : task_(c.task_id), random_(random) {
    const int64_t in = site.info.in, out = site.info.out, splits = c.n_splits, skills = c.n_skills;
    GRAFT_CHECK(in % splits == 0 && out % splits == 0, "peft: poly: ", site.name, " has ", in,
                " inputs and ", out, " outputs; n_splits = ", splits,
                " does not divide both; a divisor of ", std::gcd(in, out), " would");
    const auto draw = [&](int64_t width, int number) {  // [splits, skills, r, width], fan in width
      const auto key = kernels::derive(random, number);
      return draw_kaiming({splits * skills * c.r, width}, key, device)
          .view({splits, skills, c.r, width});
    };
    a_ = register_parameter("a", draw(in / splits, 0).transpose(2, 3).contiguous());
    Tensor b = draw_uniform({splits, skills, c.r, out / splits}, 1 / std::sqrt(c.r),
                            kernels::derive(random, 1), device);
    b_ = register_parameter("b", c.init_weights ? b.zero_() : b);
    logits_ = register_parameter("logits", draw_uniform({c.n_tasks, splits * skills}, 1e-3,
                                                        kernels::derive(random, 2), device));
  }
  static std::vector<Leaf> leaves() {
    return {{"a", "poly_lora_A"}, {"b", "poly_lora_B"}, {"logits", "poly_router.module_logits"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const auto type = x.scalar_type();
    const Tensor y = base(x);
    Tensor noise;
    if (pass.training) {  // logistic, of each row
      const auto key = kernels::derive(pass.random, random_.stream);
      const Tensor u =
          draw_uniform({x.dim() > 2 ? x.size(0) : 1, logits_.size(1)}, 0.5, key, x.device());
      noise = (u + 0.5).logit(1e-6);
    }
    const auto [a, b] = mixed(noise);
    const Tensor change = x.matmul(a.to(type)).matmul(b.to(type));
    return y + (change.view_as(y) / static_cast<double>(a_.size(3))).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const auto [a, b] = mixed({});
    return w + (a.matmul(b).squeeze(0).t() / static_cast<double>(a_.size(3))).to(w.scalar_type());
  }

 private:
  /// A [rows, in, r] and B [rows, r, out].
  std::pair<Tensor, Tensor> mixed(const Tensor& noise) const {
    Tensor open = logits_[task_].unsqueeze(0);
    if (noise.defined()) open = open + noise;
    open = open.sigmoid().view({-1, a_.size(0), a_.size(1)});
    const Tensor p = open / (open.sum(-1, /*keepdim=*/true) + 1e-12);  // [rows, splits, skills]
    const Tensor a = at::einsum("bqs,qsdr->bqdr", {p, a_});
    const Tensor b = at::einsum("bqs,qsrd->brqd", {p, b_});
    return {a.flatten(1, 2), b.flatten(2)};
  }

  int64_t task_;
  kernels::Key random_;
  Tensor a_, b_, logits_;
};

}  // namespace

void register_poly(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<PolyConfig, PolyLinear>>(); }});
}

}  // namespace graft::peft
