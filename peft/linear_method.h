// LinearMethod: "one adapter class on every matched linear". A method file then holds its config
// and its adapter.
//
//   Config:   void fields(Fields&); Targets targets;
//   Adapter:  derives from LinearAdapter; Adapter(config, site, random, device); registers its
//   parameters;
//             static peft leaf names: {"lora_a", "lora_A.weight"}
#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "peft/method.h"
#include "peft/targets.h"

namespace graft::peft {

/// Our leaf name of a parameter and what follows the module path in PEFT's file.
using Leaf = std::pair<std::string_view, std::string_view>;

/// Puts an adapter on a slot and lists its parameters, under PEFT's keys where `leaves` has them.
void attach_linear(AttachContext& context, const LinearSite& site,
                   const std::shared_ptr<models::LinearAdapter>& adapter,
                   const std::vector<Leaf>& leaves);

/// The key of a slot's initial values.
kernels::Key site_key(const AttachContext& context, const LinearSite& site);

template <class Config, class Adapter>
class LinearMethod : public Method {
 public:
  void fields(configs::Fields& f) override { config_.fields(f); }
  void attach(AttachContext& context) override {
    sites_ = config_.targets.resolve(context.slots);
    for (const LinearSite* site : sites_) {
      attach_linear(
          context, *site,
          std::make_shared<Adapter>(config_, *site, site_key(context, *site), context.device),
          Adapter::leaves());
    }
  }

 protected:
  Config config_;
  std::vector<const LinearSite*> sites_;
};

}  // namespace graft::peft
