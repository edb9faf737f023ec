#include "peft/slot_map.h"

#include <cstdlib>

namespace graft::peft {
namespace {

struct Collect : models::Visitor {
  SlotMap& map;
  int stage = 0;
  explicit Collect(SlotMap& m) : map(m) {}

  template <class A>
  Site<A> site(const std::string& name, models::Slot<A>& slot) const {
    return {name, models::role_of(name), stage, &slot};
  }
  void slot(const models::LinearInfo& info, models::Slot<models::LinearAdapter>& s) override {
    constexpr std::string_view kBlock = "block.";
    LinearSite linear{{site(info.name, s)}, info, -1, map.names->hf_module(info.name)};
    if (info.name.starts_with(kBlock)) linear.layer = std::atoi(info.name.c_str() + kBlock.size());
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
}

const LinearSite* SlotMap::find_linear(const std::string& name) const {
  for (const LinearSite& site : linears) {
    if (site.name == name) return &site;
  }
  return nullptr;
}

}  // namespace graft::peft
