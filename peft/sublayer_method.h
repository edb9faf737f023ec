// SublayerMethod: "one adapter class at every chosen sublayer", as LinearMethod is of matrices.
//
//   Config:   void fields(Fields&); static constexpr const char* kName; vector<string> sites;
//             bool starts_as_base() const;
//             optional: void resolve(const AttachContext&): what needs the model;
//             bool adapts(int layer) const
//   Adapter:  derives from SublayerAdapter; Adapter(config, place, random, device)
//
// HF PEFT has no such method: only Graft reads the files.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>

#include "configs/check.h"
#include "configs/names.h"
#include "peft/attach.h"
#include "peft/peft_config.h"
#include "peft/peft_form.h"

namespace graft::peft {

/// Where an adapter stands.
struct SublayerPlace {
  std::string role;  ///< "attn", "mlp", "block"
  int layer;
  int64_t width;
};

template <class Config, class Adapter>
class SublayerMethod : public Method {
 public:
  void fields(configs::Fields& f) override { config_.fields(f); }
  bool starts_as_base() const override { return config_.starts_as_base(); }
  void attach(AttachContext& context) override {
    check_slots(context, context.slots.sublayers.size(), "sublayers");
    if constexpr (requires { config_.resolve(context); }) config_.resolve(context);
    const auto& sites = config_.sites;
    const size_t before = context.params.all().size();
    for (const auto& site : context.slots.sublayers) {
      const int layer = std::atoi(site.name.c_str() + site.name.find('.') + 1);  // block.3.attn
      if (std::find(sites.begin(), sites.end(), site.role) == sites.end()) continue;
      if constexpr (requires { config_.adapts(layer); }) {
        if (!config_.adapts(layer)) continue;
      }
      const SublayerPlace place{site.role, layer, context.info.hidden_size};
      auto adapter =
          std::make_shared<Adapter>(config_, place, site_key(context, site.name), context.device);
      site.slot->push(adapter);
      list_tensors(context, *adapter, {site.name, site.name, site.stage}, {});
    }
    GRAFT_CHECK(context.params.all().size() > before, "peft: ", Config::kName,
                ": sites = ", configs::join(sites, ", "),
                ": nothing of this model is left to adapt");
  }
  nlohmann::json to_peft_config(const SlotMap&) const override {
    return write_peft_entries({}, configs::describe(config_));
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    PeftConfigReader config(adapter);
    read_peft_entries({}, config, nullptr, [&](configs::Fields& f) { config_.fields(f); });
  }

 private:
  Config config_;
};

}  // namespace graft::peft
