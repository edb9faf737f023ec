// Full fine-tuning: W' = W + dW of every tensor.
// Trains the whole base from its own values, unquantised: what other methods are measured against.
// Every rank holds its share of weights, gradients and moments (storage class S), with gradients of
// one stage at a time; the adapter folder holds every tensor under Hugging Face's name.
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "peft/attach.h"

namespace graft::peft {
namespace {

class Full : public Method {
 public:
  void fields(configs::Fields&) override {}
  void attach(AttachContext& context) override {
    check_slots(context, context.slots.weights.size(), "tensors of the base");
    for (const WeightSite& site : context.slots.weights) thaw(context, site);
  }
  void from_peft_config(const SavedAdapter&) override {}
};

}  // namespace

void register_full(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Full>(); }});
}

}  // namespace graft::peft
