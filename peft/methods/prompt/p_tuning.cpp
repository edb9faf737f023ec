// P-tuning: h = [MLP(P); E(x)].                    Liu et al. 2021, arXiv:2103.10385
// Trains P [num_virtual_tokens, D] and an encoder Linear(D, h), ReLU, Linear(h, h), ReLU,
// Linear(h, D), h = encoder_hidden_size. P is N(0, 1), the layers are uniform within 1 / sqrt(in).
// The model is not the base at step 0. Not mergeable. Fields and files are those of HF PEFT's
// PromptEncoderConfig. Its files hold the encoder's output alone; ours hold P and the encoder too,
// which PEFT passes over, so that a run can go on. A prompt out of PEFT's files has no encoder any
// more and is trained on as it is. The paper also places rows between the tokens and has an LSTM as
// encoder: rows stand in front here, as in PEFT, and an LSTM is read, not trained.
#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <algorithm>

#include "peft/prompt.h"

namespace graft::peft {
namespace {

struct PTuningConfig {
  int num_virtual_tokens = 20;
  std::optional<int> encoder_hidden_size;

  void fields(configs::Fields& f) {
    f("num_virtual_tokens", num_virtual_tokens, f.range(1, 65536), "rows of the prompt");
    f("encoder_hidden_size", encoder_hidden_size, f.range(1, 65536),
      "inner width of the encoder; null: that of the model");
  }
  static PeftForm peft_form() {
    return {.type = "P_TUNING",
            .fixed = {{"encoder_reparameterization_type", "MLP"},
                      {"encoder_num_layers", 2},
                      {"encoder_dropout", 0.0}}};  // PEFT's MLP takes neither of the last two
  }
};

class PTuning : public Method {
 public:
  void fields(configs::Fields& f) override { config_.fields(f); }
  bool starts_as_base() const override { return false; }
  void attach(AttachContext& context) override {
    base_ = PromptBase::of(context);
    const int64_t width = context.info.hidden_size;
    config_.encoder_hidden_size = config_.encoder_hidden_size.value_or(static_cast<int>(width));
    const int64_t inner = *config_.encoder_hidden_size;
    PromptRows::Shape shape{config_.num_virtual_tokens, {width, inner, inner, width}};
    shape.layers = "mlp_head";
    if (is_flat_) shape.widths = {width};
    rows_ = std::make_shared<PromptRows>(shape, site_key(context, "input"), context.device);
    attach_prompt(context, rows_);
  }

  std::string peft_type() const override { return PTuningConfig::peft_form().type; }
  nlohmann::json to_peft_config(const SlotMap&) const override {
    rows_->refresh();
    return write_prompt_form(PTuningConfig::peft_form(), configs::describe(config_), base_);
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    is_flat_ = std::find(adapter.tensors.begin(), adapter.tensors.end(), kPromptTable) ==
               adapter.tensors.end();
    PeftForm form = PTuningConfig::peft_form();
    if (is_flat_) {  // the encoder is gone: what it was does not matter
      for (const auto& entry : form.fixed.items()) form.inert.push_back(entry.key());
      form.fixed = nlohmann::json::object();
    }
    read_prompt_form(form, adapter, [&](configs::Fields& f) { config_.fields(f); });
  }

 private:
  PTuningConfig config_;
  PromptBase base_;
  bool is_flat_ = false;
  std::shared_ptr<PromptRows> rows_;
};

}  // namespace

void register_p_tuning(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<PTuning>(); }});
}

}  // namespace graft::peft
