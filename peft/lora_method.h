// LoraMethod: LinearMethod for the methods that train an A and a B on each slot, which may start
// from the base's matrices or from data.
//
//   Config:   derives from LoraStartFields
//   Adapter:  as LinearMethod's, with LoraPair& pair(): its lora_a and lora_b
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "configs/check.h"
#include "peft/linear_method.h"
#include "peft/lora_start.h"

namespace graft::peft {

template <class Config, class Adapter>
class LoraMethod : public LinearMethod<Config, Adapter> {
 protected:
  using Base = LinearMethod<Config, Adapter>;
  using Base::adapters_, Base::config_, Base::sites_;

 public:
  Calibration calibration() const override { return config_.calibration(); }
  std::vector<const LinearSite*> start_sites() const override {
    return config_.is_computed() ? sites_ : std::vector<const LinearSite*>();
  }
  void observe(const LinearSite& site, const Observation& seen) override {
    starter_.observe(config_, site, seen);
  }
  std::vector<Tensor> start(const LinearSite& site, PlainMatrix& matrix) override {
    return starter_.start(config_, site, matrix);
  }
  void adopt(const LinearSite& site, const std::vector<Tensor>& values) override {
    if (config_.is_start("eva")) {
      directions_.push_back(values);
      return;
    }
    LoraPair& pair = pair_at(site);
    pair.a.copy_(values[0]);
    pair.b.copy_(values[1]);
    if (!pair.taken_a.defined()) return;
    pair.taken_a.copy_(values[2]);
    pair.minus_taken_b.copy_(values[3]);
  }
  /// EVA: the slots share the ranks.
  void adopted() override {
    if (!config_.is_start("eva")) return;
    std::vector<Tensor> ratios;
    for (const auto& slot : directions_) ratios.push_back(slot[1]);
    config_.decide(sites_, ratios);
    for (size_t i = 0; i < sites_.size(); ++i) {
      LoraPair& pair = adapters_[i]->pair();
      const int64_t rank = config_.rank(*sites_[i]);
      pair.a.set_data(directions_[i][0].slice(0, 0, rank).to(pair.a.device()).contiguous());
      pair.b.set_data(at::zeros({pair.b.size(0), rank}, pair.b.options()));
      pair.scale = config_.scale(*sites_[i]);
    }
    directions_.clear();
  }
  void continue_from(const SavedAdapter& adapter) override { config_.take_decisions(adapter); }

  bool changes_base() const override { return config_.takes_from_base(); }
  Tensor prepare_weight(const LinearSite& site, const Tensor& w) const override {
    if (std::find(sites_.begin(), sites_.end(), &site) == sites_.end()) return w;
    const LoraPair& pair = pair_at(site);
    return residual(w, pair.taken_a, -pair.minus_taken_b, pair.scale);
  }
  void base_is_prepared() override {
    for (const auto& adapter : adapters_) adapter->pair().base_is_prepared = true;
  }

  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    nlohmann::json config = Base::to_peft_config(slots);
    config_.write(config, sites_, slots);
    return config;
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    Base::from_peft_config(LoraStartFields::read(adapter));
  }

 protected:
  void attach_to(AttachContext& context, const LinearSite& site) override {
    config_.check_start(site);
    starter_.list(config_, site, context.info.task);
    Base::attach_to(context, site);
    if (!config_.takes_from_base()) return;
    LoraPair& pair = adapters_.back()->pair();
    pair.taken_a = at::zeros_like(pair.a, at::TensorOptions().requires_grad(false));
    pair.minus_taken_b = at::zeros_like(pair.b, at::TensorOptions().requires_grad(false));
    const std::string name = context.prefix + site.name + ".";
    context.params.set_tail(name + "lora_a", pair.taken_a, 0);
    context.params.set_tail(name + "lora_b", pair.minus_taken_b, 1);
  }

 private:
  LoraPair& pair_at(const LinearSite& site) const {
    const auto place = std::find(sites_.begin(), sites_.end(), &site);
    return adapters_[static_cast<size_t>(place - sites_.begin())]->pair();
  }

  LoraStarter starter_;
  std::vector<std::vector<Tensor>> directions_;  ///< EVA's, of sites_: directions and ratios
};

}  // namespace graft::peft
