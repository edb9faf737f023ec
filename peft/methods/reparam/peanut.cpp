// PEANuT: y = (W + s U) x + b, the update U a small network of W itself: row i of U^T is
// f(W^T_i A^T) B^T, W^T_i the weights of input i.                                  arXiv:2410.01870
// With depth d, between A and B: d layers f(E_j h), then d layers f(D_j h) + h_j', each of which
// adds again what went into the encoder opposite.
// Trains A [r, out], E_j and D_j [r, r] (Kaiming-uniform), B [out, r] (zeros): the model is
// unchanged at step 0. Mergeable. Needs the dense W in every pass, and its own copy of it for
// backward. Fields and files are those of HF PEFT's PeanutConfig, with five of its functions.
#include <ATen/ATen.h>

#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct PeanutConfig {
  Targets targets;
  int r = 32;
  int depth = 0;
  std::string act_fn = "relu";
  double scaling = 1;
  bool init_weights = true;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "width of the network");
    f("depth", depth, f.range(0, 64), "encoders, and as many decoders, between A and B");
    f("act_fn", act_fn, f.one_of({"relu", "silu", "gelu", "tanh", "sigmoid"}),
      "function of each layer but B");
    f("scaling", scaling, f.positive().at_most(1e30), "s");
    f("init_weights", init_weights, "B zero; false: Kaiming-uniform, not as the base");
  }
  static PeftForm peft_form() { return {.type = "PEANUT"}; }
  bool starts_as_base() const { return init_weights; }
};

class PeanutLinear : public models::LinearAdapter {
 public:
  PeanutLinear(const PeanutConfig& c, const LinearSite& site, kernels::Key random,
               at::Device device)
      : scaling_(c.scaling), function_(c.act_fn) {
    const int64_t r = c.r, out = site.info.out;
    uint64_t number = 0;
    const auto draw = [&](int64_t rows, int64_t columns) {
      return draw_kaiming({rows, columns}, kernels::derive(random, number++), device);
    };
    a_ = register_parameter("a", draw(r, out));
    b_ = register_parameter("b", c.init_weights ? at::zeros({out, r}, a_.options()) : draw(out, r));
    const auto stack = [&](const std::string& name) {  // named in files as PEFT's modules are
      const auto layers = register_module(name, std::make_shared<torch::nn::Module>());
      std::vector<Tensor> weights;
      for (int i = 0; i < c.depth; ++i) {
        const auto layer = std::make_shared<torch::nn::Module>();
        weights.push_back(layer->register_parameter("weight", draw(r, r)));
        layers->register_module(std::to_string(i), layer);
      }
      return weights;
    };
    encoders_ = stack("peanut_encoders");
    decoders_ = stack("peanut_decoders");
  }
  static std::vector<Leaf> leaves() { return {{"a", "peanut_A.weight"}, {"b", "peanut_B.weight"}}; }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    return kernels::lowrank_add(base(x), x, hidden(base.weight().to(at::kFloat)).t(), b_, scaling_);
  }
  bool needs_weight() const override { return true; }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (scaling_ * b_.mm(hidden(w.to(a_.scalar_type())).t())).to(w.scalar_type());
  }

 private:
  Tensor act(const Tensor& h) const {
    if (function_ == "relu") return h.relu();
    if (function_ == "silu") return at::silu(h);
    if (function_ == "gelu") return at::gelu(h);
    return function_ == "tanh" ? h.tanh() : h.sigmoid();
  }
  /// What B is applied to, [in, r].
  Tensor hidden(const Tensor& w) const {
    Tensor h = act(w.t().mm(a_.t()));
    std::vector<Tensor> inputs;
    for (const Tensor& encoder : encoders_) {
      inputs.push_back(h);
      h = act(at::linear(h, encoder));
    }
    for (const Tensor& decoder : decoders_) {
      h = act(at::linear(h, decoder)) + inputs.back();
      inputs.pop_back();
    }
    return h;
  }

  double scaling_;
  std::string function_;
  Tensor a_, b_;
  std::vector<Tensor> encoders_, decoders_;
};

}  // namespace

void register_peanut(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<PeanutConfig, PeanutLinear>>(); }});
}

}  // namespace graft::peft
