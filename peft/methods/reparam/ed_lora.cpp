// ED-LoRA: y = W x + alpha B A x, and each block's input at a placeholder token t gets R_n[t]
// added.
//   Gu et al. 2023, "Mix-of-Show: Decentralized Low-Rank Adaptation for Multi-Concept Customization
//   of Diffusion Models", arXiv:2305.18292, sec. 3.2
// Trains A [r, in] (Kaiming-uniform, a = sqrt 5) and B [out, r] (zeros), whose scale is alpha
// itself, not alpha / r; and a row [n, D] of every placeholder for every block, token_lr_ratio
// times faster. In the paper a cross-attention layer of a diffusion model sees the text with an
// embedding of the placeholder that is its own; in a decoder each block sees its tokens through the
// stream of the blocks before it, so that the rows are added there, the first block's to the
// embedding itself. Rows start at zero, and the first block's so that the embedding is that of the
// token in token_start, or drawn with deviation 0.013 for -1 (the paper's random and class word
// halves of a concept). Without token_start the model is unchanged at step 0. The matrices are
// mergeable, the rows are not. `graft fuse` makes one LoRA of several concepts'. The paper's masks,
// noise offset and limit on the norm of rows belong to diffusion. No HF PEFT type: a LoRA of PEFT's
// with lora_alpha = alpha r computes what A and B do.
#include <ATen/ATen.h>

#include <set>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/lora_fields.h"

namespace graft::peft {
namespace {

struct EdLoraConfig {
  Targets targets{.modules = {"attn.q", "attn.k", "attn.v", "attn.o"}};
  int r = 4;
  double lora_alpha = 1, lora_dropout = 0;
  std::vector<int> token_ids, token_start;
  double token_lr_ratio = 10;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank, the inner size");
    f("lora_alpha", lora_alpha, f.positive().at_most(1e30), "the update's scale, whatever r");
    f("lora_dropout", lora_dropout, f.at_least(0).below(1), "probability, on the adapter's input");
    f("token_ids", token_ids, f.at_least(0), "placeholders: tokens with rows of their own");
    f("token_start", token_start, f.at_least(-1),
      "the token each starts as, -1: a random row; empty: as themselves");
    f("token_lr_ratio", token_lr_ratio, f.positive(),
      "the learning rate of rows over that of A and B");
    f.require(token_start.empty() || token_start.size() == token_ids.size(), "token_start",
              "one for each of token_ids, or none");
  }
  bool starts_as_base() const { return token_start.empty(); }
  int rank(const LinearSite&) const { return r; }
};

class EdLoraLinear : public models::LinearAdapter {
 public:
  EdLoraLinear(const EdLoraConfig& c, const LinearSite& site, kernels::Key random,
               at::Device device)
      : scale_(c.lora_alpha), dropout_(c.lora_dropout), random_(random) {
    LoraFields lora;
    lora.r = c.r;
    const auto [a, b] = lora.start(site, random, device);
    a_ = register_parameter("lora_a", a);
    b_ = register_parameter("lora_b", b);
  }
  static std::vector<Leaf> leaves() {
    return {{"lora_a", "lora_A.weight"}, {"lora_b", "lora_B.weight"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    return kernels::lowrank_add(base(x), dropout(x, dropout_, pass, random_), a_, b_, scale_);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (scale_ * b_.mm(a_)).to(w.scalar_type());
  }

 private:
  double scale_, dropout_;
  kernels::Key random_;
  Tensor a_, b_;
};

/// Before a block: the rows of its placeholders.
class EdLoraTokens : public models::SequenceAdapter {
 public:
  EdLoraTokens(const std::vector<int>& ids, int64_t width, at::Device device)
      : ids_(at::tensor(ids).to(device, at::kLong)),
        rows_(register_parameter(
            "token_rows", at::zeros({ids_.numel(), width}, at::TensorOptions().device(device)))) {}
  models::Carry edit(models::Carry carry, const models::Pass& pass) override {
    const Tensor& h = carry.h();
    const Tensor is_BTn = pass.batch->tokens_BL.unsqueeze(-1).eq(ids_).to(h.scalar_type());
    const Tensor added_BTD = is_BTn.matmul(rows_.to(h.scalar_type()));
    const Tensor& places = carry.sequence->token_places_BT;
    if (!places.defined()) return carry.with(h + added_BTD);
    return carry.with(h.scatter_add(1, places.unsqueeze(-1).expand_as(added_BTD), added_BTD));
  }
  const Tensor& rows() const { return rows_; }

 private:
  Tensor ids_, rows_;
};

class EdLora : public LinearMethod<EdLoraConfig, EdLoraLinear> {
 public:
  void attach(AttachContext& context) override {
    LinearMethod::attach(context);
    embed_ = context.slots.find_linear("embed");
    random_ = site_key(context, "token_rows");
    for (const auto* ids : {&config_.token_ids, &config_.token_start}) {
      for (const int id : *ids)
        GRAFT_CHECK(id < context.info.vocab_size, "ed_lora: token ", id,
                    ", the vocabulary of this model has ", context.info.vocab_size);
    }
    const std::set<int> different(config_.token_ids.begin(), config_.token_ids.end());
    GRAFT_CHECK(different.size() == config_.token_ids.size(),
                "ed_lora: token_ids names a token twice; each has one row");
    if (config_.token_ids.empty()) return;
    for (const auto& site : context.slots.sequences) {
      if (!site.name.starts_with("block.")) continue;
      const auto tokens = std::make_shared<EdLoraTokens>(config_.token_ids,
                                                         context.info.hidden_size, context.device);
      site.slot->push(tokens);
      list_tensors(context, *tokens, {site.name, site.name, site.stage}, {},
                   [&](std::string_view) { return config_.token_lr_ratio; });
      if (!first_) first_ = tokens;
    }
    GRAFT_CHECK(first_ && embed_ != nullptr,
                "ed_lora: token_ids: this model has no blocks of tokens");
  }
  void initialize(BaseWeights& base) override {
    LinearMethod::initialize(base);
    if (config_.token_start.empty()) return;
    const at::NoGradGuard no_grad;
    const Tensor table = base.weight(*embed_), rows = first_->rows();
    for (size_t i = 0; i < config_.token_ids.size(); ++i) {
      const int start = config_.token_start[i];
      const Tensor to = start >= 0 ? table[start]
                                   : draw_normal({table.size(1)}, 0.013,
                                                 kernels::derive(random_, i), table.device());
      rows[static_cast<int64_t>(i)].copy_(to - table[config_.token_ids[i]]);
    }
  }

 private:
  const LinearSite* embed_ = nullptr;
  kernels::Key random_{};
  std::shared_ptr<EdLoraTokens> first_;  ///< of the first block
};

}  // namespace

void register_ed_lora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<EdLora>(); }});
}

}  // namespace graft::peft
