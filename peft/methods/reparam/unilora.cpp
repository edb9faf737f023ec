// Uni-LoRA: y = W x + b + B A x, where A and B of all slots are filled from one vector: element j
// is theta[i_j] / sqrt(n), n the elements that have the same i.    Li et al. 2025, arXiv:2506.00799
// Trains theta [theta_d_length], one for all slots (uniform within init_theta_d_bound): no start at
// the base. The places i are random and balanced: each entry of theta stands for as many elements,
// or one more. Mergeable. Fields and files are those of HF PEFT's UniLoraConfig: proj_seed gives
// NumPy's places, which files may hold too (save_indices).
#include <ATen/ATen.h>

#include <numeric>

#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/numpy_random.h"
#include "peft/places.h"
#include "peft/projection.h"

namespace graft::peft {
namespace {

struct UniloraConfig {
  Targets targets;
  int r = 4;
  int proj_seed = 42;
  int theta_d_length = 256;
  double unilora_dropout = 0;
  double init_theta_d_bound = 0.02;
  bool init_weights = true;
  bool save_indices = false;
  Tensor theta, places, scales;  ///< no fields: what the slots share; the last two in their order
  int64_t used = 0;              ///< places that slots have

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank, the inner size");
    f("proj_seed", proj_seed, f.at_least(0), "of the places");
    f("theta_d_length", theta_d_length, f.range(1, 1 << 28), "values trained");
    f("unilora_dropout", unilora_dropout, f.at_least(0).below(1), "on the adapter's input");
    f("init_theta_d_bound", init_theta_d_bound, f.positive(), "of theta's first values");
    f("init_weights", init_weights, "theta uniform; false: N(0, 1)");
    f("save_indices", save_indices, "save the places too, not only their seed");
  }
  int rank(const LinearSite&) const { return r; }
  static PeftForm peft_form() { return {.type = "UNILORA", .bias_only = "unilora_only"}; }
  bool starts_as_base() const { return false; }

  /// The places of all elements, as PEFT numbers them.
  void draw_places(int64_t elements) {
    NumpyGenerator generator(static_cast<uint32_t>(proj_seed));
    const int64_t each = elements / theta_d_length, more = elements % theta_d_length;
    std::vector<int64_t> all(static_cast<size_t>(each * theta_d_length));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i) / each;
    const auto extra = generator.choice(theta_d_length, more);
    all.insert(all.end(), extra.begin(), extra.end());
    generator.shuffle(all);
    places = at::tensor(all, at::kLong);
    used = 0;
    scales = places.bincount({}, theta_d_length).to(at::kFloat).rsqrt().index_select(0, places);
  }
  /// Of the next elements, the next slot's.
  std::pair<Tensor, Tensor> take(at::IntArrayRef shape, at::Device device) {
    const int64_t begin = used, end = used += c10::multiply_integers(shape);
    const auto part = [&](const Tensor& t) {
      return t.slice(0, begin, end).view(shape).clone().to(device);
    };
    return {part(places), part(scales)};
  }
};

class UniloraLinear : public models::LinearAdapter {
 public:
  UniloraLinear(UniloraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : dropout_(c.unilora_dropout), random_(random), theta_(c.theta) {
    const auto fill = [&](Factor& factor, at::IntArrayRef shape, const std::string& name) {
      auto [places, scales] = c.take(shape, device);
      if (c.save_indices) {
        register_buffer("indices_" + name, places);
        register_buffer("scales_" + name, scales);
      }
      factor = {{places, c.theta_d_length, site.name + ": unilora_indices_" + name}, scales};
    };
    fill(a_, {c.r, site.info.in}, "A");
    fill(b_, {site.info.out, c.r}, "B");
  }
  static std::vector<Leaf> leaves() {
    return {{"indices_A", "unilora_indices_A"},
            {"indices_B", "unilora_indices_B"},
            {"scales_A", "unilora_scales_A"},
            {"scales_B", "unilora_scales_B"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    return kernels::lowrank_add(base(x), dropout(x, dropout_, pass, random_), matrix(a_),
                                matrix(b_), 1);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + matrix(b_).mm(matrix(a_)).to(w.scalar_type());
  }

 private:
  struct Factor {
    Places places;
    Tensor scales;
  };
  Tensor matrix(const Factor& f) const {
    return theta_.index_select(0, f.places.checked().flatten()).view(f.scales.sizes()) * f.scales;
  }

  double dropout_;
  kernels::Key random_;
  Tensor theta_;
  Factor a_, b_;
};

class Unilora : public LinearMethod<UniloraConfig, UniloraLinear> {
 public:
  /// A file may hold theta alone: which slots share it then stands in the config.
  void from_peft_config(const SavedAdapter& adapter) override {
    PeftConfigReader config(adapter);
    config.get_targets_by_name(config_.targets);
    whole_.from_peft_config(config);
    read_peft_entries(form(), config, &config_.targets,
                      [&](configs::Fields& f) { config_.fields(f); });
  }

 protected:
  void before_slots(AttachContext& context) override {
    int64_t elements = 0;
    for (const LinearSite* s : sites_) elements += config_.r * (s->info.in + s->info.out);
    config_.draw_places(elements);
    const auto key = kernels::derive(context.random, 0);
    config_.theta = config_.init_weights
                        ? draw_uniform({config_.theta_d_length}, config_.init_theta_d_bound, key,
                                       context.device)
                        : draw_normal({config_.theta_d_length}, 1, key, context.device);
    add_shared(context, kTheta, "base_model." + kTheta, config_.theta, sites_);
  }
  void attach_to(AttachContext& context, const LinearSite& site) override {
    LinearMethod::attach_to(context, site);
    if (&site == sites_.front()) adapters_.back()->register_parameter(kTheta, config_.theta);
  }

 private:
  inline static const std::string kTheta = "unilora_theta_d";
};

}  // namespace

void register_unilora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Unilora>(); }});
}

}  // namespace graft::peft
