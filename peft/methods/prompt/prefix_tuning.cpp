// Prefix tuning: softmax(q [P_k; k]^T / sqrt(K)) [P_v; v] in every layer.
//       Li and Liang 2021, arXiv:2101.00190; P-tuning v2: Liu et al. 2021, arXiv:2110.07602
// Trains P [m, 2 layers H K], m = num_virtual_tokens, H heads of keys of width K: of layer i the
// columns from 2 i H K are keys, the next H K values. With prefix_projection P is the output of
// Linear(H K, h), tanh, Linear(h, 2 layers H K) over a table [m, H K]. N(0, 1), or zeros; the model
// is not the base at step 0 (zero keys take their share of attention). Not mergeable. Fields and
// files are those of HF PEFT's PrefixTuningConfig: keys are not rotated, and tokens stand at
// positions from m on, in the `adapters` library from 0 on (shift_positions: false). Its files hold
// P alone; ours hold the table and the layers too, which PEFT passes over, so that a run can go on;
// P out of PEFT's files is trained on as it is. Under a sliding window the prefix counts as the m
// oldest keys of a document.
#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "models/nn/sequence.h"
#include "peft/prompt.h"

namespace graft::peft {
namespace {

struct PrefixTuningConfig {
  int num_virtual_tokens = 20;
  bool prefix_projection = false;
  std::optional<int> encoder_hidden_size;
  std::optional<std::string> init_weights;
  bool shift_positions = true;

  void fields(configs::Fields& f) {
    f("num_virtual_tokens", num_virtual_tokens, f.range(1, 65536), "keys in front of a document");
    f("prefix_projection", prefix_projection, "train the prefix through an MLP");
    f("encoder_hidden_size", encoder_hidden_size, f.range(1, 65536),
      "inner width of the MLP; null: that of a layer's keys");
    f("init_weights", init_weights, f.one_of({"zero"}), "zero: zeros; null: N(0, 1)");
    f("shift_positions", shift_positions,
      "true: tokens count on from the prefix, as PEFT; false: from 0, as the adapters library");
  }
  static PeftForm peft_form() { return {.type = "PREFIX_TUNING", .ours = {"shift_positions"}}; }
};

class PrefixTuningCore : public models::AttentionAdapter {
 public:
  PrefixTuningCore(std::shared_ptr<PromptRows> rows, int64_t layer, int64_t head_dim)
      : rows_(std::move(rows)), layer_(layer), head_dim_(head_dim) {
    register_module("rows", rows_);
  }
  Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Core& core,
                 const models::Pass& pass) override {
    const int64_t heads = k.size(1), width = heads * head_dim_;
    const Tensor rows = rows_->columns(2 * layer_ * width, 2 * width, pass);
    const Tensor both_2HPK = rows.view({-1, 2, heads, head_dim_}).permute({1, 2, 0, 3});
    const auto before = [&](const Tensor& own, int64_t part) {
      const Tensor prefix = both_2HPK[part].to(own.scalar_type()).unsqueeze(0);
      return at::cat({prefix.expand({own.size(0), -1, -1, -1}), own}, 2);
    };
    return core(q, before(k, 0), before(v, 1));
  }

 private:
  std::shared_ptr<PromptRows> rows_;
  int64_t layer_, head_dim_;
};

class PrefixTuningShift : public models::SequenceAdapter {
 public:
  explicit PrefixTuningShift(int64_t count) : count_(count) {}
  models::Carry edit(models::Carry carry, const models::Pass&) override {
    return models::shift_positions(carry, count_);
  }

 private:
  int64_t count_;
};

class PrefixTuning : public Method {
 public:
  void fields(configs::Fields& f) override { config_.fields(f); }
  bool starts_as_base() const override { return false; }
  void continue_from(const SavedAdapter& adapter) override { is_flat_ = is_flat_prompt(adapter); }
  void attach(AttachContext& context) override {
    const auto& cores = context.slots.attentions;
    check_slots(context, cores.size(), "attention");
    base_ = PromptBase::of(context);
    for (const LinearSite& site : context.slots.linears) {
      if (site.role == "attn.k") base_.token_dim = site.info.out;
    }
    base_.num_attention_heads = base_.token_dim / context.info.head_dim;
    config_.encoder_hidden_size =
        config_.encoder_hidden_size.value_or(static_cast<int>(base_.token_dim));
    const int64_t width = 2 * base_.token_dim * static_cast<int64_t>(cores.size());
    PromptRows::Shape shape{config_.num_virtual_tokens, {width}};
    if (config_.prefix_projection && !is_flat_) {
      shape.widths = {base_.token_dim, *config_.encoder_hidden_size, width};
      shape.activation = PromptRows::Shape::Activation::kTanh;
      shape.layers = "transform";
    }
    rows_ = std::make_shared<PromptRows>(shape, site_key(context, "prefix"), context.device);
    if (config_.init_weights) zero();
    for (size_t i = 0; i < cores.size(); ++i) {
      cores[i].slot->push(std::make_shared<PrefixTuningCore>(rows_, static_cast<int64_t>(i),
                                                             context.info.head_dim));
    }
    rows_->attach(context, cores.front().stage, cores.back().stage);
    for (const auto& site : context.slots.sequences) {
      if (site.name == "input" && config_.shift_positions)
        site.slot->push(std::make_shared<PrefixTuningShift>(config_.num_virtual_tokens));
    }
  }

  std::string peft_type() const override {
    return config_.shift_positions ? PrefixTuningConfig::peft_form().type : "";
  }
  nlohmann::json to_peft_config(const SlotMap&) const override {
    rows_->refresh();
    return write_prompt_form(PrefixTuningConfig::peft_form(), configs::describe(config_), base_);
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    continue_from(adapter);
    read_prompt_form(PrefixTuningConfig::peft_form(), adapter,
                     [&](configs::Fields& f) { config_.fields(f); });
  }

 private:
  void zero() {
    const at::NoGradGuard no_grad;
    if (!rows_->has_encoder()) {
      rows_->table().zero_();
    } else {
      rows_->last_weight().zero_(), rows_->last_bias().zero_();
    }
  }
  PrefixTuningConfig config_;
  PromptBase base_;
  bool is_flat_ = false;
  std::shared_ptr<PromptRows> rows_;
};

}  // namespace

void register_prefix_tuning(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<PrefixTuning>(); }});
}

}  // namespace graft::peft
