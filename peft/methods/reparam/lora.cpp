// LoRA: y = W x + s B A x, s = alpha / r.              Hu et al. 2021, arXiv:2106.09685, eq. 3
// rsLoRA: s = alpha / sqrt(r).                         Kalajdzievski 2023, arXiv:2312.03732
// LoRA+: B learns loraplus_lr_ratio times faster.      Hayou et al. 2024, arXiv:2402.12354
// LoRA-FA: A stays; dL/dB (A A^T + 1e-8)^-1 / s^2 as in PEFT, or plain.    arXiv:2308.03303
// PiSSA, OLoRA, LoftQ, EVA, CorDA, LoRA-GA, MiCA: other first values of A and B (lora_start.h).
// Trains A [r, in] (Kaiming-uniform, a = sqrt 5) and B [out, r] (zeros): the model is unchanged at
// step 0; with lora_bias a vector [out] beside B (zeros). On an embedding A [r, V] is zero and B
// [D, r] normal. Mergeable without lora_bias. Fields and files are those of HF PEFT's LoraConfig;
// what PEFT keeps in its optimisers (LoRA+, LoRA-FA) stands in the metadata of the tensors. LoftQ
// fits s B A to what quantising loses, PEFT B A, which is right for alpha = r alone.
#include <ATen/ATen.h>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/lora_method.h"
#include "peft/token_rows.h"

namespace graft::peft {
namespace {

struct LoraConfig : LoraStartFields {
  bool lora_bias = false;
  double loraplus_lr_embedding = 1e-6;
  bool lora_fa = false;
  std::vector<int> trainable_token_indices;
  std::string lora_fa_gradient = "projected";

  void fields(configs::Fields& f) {
    LoraStartFields::fields(f);
    f("loraplus_lr_embedding", loraplus_lr_embedding, f.positive(),
      "LoRA+: the peak learning rate of an embedding's A and B; with ratio 1 the run's");
    f("lora_bias", lora_bias, "train a bias beside B");
    f("trainable_token_indices", trainable_token_indices, f.at_least(0),
      "tokens whose rows of the embedding are trained whole beside the rest");
    f("lora_fa", lora_fa, "LoRA-FA: train B only, which saves the memory of A's gradient");
    f("lora_fa_gradient", lora_fa_gradient, f.one_of({"projected", "plain"}),
      "of B: projected to what W's own gradient would do, or as it is");
    f.require(!lora_fa || !(takes_from_base() || is_start("mica")), "lora_fa",
              "needs an A that is not trained, and this init_lora_weights one that is");
  }
};

class LoraLinear : public models::LinearAdapter {
 public:
  LoraLinear(const LoraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : dropout_(c.lora_dropout), random_(random) {
    auto [a, b] = c.start(site, random, device);
    pair_.a = c.lora_fa ? register_buffer("lora_a", a) : register_parameter("lora_a", a);
    pair_.b = c.is_start("mica") ? register_buffer("lora_b", b) : register_parameter("lora_b", b);
    pair_.scale = c.scale(site);
    if (!c.lora_bias) return;
    const double bound = c.init_lora_weights == "false" ? 1 / std::sqrt(c.rank(site)) : 0;
    bias_ = register_parameter(
        "lora_bias", draw_uniform({site.info.out}, bound, kernels::derive(random, 3), device));
  }
  static std::vector<Leaf> leaves() {  // of both classes: a module of either is a target
    return {{"lora_a", "lora_A.weight"},
            {"lora_b", "lora_B.weight"},
            {"lora_bias", "lora_B.bias"},
            {"lora_embedding_a", "lora_embedding_A"},
            {"lora_embedding_b", "lora_embedding_B"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const Tensor y = kernels::lowrank_add(base(x), dropout(x, dropout_, pass, random_),
                                          pair_.whole_a(), pair_.whole_b(), pair_.scale);
    return bias_.defined() ? y + (pair_.scale * bias_).to(y.scalar_type()) : y;
  }
  bool mergeable() const override { return !bias_.defined(); }
  Tensor merged(const Tensor& w) const override {
    return w + (pair_.scale * pair_.whole_b().mm(pair_.whole_a())).to(w.scalar_type());
  }
  std::optional<models::LowRank> low_rank() const override {
    if (bias_.defined() || pair_.taken_a.defined()) return std::nullopt;
    return models::LowRank{pair_.a, pair_.b, pair_.scale};
  }
  LoraPair& pair() { return pair_; }

  /// LoRA-FA: A never changes, so neither does what the gradient of B is multiplied by.
  void project_gradient() {
    const Tensor& a = pair_.a;
    if (a.numel() == 0) return;
    if (!projection_.defined()) {
      const Tensor square = a.mm(a.t()) + 1e-8 * at::eye(a.size(0), a.options());
      projection_ = at::linalg_pinv(square) / (pair_.scale * pair_.scale);
    }
    pair_.b.grad().copy_(pair_.b.grad().mm(projection_));
  }

 private:
  double dropout_;
  kernels::Key random_;
  LoraPair pair_;
  Tensor bias_, projection_;
};

/// PEFT ignores lora_dropout on embeddings; so do we.
class LoraEmbedding : public models::LinearAdapter {
 public:
  LoraEmbedding(const LoraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : scale_(c.scale(site)) {
    GRAFT_CHECK(!c.lora_bias && !c.lora_fa, "lora: ", site.name, " is an embedding: it has no ",
                c.lora_bias ? "lora_bias" : "lora_fa, its A starts at zero");
    const int64_t r = c.rank(site);
    const Tensor b = draw_normal({site.info.out, r}, 1, random, device);
    a_ = register_parameter(
        "lora_embedding_a",
        c.init_lora_weights == "false"
            ? draw_normal({r, site.info.in}, 1, kernels::derive(random, 1), device)
            : at::zeros({r, site.info.in}, b.options()));
    b_ = register_parameter("lora_embedding_b", b);
  }
  Tensor forward(const Tensor& ids, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(ids);
    return y + (at::embedding(a_.t(), ids).matmul(b_.t()) * scale_).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (scale_ * a_.t().mm(b_.t())).to(w.scalar_type());
  }

 private:
  double scale_;
  Tensor a_, b_;
};

class Lora : public LoraMethod<LoraConfig, LoraLinear> {
 public:
  void attach(AttachContext& context) override {
    LoraMethod::attach(context);
    if (config_.trainable_token_indices.empty()) return;
    tokens_ = make_token_rows(config_.trainable_token_indices);
    tokens_->attach(context);
  }
  void initialize(BaseWeights& base) override {
    LoraMethod::initialize(base);
    if (tokens_ != nullptr) tokens_->initialize(base);
  }
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    return with_token_rows(LoraMethod::to_peft_config(slots));
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    LoraMethod::from_peft_config(of_token_rows(adapter));
  }
  void after_reduce(const StepInfo&) override {
    if (!config_.lora_fa || config_.lora_fa_gradient == "plain") return;
    const at::NoGradGuard no_grad;
    for (const auto& adapter : adapters_) adapter->project_gradient();
  }

 protected:
  void attach_to(AttachContext& context, const LinearSite& site) override {
    if (site.info.kind != models::LinearKind::kEmbedding)
      return LoraMethod::attach_to(context, site);
    config_.check_start(site);
    GRAFT_CHECK(config_.trainable_token_indices.empty(), "lora: ", site.name,
                " has a LoRA, and trainable_token_indices would train its rows; as in PEFT only one"
                " of them is possible");
    attach_linear(
        context, site,
        std::make_shared<LoraEmbedding>(config_, site, site_key(context, site), context.device),
        LoraLinear::leaves());
    if (config_.loraplus_lr_ratio == 1) return;
    for (const char* leaf : {".lora_embedding_a", ".lora_embedding_b"})
      context.params.set_learning_rate(context.prefix + site.name + leaf,
                                       config_.loraplus_lr_embedding);
  }

 private:
  std::unique_ptr<Method> tokens_;
};

}  // namespace

void register_lora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Lora>(); }});
}

}  // namespace graft::peft
