// The manifest methods.def, read twice: once to declare, once to register.
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "peft/method.h"

namespace graft::peft {

#define METHOD(name, group, paper, summary) \
  void register_##name(MethodRegistry& registry, const MethodFacts& facts);
#include "peft/methods.def"
#undef METHOD

const std::vector<MethodFacts>& method_facts() {
  static const std::vector<MethodFacts> facts = {
#define METHOD(name, group, paper, summary) MethodFacts{#name, #group, paper, summary},
#include "peft/methods.def"
#undef METHOD
  };
  return facts;
}

const MethodRegistry& methods() {
  static const MethodRegistry registry = [] {
    MethodRegistry r("method");
    size_t i = 0;
#define METHOD(name, group, paper, summary) register_##name(r, method_facts()[i++]);
#include "peft/methods.def"
#undef METHOD
    return r;
  }();
  return registry;
}

nlohmann::json Method::to_peft_config(const SlotMap&) const { return nlohmann::json::object(); }

void Method::from_peft_config(const SavedAdapter&) {
  throw Error(ExitCode::kUsage, "this method has no PEFT form to read");
}

void MethodEntry::fields(configs::Fields& f) {
  f("method", name, "what to train: see `graft methods`; may be left out when init_from is given");
  f("init_from", init_from, "start from this adapter's weights (PEFT layout)");
  if (name.empty() && f.reading()) {
    if (!f.given("init_from")) f.fail("method", "a method or init_from is needed");
    return;
  }
  if (!f.reading() && method == nullptr) {
    f.more_keys();
    return;
  }
  if (f.reading()) {
    if (methods().find(name) == nullptr) return f.fail("method", methods().unknown(name));
    method = methods().make(name);
  }
  method->fields(f);
}

}  // namespace graft::peft
