// One adapter of a tiny model by itself, over a matrix that the test chooses: for methods that no
// library has, compared with a second formula written out plainly.
#pragma once

#include "tests/peft/tiny.h"

namespace graft::peft {

/// y = x W^T + b; without a bias b is undefined.
struct Dense : models::LinearOp {
  Dense(Tensor w, Tensor b) : w(std::move(w)), b(std::move(b)) {}
  Tensor operator()(const Tensor& x) const override { return at::linear(x, w, b); }
  Tensor weight() const override { return w; }
  Tensor w, b;
};

/// A method on attn.q of a tiny model, its parameters moved from their start.
struct OneSlot {
  OneSlot(const std::string& name, const std::string& options, const char* model = "llama")
      : tiny(model) {
    std::shared_ptr<Method> method = methods().make(name);
    read_fields(*method, options);
    tiny.attach(name, method);
    models::LoadOptions unquantised;
    unquantised.quantization = models::Quantization::kNone;
    tiny.load(unquantised);
    tiny.jitter();
  }
  const LinearSite& site() const { return *tiny.adapters.slots().find_linear("block.0.attn.q"); }
  models::LinearAdapter& adapter() const { return *site().slot->adapters().front(); }
  /// Of a parameter or constant.
  Tensor value(const std::string& leaf) const {
    for (const auto& p : adapter().named_parameters()) {
      if (p.key() == leaf) return p.value().detach();
    }
    return adapter().named_buffers()[leaf];
  }
  Tensor weight() const {
    return fill(site().hf_path + ".weight", {site().info.out, site().info.in}, 0.25);
  }
  Tensor bias() const {
    return site().info.has_bias ? fill(site().hf_path + ".bias", {site().info.out}, 0.2) : Tensor();
  }
  Tensor forward(const Tensor& x) const {
    return adapter().forward(x, Dense(weight(), bias()), models::Pass()).detach();
  }
  Tiny tiny;
};

}  // namespace graft::peft
