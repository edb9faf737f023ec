// P-tuning: h = [MLP(P); E(x)], or [MLP(LSTM(P)); E(x)].  Liu et al. 2021, arXiv:2103.10385
// Trains P [num_virtual_tokens, D] and an encoder, h = encoder_hidden_size. MLP, PEFT's default:
// Linear(D, h), ReLU, Linear(h, h), ReLU, Linear(h, D). LSTM, the paper's: a bidirectional LSTM(D,
// h) of encoder_num_layers, with dropout between them, Linear(2h, 2h), ReLU, Linear(2h, D). P is
// N(0, 1), the linear layers are uniform within 1 / sqrt(in), an LSTM's tensors 1 / sqrt(h). The
// model is not the base at step 0. Not mergeable. Fields and files are those of HF PEFT's
// PromptEncoderConfig. Its files hold the encoder's output alone; ours hold P and the encoder too,
// which PEFT passes over, so that a run can go on. A prompt out of PEFT's files has no encoder any
// more and is trained on as it is. The paper also places rows between the tokens: they stand in
// front here, as in PEFT. PEFT draws dropout for each row of a batch, which are one prompt here. As
// with prompt_tuning, the first token of a document is no target (prompt_tuning.cpp).
#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "peft/prompt.h"

namespace graft::peft {
namespace {

struct PTuningConfig {
  int num_virtual_tokens = 20;
  std::string encoder_reparameterization_type = "MLP";
  std::optional<int> encoder_hidden_size;
  int encoder_num_layers = 2;
  double encoder_dropout = 0;

  void fields(configs::Fields& f) {
    f("num_virtual_tokens", num_virtual_tokens, f.range(1, 65536), "rows of the prompt");
    f("encoder_reparameterization_type", encoder_reparameterization_type, f.one_of({"MLP", "LSTM"}),
      "what the rows pass: three linear layers, or an LSTM and two");
    f("encoder_hidden_size", encoder_hidden_size, f.range(1, 65536),
      "inner width of the encoder; null: that of the model");
    f("encoder_num_layers", encoder_num_layers, f.range(1, 1024), "of the LSTM");
    f("encoder_dropout", encoder_dropout, f.at_least(0).below(1),
      "probability, between layers of the LSTM");
  }
  static PeftForm peft_form() { return {.type = "P_TUNING"}; }
};

class PTuning : public Method {
 public:
  void fields(configs::Fields& f) override { config_.fields(f); }
  bool starts_as_base() const override { return false; }
  void continue_from(const SavedAdapter& adapter) override { is_flat_ = is_flat_prompt(adapter); }
  void attach(AttachContext& context) override {
    base_ = PromptBase::of(context);
    const int64_t width = context.info.hidden_size;
    config_.encoder_hidden_size = config_.encoder_hidden_size.value_or(static_cast<int>(width));
    const int64_t inner = *config_.encoder_hidden_size;
    PromptRows::Shape shape{config_.num_virtual_tokens, {width, inner, inner, width}};
    shape.layers = "mlp_head";
    if (config_.encoder_reparameterization_type == "LSTM") {
      shape.widths = {width, 2 * inner, 2 * inner, width};
      shape.lstm_layers = config_.encoder_num_layers;
      shape.lstm_dropout = config_.encoder_dropout;
    } else {
      GRAFT_CHECK(
          context.from_file || (config_.encoder_num_layers == 2 && config_.encoder_dropout == 0),
          "peft: p_tuning: encoder_num_layers = ", config_.encoder_num_layers,
          ", encoder_dropout = ", config_.encoder_dropout,
          ": the MLP takes neither; encoder_reparameterization_type: LSTM does");
    }
    if (is_flat_) shape = {config_.num_virtual_tokens, {width}};
    rows_ = std::make_shared<PromptRows>(shape, site_key(context, "input"), context.device);
    attach_prompt(context, rows_);
  }

  std::string peft_type() const override { return PTuningConfig::peft_form().type; }
  nlohmann::json to_peft_config(const SlotMap&) const override {
    rows_->refresh();
    return write_prompt_form(PTuningConfig::peft_form(), configs::describe(config_), base_);
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    continue_from(adapter);
    read_prompt_form(PTuningConfig::peft_form(), adapter,
                     [&](configs::Fields& f) { config_.fields(f); });
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
