// GLoRA: y = (W + W o A + B) x + b + b o D + E + W C.
//   Chavan et al. 2023, arXiv:2306.07967, eq. 9
// Trains what the fields choose: A and B as products [out, r] [r, in], as columns [out, 1] or as
// numbers; where the matrix has a bias b also C as a product [in, r] [r, 1] or a column [in, 1],
// and D and E as [out] or as numbers. Init: left factors, columns and numbers are zero, so the
// model is unchanged at step 0. Mergeable where the matrix has no bias. Only A as a product needs
// the dense matrix in every pass; b and W C are the base's outputs for 0 and for C. Fields and
// files are those of HF PEFT's GloraConfig; PEFT has neither C, D nor E without a bias and then
// saves zeros for them, the paper searches over the choices of each slot. PEFT multiplies W and A
// element by element; the paper writes W A, and LyCORIS's glora is (W + W A + B) x with A [in, r]
// [r, in]: matrix_product, which needs no dense matrix and is not PEFT's.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct GloraConfig {
  Targets targets;
  int r = 8;
  std::string config_A_B = "lora", config_C = "lora", config_D_E = "constant";
  bool init_weights = true;
  bool matrix_product = false;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "inner size of the products");
    f("config_A_B", config_A_B, f.one_of({"lora", "vector", "constant", "none"}), "form of A, B");
    f("config_C", config_C, f.one_of({"lora", "vector", "none"}), "form of C");
    f("config_D_E", config_D_E, f.one_of({"vector", "constant", "none"}), "form of D and E");
    f("init_weights", init_weights, "false: random values, not as the base");
    f("matrix_product", matrix_product, "A [in, r] [r, in] multiplies W as a matrix, as LyCORIS");
  }
  int rank(const LinearSite&) const { return r; }
  static PeftForm peft_form() {
    return {.type = "GLORA", .fixed = {{"bias", "none"}}, .ours = {"matrix_product"}};
  }
  bool is_pefts() const { return !matrix_product; }
  bool starts_as_base() const { return init_weights; }
};

/// One of A to E: a product of two parameters, one parameter, or nothing (zeros that are saved).
struct GloraPath {
  Tensor left, right;

  bool empty() const { return !left.defined(); }
  bool is_product() const { return right.defined(); }
  Tensor value() const { return is_product() ? left.mm(right) : left; }
};

class GloraLinear : public models::LinearAdapter {
 public:
  GloraLinear(const GloraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : info_(site.info), matrix_product_(c.matrix_product) {
    const int64_t in = info_.in, out = info_.out, r = c.r;
    GRAFT_CHECK(!c.matrix_product || c.config_A_B == "lora",
                "peft: glora: matrix_product needs config_A_B = lora, not ", c.config_A_B);
    const auto add = [&](const std::string& name, at::IntArrayRef shape, double deviation) {
      random = kernels::derive(random, 1);
      return register_parameter(name, draw_normal(shape, deviation, random, device));
    };
    const double start = c.init_weights ? 0 : 0.02;
    const auto path = [&](const std::string& name, const std::string& form, int64_t rows,
                          int64_t columns, at::IntArrayRef zeros) {
      if (form == "lora") {
        random = kernels::derive(random, 1);
        const Tensor right = draw_kaiming({r, columns}, random, device);
        const Tensor left = add(name + "_Xd", {rows, r}, start);
        return GloraPath{left, register_parameter(name + "_Xu", right)};
      }
      if (form == "constant") return GloraPath{add(name + "_X", {1}, start), {}};
      const std::vector<int64_t> column = {rows, 1};
      const bool flat = zeros.size() == 1;  // D and E are not columns
      if (form == "vector")
        return GloraPath{add(name + "_X", flat ? zeros : at::IntArrayRef(column), start), {}};
      register_buffer(name + "_zeros", at::zeros(zeros, at::TensorOptions().device(device)));
      return GloraPath{};
    };
    const auto with_bias = [&](const std::string& form) { return info_.has_bias ? form : "none"; };
    a_ = path("glora_A", c.config_A_B, matrix_product_ ? in : out, in, {out, in});
    b_ = path("glora_B", c.config_A_B, out, in, {out, in});
    c_ = path("glora_C", with_bias(c.config_C), in, 1, {in, 1});
    d_ = path("glora_D", with_bias(c.config_D_E), out, 1, {out});
    e_ = path("glora_E", with_bias(c.config_D_E), out, 1, {out});
    GRAFT_CHECK(!a_.empty() || !c_.empty() || !d_.empty(), "peft: ", site.name,
                ": nothing to train; without a bias config_A_B must not be none");
  }
  static std::vector<Leaf> leaves() {
    return {{"glora_A_Xd", "glora_A.Xd"},       {"glora_A_Xu", "glora_A.Xu"},
            {"glora_A_X", "glora_A.X"},         {"glora_B_Xd", "glora_B.Xd"},
            {"glora_B_Xu", "glora_B.Xu"},       {"glora_B_X", "glora_B.X"},
            {"glora_C_Xd", "glora_C.Xd"},       {"glora_C_Xu", "glora_C.Xu"},
            {"glora_C_X", "glora_C.X"},         {"glora_D_X", "glora_D.X"},
            {"glora_E_X", "glora_E.X"},         {"glora_A_zeros", "glora_A.zeros"},
            {"glora_B_zeros", "glora_B.zeros"}, {"glora_C_zeros", "glora_C.zeros"},
            {"glora_D_zeros", "glora_D.zeros"}, {"glora_E_zeros", "glora_E.zeros"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const auto cast = [&](const Tensor& t) { return t.to(x.scalar_type()); };
    Tensor y = base(x), bias;
    if (info_.has_bias) bias = base(at::zeros({1, info_.in}, x.options())).squeeze(0);
    const Tensor product = info_.has_bias ? y - bias : y;  // W x
    if (matrix_product_) {
      const Tensor moved = base(at::linear(at::linear(x, cast(a_.right)), cast(a_.left)));
      y = y + (info_.has_bias ? moved - bias : moved);
    } else if (a_.is_product()) {
      const Tensor w = base.weight();
      y = y + at::linear(x, cast(w * a_.value().to(w.scalar_type())));
    } else if (!a_.empty()) {
      y = y + product * cast(a_.left).flatten();
    }
    if (b_.is_product()) {
      y = y + at::linear(at::linear(x, cast(b_.right)), cast(b_.left));
    } else if (!b_.empty()) {
      y = y + x.sum(-1, true) * cast(b_.left).flatten();
    }
    if (!c_.empty()) y = y + (base(cast(c_.value()).t()).squeeze(0) - bias);
    return d_.empty() ? y : y + bias * cast(d_.left) + cast(e_.left);
  }
  bool needs_weight() const override { return a_.is_product(); }
  bool mergeable() const override { return !info_.has_bias; }
  Tensor merged(const Tensor& w) const override {
    if (a_.empty()) return w;
    if (matrix_product_) {
      const Tensor wide = w.to(a_.left.scalar_type());
      return (wide + wide.mm(a_.left).mm(a_.right) + b_.value()).to(w.scalar_type());
    }
    return w + w * a_.value().to(w.scalar_type()) + b_.value().to(w.scalar_type());
  }

 private:
  models::LinearInfo info_;
  bool matrix_product_;
  GloraPath a_, b_, c_, d_, e_;
};

}  // namespace

void register_glora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<GloraConfig, GloraLinear>>(); }});
}

}  // namespace graft::peft
