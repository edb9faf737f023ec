// LinearMethod: "one adapter class on every matched linear". A method file then holds its config
// and its adapter.
//
//   Config:   void fields(Fields&); Targets targets;
//             where HF PEFT has the method: static PeftForm peft_form(); its fields have PEFT's
//             names;
//             optional: bool starts_as_base() const, where that is not always so;
//             bool is_pefts() const, where some values of the fields mean nothing to PEFT;
//             double learning_rate_factor(leaf) const; int rank(site) const, of a factorisation of
//             the update: then one that is larger than the matrix is refused
//   Adapter:  derives from LinearAdapter; Adapter(config, site, random, device); registers its
//             parameters, and as buffers the constants that are saved;
//             static std::vector<Leaf> leaves(): {"lora_a", "lora_A.weight"}
//             optional: void initialize(config, site, base): values that need the base's;
//             static constexpr bool kAdaptsEmbeddings = true; kIsSparse = true: see
//             Method::is_sparse
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "configs/check.h"
#include "peft/attach.h"
#include "peft/method.h"
#include "peft/peft_form.h"
#include "peft/targets.h"
#include "peft/whole_tensors.h"

namespace graft::peft {

template <class Config, class Adapter>
class LinearMethod : public Method {
 public:
  void fields(configs::Fields& f) override {
    config_.targets.fields(f);
    config_.fields(f);
    whole_.fields(f);
  }
  void attach(AttachContext& context) override {
    sites_ = config_.targets.resolve(context);
    check_patterns(describe(), sites_);
    adapters_.clear();  // a method may be attached again: to show a model, then to train one
    before_slots(context);
    for (const LinearSite* site : sites_) attach_to(context, *site);
    const auto factor = [&](std::string_view leaf) { return learning_rate_factor(leaf); };
    whole_.attach(context, sites_, factor);
  }
  void initialize(BaseWeights& base) override {
    if constexpr (requires(Adapter & a) { a.initialize(config_, *sites_[0], base); }) {
      const at::NoGradGuard no_grad;
      for (size_t i = 0; i < sites_.size(); ++i)
        adapters_[i]->initialize(config_, *sites_[i], base);
    }
    whole_.initialize(base);
  }

  bool starts_as_base() const override {
    if constexpr (requires { config_.starts_as_base(); }) return config_.starts_as_base();
    return true;
  }
  bool is_sparse() const override {
    return requires { Adapter::kIsSparse; };
  }
  std::string peft_type() const override {
    if constexpr (requires { config_.is_pefts(); }) {
      if (!config_.is_pefts()) return "";
    }
    return form().type;
  }
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    return write_peft_form(form(), describe(), sites_, whole_, slots);
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    read_peft_form(form(), adapter, Adapter::leaves(), config_.targets, whole_,
                   [&](configs::Fields& f) { config_.fields(f); });
  }

 protected:
  static PeftForm form() {
    if constexpr (requires { Config::peft_form(); }) return Config::peft_form();
    return {};
  }
  /// What the slots share is drawn and listed here, anew at every attach().
  virtual void before_slots(AttachContext& /*context*/) {}
  virtual void attach_to(AttachContext& context, const LinearSite& site) {
    GRAFT_CHECK(adapts(site.info.kind), "peft: ", site.name,
                " is an embedding; this method adapts linear layers only");
    if constexpr (requires { config_.rank(site); }) check_rank(context, site, config_.rank(site));
    adapters_.push_back(
        std::make_shared<Adapter>(config_, site, site_key(context, site), context.device));
    attach_linear(context, site, adapters_.back(), Adapter::leaves(),
                  [&](std::string_view leaf) { return learning_rate_factor(leaf); });
  }
  double learning_rate_factor([[maybe_unused]] std::string_view leaf) const {
    if constexpr (requires { config_.learning_rate_factor(leaf); })
      return config_.learning_rate_factor(leaf);
    return 1;
  }
  configs::FieldDoc describe() const { return configs::describe(config_); }
  static constexpr bool adapts(models::LinearKind kind) {
    return kind != models::LinearKind::kEmbedding || requires { Adapter::kAdaptsEmbeddings; };
  }

  Config config_;
  WholeTensors whole_{form().bias_only};
  std::vector<const LinearSite*> sites_;
  std::vector<std::shared_ptr<Adapter>> adapters_;  ///< of sites_
};

}  // namespace graft::peft
