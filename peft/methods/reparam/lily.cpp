// Lily: y = W x + b + s (sum_e p_e B_e)^T A x, p the mean over the positions of softmax(R A x):
// each slot mixes experts B_e that all slots of its kind share.
//   arXiv:2407.09946
// Trains A [r, in], one for stride_A slots in a row (Kaiming-uniform), B [num_B r, out], one for
// all slots of an entry of target_modules and a shape (zeros: the model is unchanged at step 0),
// and R [num_B, r] of each slot (Kaiming-uniform). Not mergeable: p depends on x. Fields and files
// are those of HF PEFT's LilyConfig; as there the mean is over all positions of the micro-batch,
// padding too (so over one when text is generated), and A and B stand in the file for every slot.
#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <map>
#include <tuple>

#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/projection.h"

namespace graft::peft {
namespace {

struct LilyConfig {
  Targets targets;
  int r = 32;
  int stride_A = 1;
  int num_B = 2;
  double scaling = 1;
  bool init_weights = true;
  Tensor a, b;  ///< no fields: the next slot's

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank, the inner size");
    f("stride_A", stride_A, f.range(1, 4096), "slots of a kind in a row that share A");
    f("num_B", num_B, f.range(2, 4096), "experts that the slots of a kind share");
    f("scaling", scaling, f.positive().at_most(1e30), "s");
    f("init_weights", init_weights, "B zero; false: Kaiming-uniform, not as the base");
  }
  int rank(const LinearSite&) const { return r; }
  static PeftForm peft_form() { return {.type = "LILY"}; }
  bool starts_as_base() const { return init_weights; }
};

class LilyLinear : public models::LinearAdapter {
 public:
  LilyLinear(const LilyConfig& c, const LinearSite&, kernels::Key random, at::Device device)
      : scaling_(c.scaling), a_(c.a), b_(c.b) {
    router_ = register_parameter("router", draw_kaiming({c.num_B, c.r}, random, device));
  }
  static std::vector<Leaf> leaves() {
    return {
        {"router", "lily_router.weight"}, {"lily_A", "lily_A.weight"}, {"lily_B", "lily_B.weight"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x), hidden = at::linear(x, a_.to(x.scalar_type()));
    const int64_t experts = router_.size(0), r = router_.size(1);
    const Tensor p = at::linear(hidden.to(at::kFloat), router_).softmax(-1);
    const Tensor share = p.view({-1, experts}).mean(0);
    const Tensor mixed = (share.view({-1, 1, 1}) * b_.view({experts, r, -1})).sum(0);
    return y + (hidden.matmul(mixed.to(x.scalar_type())) * scaling_).to(y.scalar_type());
  }

 private:
  double scaling_;
  Tensor a_, b_, router_;
};

class Lily : public LinearMethod<LilyConfig, LilyLinear> {
 public:
  void attach(AttachContext& context) override {
    if (entries_.is_null()) entries_ = hf_targets(config_.targets.resolve(context), context.slots);
    LinearMethod::attach(context);
  }
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    nlohmann::json config = LinearMethod::to_peft_config(slots);
    config["target_modules"] = entries_;  // they say which slots share
    return config;
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    LinearMethod::from_peft_config(adapter);
    const auto found = adapter.config.find("target_modules");
    if (found != adapter.config.end()) entries_ = *found;
  }

 protected:
  void before_slots(AttachContext&) override {
    kinds_.clear();
    for (const LinearSite* s : sites_) kinds_[kind_of(*s)].slots.push_back(s);
  }
  void attach_to(AttachContext& context, const LinearSite& site) override {
    Kind& kind = kinds_.at(kind_of(site));
    const size_t number = kind.number++, stride = static_cast<size_t>(config_.stride_A);
    const auto draw = [&](int64_t rows, int64_t columns, int stream) {
      const auto key = kernels::derive(site_key(context, site), stream);
      return draw_kaiming({rows, columns}, key, context.device);
    };
    if (number % stride == 0) {
      kind.a = draw(config_.r, site.info.in, 1);
      const auto first = kind.slots.begin() + static_cast<std::ptrdiff_t>(number);
      const size_t count = std::min(stride, kind.slots.size() - number);
      share(context, "lily_A", kind.a, {first, first + static_cast<std::ptrdiff_t>(count)});
    }
    if (number == 0) {
      kind.b = draw(int64_t{config_.num_B} * config_.r, site.info.out, 2);
      if (config_.init_weights) kind.b.zero_();
      share(context, "lily_B", kind.b, kind.slots);
    }
    config_.a = kind.a, config_.b = kind.b;
    LinearMethod::attach_to(context, site);
    if (number % stride == 0) adapters_.back()->register_parameter("lily_A", kind.a);
    if (number == 0) adapters_.back()->register_parameter("lily_B", kind.b);
  }

 private:
  struct Kind {
    std::vector<const LinearSite*> slots;
    size_t number = 0;  ///< of the next one
    Tensor a, b;        ///< of the slots at hand; of all
  };

  /// The entry of target_modules that means the slot, and its shape.
  using KindName = std::tuple<std::string, int64_t, int64_t>;
  KindName kind_of(const LinearSite& site) const {
    std::string entry = entries_.is_string() ? entries_.get<std::string>() : "";
    if (entries_.is_array()) {
      for (const auto& candidate : entries_) {
        const std::string text = candidate.is_string() ? candidate.get<std::string>() : "";
        if (site.hf_path.ends_with(text) && text.size() > entry.size()) entry = text;
      }
    }
    return {entry, site.info.in, site.info.out};
  }
  /// Lists a tensor under the first slot's name, and for files under the others' too.
  static void share(AttachContext& context, const std::string& leaf, const Tensor& value,
                    const std::vector<const LinearSite*>& slots) {
    const auto key = [&](const LinearSite& site) {
      return "base_model.model." + site.hf_path + "." + leaf + ".weight";
    };
    add_shared(context, slots[0]->name + "." + leaf, key(*slots[0]), value, slots);
    for (size_t i = 1; i < slots.size(); ++i) {
      context.params.add(Constant{.name = context.prefix + slots[i]->name + "." + leaf,
                                  .hf_key = key(*slots[i]),
                                  .value = value.detach(),
                                  .may_be_left_out = true});
    }
  }

  nlohmann::json entries_;  ///< target_modules in PEFT's words
  std::map<KindName, Kind> kinds_;
};

}  // namespace

void register_lily(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Lily>(); }});
}

}  // namespace graft::peft
