// LoRand: y = o + U(GELU(D(o))), o = the sublayer's output, D: d -> d / f and U: d / f -> d.
//   Yin et al. 2023, "1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions",
//   CVPR 2023
// Each projection is a matrix sum_i P_i K_i Q_i of `branches` products of rank kernel_dim, and a
// bias. Trains P [branches, in, kernel_dim], K [branches, kernel_dim, kernel_dim], Q [branches,
// kernel_dim, out] and the bias [out] of both. Init: Kaiming-uniform (a = sqrt 5) as PyTorch has
// it for each of them, that is within 1 / sqrt of their columns, the bias within 1 / sqrt(in): the
// model does not start as the base. Not mergeable. The released code (DongshuoYin/CoLin) has a K
// for each projection, which is the default; share_kernel has one for both, as we read the paper.
// The dense matrix is never built: x passes the branches side by side. No library has it.
#include <ATen/ATen.h>

#include <cmath>

#include "configs/check.h"
#include "peft/draws.h"
#include "peft/sublayer_method.h"

namespace graft::peft {
namespace {

struct LorandConfig {
  static constexpr const char* kName = "lorand";
  std::vector<std::string> sites = {"attn", "mlp"};
  double factor = 2;
  int branches = 4, kernel_dim = 8;
  bool share_kernel = false;

  void fields(configs::Fields& f) {
    f("sites", sites, f.one_of({"attn", "mlp", "block"}), "what the adapters stand behind");
    f("factor", factor, f.range(1, 4096), "f: width of the model / inner width");
    f("branches", branches, f.range(1, 4096), "products that a matrix is the sum of");
    f("kernel_dim", kernel_dim, f.range(1, 4096), "their rank");
    f("share_kernel", share_kernel, "one set of K for both projections, as the paper has it");
  }
  bool starts_as_base() const { return false; }
};

class LorandAdapter : public models::SublayerAdapter {
 public:
  LorandAdapter(const LorandConfig& c, const SublayerPlace& place, kernels::Key random,
                at::Device device) {
    const int64_t width = place.width;
    const auto inner = static_cast<int64_t>(static_cast<double>(width) / c.factor);
    GRAFT_CHECK(inner >= 1, "lorand: factor = ", c.factor, ", at most the model's width ", width);
    down_ = project("down_", c, {width, inner}, random, device, {});
    up_ = project("up_", c, {inner, width}, kernels::derive(random, 4), device,
                  c.share_kernel ? down_.k : Tensor());
  }
  Tensor forward(const Tensor& h_BLD, const Sublayer& sublayer, const models::Pass&) override {
    const Tensor o = sublayer(h_BLD);
    return o + up_(at::gelu(down_(o)));
  }

 private:
  struct Projection {
    Tensor p, k, q, bias;

    Tensor operator()(const Tensor& x) const {
      const auto type = x.scalar_type();
      const Tensor in = p.to(type).transpose(0, 1).flatten(1);  // [in, branches * kernel_dim]
      const Tensor by_branch = x.matmul(in).unflatten(-1, {p.size(0), 1, p.size(2)});
      const Tensor mixed = by_branch.matmul(k.to(type)).flatten(-3);
      return at::linear(mixed, q.to(type).flatten(0, 1).t(), bias.to(type));
    }
  };
  Projection project(const std::string& name, const LorandConfig& c,
                     std::pair<int64_t, int64_t> size, kernels::Key key, at::Device device,
                     Tensor shared_kernel) {
    const auto draw = [&](const char* leaf, at::IntArrayRef shape, int64_t fan, int number) {
      const double bound = 1 / std::sqrt(static_cast<double>(fan));
      return register_parameter(name + leaf,
                                draw_uniform(shape, bound, kernels::derive(key, number), device));
    };
    const int64_t n = c.branches, k = c.kernel_dim;
    Projection made;
    made.p = draw("p", {n, size.first, k}, k, 0);
    made.k = shared_kernel.defined() ? shared_kernel : draw("k", {n, k, k}, k, 1);
    made.q = draw("q", {n, k, size.second}, size.second, 2);
    made.bias = draw("bias", {size.second}, size.first, 3);
    return made;
  }

  Projection down_, up_;
};

using Lorand = SublayerMethod<LorandConfig, LorandAdapter>;

}  // namespace

void register_lorand(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Lorand>(); }});
}

}  // namespace graft::peft
