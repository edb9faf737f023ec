// Prompt tuning: h = [P; E(x)].                    Lester et al. 2021, arXiv:2104.08691
// Trains P [num_virtual_tokens, D], put in front of every document; it takes the first positions,
// and no loss is taken on it, nor on a document's first token: nothing predicts that in any method
// here, so losses of all are means over the same targets. PEFT has one target more where the first
// label is not -100, predicted by P's last row (tests/oracle/peft_prompts.py has that loss too).
// The model is not the base at step 0. Not mergeable. Fields and files are those of HF PEFT's
// PromptTuningConfig. Initial rows are N(0, 1), or with SAMPLE_VOCAB those of tokens drawn from the
// whole vocabulary, both as PEFT has them. The paper's are uniform within 0.5 (init_range: 0.5) or
// drawn from the 5000 most frequent tokens (sample_tokens: 5000, which are the first ones where a
// tokenizer numbers by frequency). PEFT's TEXT needs a tokenizer and is read, where it says nothing
// about a saved prompt, but not offered.
#include <ATen/ATen.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "kernels/random/random.h"
#include "peft/draws.h"
#include "peft/prompt.h"

namespace graft::peft {
namespace {

struct PromptTuningConfig {
  int num_virtual_tokens = 20;
  std::string prompt_tuning_init = "RANDOM";
  double init_range = 0;
  int sample_tokens = 0;

  void fields(configs::Fields& f) {
    f("num_virtual_tokens", num_virtual_tokens, f.range(1, 65536), "rows of the prompt");
    f("prompt_tuning_init", prompt_tuning_init, f.one_of({"RANDOM", "SAMPLE_VOCAB"}),
      "N(0, 1), or the embeddings of tokens drawn from the vocabulary");
    f("init_range", init_range, f.at_least(0).at_most(1e3),
      "with RANDOM: uniform within this; 0: N(0, 1)");
    f("sample_tokens", sample_tokens, f.at_least(0),
      "with SAMPLE_VOCAB: only the first so many tokens; 0: all");
  }
  static PeftForm peft_form() {
    return {.type = "PROMPT_TUNING",
            .inert = {"prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
            .ours = {"init_range", "sample_tokens"}};
  }
};

class PromptTuning : public Method {
 public:
  void fields(configs::Fields& f) override { config_.fields(f); }
  bool starts_as_base() const override { return false; }
  void attach(AttachContext& context) override {
    base_ = PromptBase::of(context);
    random_ = site_key(context, "input");
    embed_ = context.slots.find_linear("embed");
    rows_ = std::make_shared<PromptRows>(
        PromptRows::Shape{config_.num_virtual_tokens, {context.info.hidden_size}}, random_,
        context.device);
    if (config_.init_range > 0) {
      const at::NoGradGuard no_grad;
      const Tensor& table = rows_->table();
      table.copy_(draw_uniform(table.sizes(), config_.init_range, random_, context.device));
    }
    attach_prompt(context, rows_);
  }
  void initialize(BaseWeights& base) override {
    if (config_.prompt_tuning_init != "SAMPLE_VOCAB") return;
    const at::NoGradGuard no_grad;
    const Tensor embedding = base.weight(*embed_);
    const Tensor u = at::empty({rows_->count()}, at::kFloat);
    kernels::uniform(u, random_);
    const int64_t most = config_.sample_tokens > 0
                             ? std::min<int64_t>(config_.sample_tokens, embedding.size(0))
                             : embedding.size(0);
    const Tensor ids = (u.to(at::kDouble) * most).to(at::kLong);
    rows_->table().copy_(embedding.index_select(0, ids.to(embedding.device())));
  }

  std::string peft_type() const override { return PromptTuningConfig::peft_form().type; }
  nlohmann::json to_peft_config(const SlotMap&) const override {
    return write_prompt_form(PromptTuningConfig::peft_form(), configs::describe(config_), base_);
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    SavedAdapter saved = adapter;  // how the prompt began is past
    if (saved.config.value("prompt_tuning_init", nlohmann::ordered_json()) == "TEXT")
      saved.config["prompt_tuning_init"] = "RANDOM";
    read_prompt_form(PromptTuningConfig::peft_form(), saved,
                     [&](configs::Fields& f) { config_.fields(f); });
  }

 private:
  PromptTuningConfig config_;
  PromptBase base_;
  kernels::Key random_{};
  const LinearSite* embed_ = nullptr;
  std::shared_ptr<PromptRows> rows_;
};

}  // namespace

void register_prompt_tuning(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<PromptTuning>(); }});
}

}  // namespace graft::peft
