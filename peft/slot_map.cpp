#include "peft/slot_map.h"

#include <algorithm>
#include <cstdlib>

namespace graft::peft {
namespace {

/// -1 outside of the blocks.
int layer_of(const std::string& name) {
  constexpr std::string_view kBlock = "block.";
  return name.starts_with(kBlock) ? std::atoi(name.c_str() + kBlock.size()) : -1;
}

struct Collect : models::Visitor {
  SlotMap& map;
  int stage = 0;
  explicit Collect(SlotMap& m) : map(m) {}

  template <class A>
  Site<A> site(const std::string& name, models::Slot<A>& slot) const {
    return {name, models::role_of(name), stage, &slot};
  }
  void slot(const models::LinearInfo& info, models::Slot<models::LinearAdapter>& s) override {
    LinearSite linear{
        {site(info.name, s)}, info, layer_of(info.name), map.names->hf_module(info.name)};
    (info.kind == models::LinearKind::kGain ? map.gains : map.linears).push_back(std::move(linear));
  }
  void slot(const std::string& n, models::Slot<models::SublayerAdapter>& s) override {
    map.sublayers.push_back(site(n, s));
  }
  void slot(const std::string& n, models::Slot<models::AttentionAdapter>& s) override {
    map.attentions.push_back(site(n, s));
  }
  void slot(const std::string& n, models::Slot<models::SequenceAdapter>& s) override {
    map.sequences.push_back(site(n, s));
  }
  void slot(const std::string& n, models::Slot<models::TensorAdapter>& s) override {
    map.tensors.push_back(site(n, s));
  }
  void slot(const std::string& n, models::Slot<models::CarryAdapter>& s) override {
    map.carries.push_back(site(n, s));
  }
  void slot(const std::string& n, models::Slot<models::LossAdapter>& s) override {
    map.losses.push_back(site(n, s));
  }
};

}  // namespace

SlotMap::SlotMap(models::Model& model) : names(&model.names()) {
  Collect collect(*this);
  for (collect.stage = 0; collect.stage < model.num_stages(); ++collect.stage) {
    model.visit_slots(collect.stage, collect);
  }
  models::for_each_weight(model, [&](int block, const std::string& name, models::Weight& w) {
    WeightSite site{name, names->to_hf(name)->name, layer_of(name), model.num_stages(), -1, &w};
    for (int s = 0; s < model.num_stages(); ++s) {
      const std::vector<int> blocks = model.blocks_of(s);
      if (std::find(blocks.begin(), blocks.end(), block) == blocks.end()) continue;
      site.stage = std::min(site.stage, s);
      site.last_stage = s;
    }
    weights.push_back(std::move(site));
  });
}

const LinearSite* SlotMap::find_linear(const std::string& name) const {
  for (const LinearSite& site : linears) {
    if (site.name == name) return &site;
  }
  return nullptr;
}

const Site<models::SequenceAdapter>* SlotMap::find_input() const {
  for (const auto& site : sequences) {
    if (site.name == "input") return &site;
  }
  return nullptr;
}

}  // namespace graft::peft
