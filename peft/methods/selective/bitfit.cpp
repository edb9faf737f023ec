// BitFit: y = W x + b, b trained.   Ben Zaken, Goldberg and Ravfogel 2021, arXiv:2106.10199
// Trains b [out] of each linear named, a copy of the base's, zeros where it has none: the model is
// unchanged at step 0. Merged exactly where the base has a bias to write b into; llama has none at
// all, so all of them are new there. The paper trains every bias (norms here have none) and the
// head, which modules_to_save adds (a classifier's is trained anyway, with its bias), and favours
// those of queries and of the first layer of the MLP (target_modules: [attn.q, mlp.up]). HF PEFT
// has no such method; BEFT (beft) adds a bias beside the frozen one.
#include <ATen/ATen.h>

#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct BitfitConfig {
  Targets targets{.modules = {"all-linear"}};
  bool only_existing = false;

  void fields(configs::Fields& f) {
    f("only_existing", only_existing, "leave out matrices that have no bias in the base");
  }
};

class BitfitBias : public WholeBias {
 public:
  BitfitBias(const BitfitConfig&, const LinearSite& site, kernels::Key, at::Device device)
      : WholeBias(site, device) {}
  static std::vector<Leaf> leaves() { return {{"bias", "bias"}}; }
  void initialize(const BitfitConfig&, const LinearSite& site, BaseWeights& base) {
    WholeBias::initialize(site, base);
  }
};

class Bitfit : public LinearMethod<BitfitConfig, BitfitBias> {
 public:
  void attach(AttachContext& context) override {
    sites_ = config_.targets.resolve(context);
    if (context.info.task != models::Task::kCausalLm) {
      std::erase_if(sites_, [](const LinearSite* site) { return site->role == "head"; });
      GRAFT_CHECK(!sites_.empty(), "peft: bitfit: a classifier's head is trained whole, with its ",
                  "bias; name other target_modules, or use linear_probe");
    }
    if (config_.only_existing) {
      std::erase_if(sites_, [](const LinearSite* site) { return !site->info.has_bias; });
      GRAFT_CHECK(!sites_.empty(),
                  "peft: bitfit: none of target_modules has a bias in this model; ",
                  "with only_existing: false biases are added");
    }
    for (const LinearSite* site : sites_) attach_to(context, *site);
    whole_.attach(context, sites_);
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    LinearMethod::from_peft_config(adapter);
    config_.only_existing = false;  // the tensors say which
  }
};

}  // namespace

void register_bitfit(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Bitfit>(); }});
}

}  // namespace graft::peft
