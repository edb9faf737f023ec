// Linear probe: logits = W h (+ b) of the frozen features h.     Radford et al. 2021,
// arXiv:2103.00020, sec. 3.2
// Trains the head alone, [labels, D] of a classifier (its bias too where it has one) or the table
// [V, D] of a causal LM, from the base's: the model is unchanged at step 0. The last stage is the
// only one with a graph, so the base runs forward once and nothing of it goes backward. The problem
// is convex; with weight_decay it is ridge logistic regression. HF PEFT has no such method: what it
// writes are the keys that PEFT's modules_to_save has.
#include <nlohmann/json.hpp>

#include "peft/whole_tensors.h"

namespace graft::peft {
namespace {

class LinearProbe : public Method {
 public:
  void fields(configs::Fields& f) override { whole_.fields(f); }
  void attach(AttachContext& context) override { whole_.attach(context, {}); }
  void initialize(BaseWeights& base) override { whole_.initialize(base); }
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    return whole_.to_peft_config(slots);
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    PeftConfigReader config(adapter);
    whole_.from_peft_config(config);
    config.refuse_the_rest();
  }

 private:
  WholeTensors whole_{"", "head"};
};

}  // namespace

void register_linear_probe(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<LinearProbe>(); }});
}

}  // namespace graft::peft
