// KronA: y = W x + s (A (x) B) x; (x) is the Kronecker product.
//   Edalati et al. 2022, arXiv:2212.10650, sec. 3
// Trains A [o1, i1] and B [o2, i2] whole, o1 o2 = out, i1 i2 = in: the update has full rank. Init:
// A Kaiming-uniform (a = sqrt 5), B zero, so the model is unchanged at step 0 (the paper does not
// say which). Mergeable. layout diffusekrona: the outputs are numbered with B's rows first, as
// DiffuseKronA's code does it (Marjit et al. 2024, arXiv:2402.17412, whose A starts normal, 1 /
// o1); the same set of updates in another order, so what is trained in one layout is read in that
// one only. No HF PEFT type; LoKr with both factors whole computes the same with alpha = s r.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/krona.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct KronaConfig {
  Targets targets;
  configs::Auto<int> a_out, a_in;
  double scale = 1;
  std::string layout = "kron", init_weights = "kaiming";

  void fields(configs::Fields& f) {
    f("a_out", a_out, f.at_least(1), "rows of A, a divisor of out; auto: near its square root");
    f("a_in", a_in, f.at_least(1), "columns of A, a divisor of in; auto: near its square root");
    f("scale", scale, f.positive().at_most(1e30), "s");
    f("layout", layout, f.one_of({"kron", "diffusekrona"}), "order of the outputs");
    f("init_weights", init_weights, f.one_of({"kaiming", "normal"}),
      "how A starts: uniform within 1 / sqrt(a_in), or normal with deviation 1 / a_out");
  }
};

class KronaLinear : public models::LinearAdapter {
 public:
  KronaLinear(const KronaConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : scale_(c.scale), b_first_(c.layout == "diffusekrona") {
    const int64_t o1 = krona_factor(c.a_out, site.info.out, "a_out", site.name);
    const int64_t i1 = krona_factor(c.a_in, site.info.in, "a_in", site.name);
    a_ = register_parameter(
        "krona_a", c.init_weights == "kaiming"
                       ? draw_kaiming({o1, i1}, random, device)
                       : draw_normal({o1, i1}, 1.0 / static_cast<double>(o1), random, device));
    b_ = register_parameter("krona_b",
                            at::zeros({site.info.out / o1, site.info.in / i1}, a_.options()));
  }
  static std::vector<Leaf> leaves() { return {{"krona_a", "krona_a"}, {"krona_b", "krona_b"}}; }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x), t_AB = krona_product(x, a_, b_);
    const Tensor update = (b_first_ ? t_AB.transpose(-2, -1) : t_AB).flatten(-2);
    return y + (update * scale_).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    Tensor delta = at::kron(a_, b_);
    if (b_first_)
      delta = delta.unflatten(0, {a_.size(0), b_.size(0)}).transpose(0, 1).reshape(w.sizes());
    return w + (delta * scale_).to(w.scalar_type());
  }

 private:
  double scale_;
  bool b_first_;
  Tensor a_, b_;
};

class Krona : public LinearMethod<KronaConfig, KronaLinear> {
 public:
  Krona(const std::string& layout, const std::string& init_weights) {
    config_.layout = layout;
    config_.init_weights = init_weights;
  }
};

}  // namespace

int64_t krona_factor(const configs::Auto<int>& wanted, int64_t size, const char* field,
                     const std::string& where) {
  int64_t factor = 1;
  for (int64_t m = 2; m * m <= size; ++m) factor = size % m == 0 ? m : factor;
  if (!wanted.value) return factor;
  GRAFT_CHECK(size % *wanted.value == 0, "peft: ", where, ": ", field, " = ", *wanted.value,
              " does not divide ", size, "; ", factor, " and ", size / factor, " do");
  return *wanted.value;
}

Tensor krona_product(const Tensor& x, const Tensor& a, const Tensor& b) {
  const Tensor first = a.to(x.scalar_type()), second = b.to(x.scalar_type());
  return x.unflatten(-1, {first.size(1), second.size(1)})
      .matmul(second.t())
      .transpose(-2, -1)
      .matmul(first.t())
      .transpose(-2, -1);
}

std::unique_ptr<Method> make_krona(const std::string& layout, const std::string& init_weights) {
  return std::make_unique<Krona>(layout, init_weights);
}

void register_krona(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return make_krona("kron", "kaiming"); }});
}

}  // namespace graft::peft
