// RoAd: y' = R y, y = W x + b, R rotates and stretches pairs of elements:
// y'_j = a_j cos(t_j) y_j - a_j sin(t_j) y_k, y'_k = a_k sin(t_k) y_j + a_k cos(t_k) y_k.
//                                                Liao and Monz 2024, arXiv:2409.00119
// Trains the angles t (zeros) and lengths a (ones): the model is unchanged at step 0. road_1: one
// of each a pair, [out / 2]; road_2: one an element, [out]; road_4: one an entry of R, [2 out]
// (in each group first those of the cosines). Mergeable where the matrix has no bias. Pairs are
// element i and i + group_size / 2 of a group, as in HF PEFT, whose fields and files these are; the
// paper pairs neighbours, which is the same method.
#include <ATen/ATen.h>

#include "configs/check.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct RoadConfig {
  Targets targets;
  std::string variant = "road_1";
  int group_size = 64;

  void fields(configs::Fields& f) {
    f("variant", variant, f.one_of({"road_1", "road_2", "road_4"}),
      "angles and lengths of a pair: one of each, one an element, one an entry");
    f("group_size", group_size, f.range(2, 65536), "pairs lie half of this apart; even");
  }
  static PeftForm peft_form() { return {.type = "ROAD", .inert = {"init_weights"}}; }
};

class RoadLinear : public models::LinearAdapter {
 public:
  RoadLinear(const RoadConfig& c, const LinearSite& site, kernels::Key, at::Device device)
      : variant_(c.variant), half_(c.group_size / 2), has_bias_(site.info.has_bias) {
    GRAFT_CHECK(c.group_size % 2 == 0 && site.info.out % c.group_size == 0,
                "peft: road: ", site.name, " has ", site.info.out,
                " outputs, no multiple of group_size = ", c.group_size,
                "; it must be an even divisor of them");
    const int64_t size = variant_ == "road_1"   ? site.info.out / 2
                         : variant_ == "road_2" ? site.info.out
                                                : site.info.out * 2;
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    theta_ = register_parameter("theta", at::zeros({size}, options));
    alpha_ = register_parameter("alpha", at::ones({size}, options));
  }
  static std::vector<Leaf> leaves() { return {{"theta", "road_theta"}, {"alpha", "road_alpha"}}; }

  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    return turned(base(x));
  }
  bool mergeable() const override { return !has_bias_; }
  Tensor merged(const Tensor& w) const override { return turned(w.t()).t().contiguous(); }

 private:
  /// The columns of one variant as [groups, 2, half]: the factors of an element and of its partner.
  std::pair<Tensor, Tensor> columns() const {
    const auto of_entries = [&](const Tensor& t, int64_t which) {
      if (variant_ == "road_1") return t.view({-1, 1, half_});  // both of a pair
      if (variant_ == "road_2") return t.view({-1, 2, half_});
      return t.view({-1, 2, 2, half_}).select(1, which);
    };
    return {of_entries(alpha_, 0) * of_entries(theta_, 0).cos(),
            of_entries(alpha_, 1) * of_entries(theta_, 1).sin()};
  }
  /// In float32: of a small angle bfloat16 would keep the sine only.
  Tensor turned(const Tensor& y) const {
    const auto [own, partners] = columns();
    const Tensor pairs = y.reshape({-1, y.size(-1) / (2 * half_), 2, half_});
    const Tensor partner = at::stack({-pairs.select(2, 1), pairs.select(2, 0)}, 2);
    return (pairs * own + partner * partners).reshape(y.sizes()).to(y.scalar_type());
  }

  std::string variant_;
  int64_t half_;
  bool has_bias_;
  Tensor theta_, alpha_;
};

}  // namespace

void register_road(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<RoadConfig, RoadLinear>>(); }});
}

}  // namespace graft::peft
