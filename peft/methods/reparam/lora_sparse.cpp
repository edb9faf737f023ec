// LoRA-Sparse: each query attends to its top_k keys alone, chosen by S = (P_q x) . (P_k x), a
// low-rank estimate of the scores.
//   Song et al. 2024, "Low-Rank Approximation for Sparse Attention in Multi-Modal LLMs", CVPR 2024
// Trains P_q [H, r, D] and P_k [key heads, r, D] of each layer; the attention itself is frozen, or
// trained by a method beside this one. The choice has no gradient: what is learnt from is the order
// of the true scores, mimic_weight times KL(softmax(q k / sqrt K) || softmax(S)) added to the loss,
// the mean over heads summed over layers and positions, with neither x nor the true scores moved by
// it. svd: S starts as the best estimate of rank r by the matrices alone, x W_q W_k x / sqrt(K);
// normal: deviation 1 / sqrt(D). With top_k keys or fewer in sight the model is the base's, beyond
// it is not. Not mergeable.
// The paper's loss, r and share of keys could not be read anywhere, and there is no code; the loss
// and svd are ours. All scores are still computed here, as the attention weights of a unit matrix
// of values: that shows what the choice costs in accuracy, and saves nothing yet.
#include <ATen/ATen.h>

#include <cmath>

#include "configs/check.h"
#include "peft/attach.h"
#include "peft/draws.h"
#include "peft/layer_loss.h"
#include "peft/peft_config.h"
#include "peft/peft_form.h"

namespace graft::peft {
namespace {

struct LoraSparseConfig {
  int r = 8, top_k = 256;
  double mimic_weight = 1;
  std::string init_weights = "svd";

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank of the estimate, of each head");
    f("top_k", top_k, f.at_least(1), "keys that a query attends to");
    f("mimic_weight", mimic_weight, f.at_least(0).at_most(1e30),
      "how much the estimate is to order keys as the scores do");
    f("init_weights", init_weights, f.one_of({"svd", "normal"}), "how the projections start");
  }
};

Tensor lora_sparse_repeat(const Tensor& t, int64_t heads) {
  return t.repeat_interleave(heads / t.size(1), 1);
}

class LoraSparseCore : public models::AttentionAdapter {
 public:
  LoraSparseCore(const LoraSparseConfig& c, std::shared_ptr<LayerLoss> loss, const LinearSite& q,
                 const LinearSite& k, const AttachContext& context)
      : config_(c), loss_(std::move(loss)) {
    const auto draw = [&](const LinearSite& site) {
      const int64_t width = site.info.in;
      return draw_normal({site.info.out / context.info.head_dim, c.r, width},
                         1 / std::sqrt(static_cast<double>(width)), site_key(context, site),
                         context.device);
    };
    q_ = register_parameter("q", draw(q));
    k_ = register_parameter("k", draw(k));
  }
  Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Core& core,
                 const models::Pass& pass) override {
    const Tensor x = std::exchange(x_, {}).detach().unsqueeze(1);  // [B, 1, L, D]
    Tensor keys = x.matmul(k_.to(x.scalar_type()).transpose(1, 2));
    if (pass.cache != nullptr)
      keys = seen_ = pass.cache->length == 0 ? keys : at::cat({seen_, keys}, 2);
    GRAFT_CHECK(keys.size(2) == k.size(2), "lora_sparse: ", k.size(2) - keys.size(2),
                " keys of another method have no estimate; the two cannot be stacked");
    const bool chooses = config_.top_k < k.size(2), learns = loss_->is_wanted(pass);
    if (!chooses && !learns) return core(q, k, v);

    const Tensor unit = at::eye(k.size(2), v.options()).expand({v.size(0), v.size(1), -1, -1});
    const Tensor weights = core(q, k, unit);  // [B, H, L, L'], zero for keys out of sight
    const Tensor queries = x.matmul(q_.to(x.scalar_type()).transpose(1, 2));
    const Tensor estimate = queries.matmul(lora_sparse_repeat(keys, q.size(1)).transpose(2, 3))
                                .to(at::kFloat)
                                .masked_fill(weights.le(0), -1e30);
    if (learns) loss_->add(divergence(weights.detach().to(at::kFloat), estimate));
    if (!chooses) return core(q, k, v);
    const Tensor best = std::get<1>(estimate.detach().topk(config_.top_k, -1));
    const Tensor kept = weights * at::zeros_like(weights).scatter(-1, best, 1);
    const Tensor sum = kept.sum(-1, true).clamp_min(1e-30);
    return (kept / sum).matmul(lora_sparse_repeat(v, q.size(1)));
  }
  /// From the dense matrices of the layer's queries and keys.
  void start_at(const Tensor& w_q, const Tensor& w_k) {
    const int64_t key_heads = k_.size(0), width = w_q.size(1), r = config_.r;
    const int64_t head_dim = w_k.size(0) / key_heads;
    const Tensor left =
        w_q.view({key_heads, -1, head_dim, width})
            .transpose(2, 3)
            .reshape({key_heads, -1, head_dim});  // [key heads, heads of each * D, K]
    const auto [left_q, left_r] = at::linalg_qr(left);
    const auto [right_q, right_r] = at::linalg_qr(w_k.view({key_heads, head_dim, width}).mT());
    const auto [u, s, v] = at::linalg_svd(left_r.matmul(right_r.mT()), false);
    const Tensor root = (s.slice(1, 0, r) / std::sqrt(static_cast<double>(head_dim))).sqrt();
    const Tensor p_q = left_q.matmul(u.slice(2, 0, r) * root.unsqueeze(1));
    q_.copy_(p_q.view({-1, width, r}).mT());
    k_.copy_(right_q.matmul(v.slice(1, 0, r).mT() * root.unsqueeze(1)).mT());
  }
  Tensor x_;  ///< [B, L, D], what the queries are made of; of the pass that is under way

 private:
  static Tensor divergence(const Tensor& truth, const Tensor& estimate) {
    const Tensor each = at::xlogy(truth, truth) - truth * estimate.log_softmax(-1);
    return each.sum() / static_cast<double>(truth.size(1));
  }

  LoraSparseConfig config_;
  std::shared_ptr<LayerLoss> loss_;
  Tensor q_, k_, seen_;  ///< the last: estimates of the keys in the cache that is under way
};

/// Leaves the input of the queries' projection with the core.
class LoraSparseInput : public models::LinearAdapter {
 public:
  explicit LoraSparseInput(std::shared_ptr<LoraSparseCore> core) : core_(std::move(core)) {}
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    core_->x_ = x;
    return base(x);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override { return w; }

 private:
  std::shared_ptr<LoraSparseCore> core_;
};

class LoraSparse : public Method {
 public:
  void fields(configs::Fields& f) override { config_.fields(f); }
  bool starts_as_base() const override { return false; }
  void attach(AttachContext& context) override {
    const auto loss = LayerLoss::attach(context, config_.mimic_weight);
    for (const auto& site : context.slots.attentions) {
      const std::string attention = site.name.substr(0, site.name.rfind('.'));
      const LinearSite* q = context.slots.find_linear(attention + ".q");
      const LinearSite* k = context.slots.find_linear(attention + ".k");
      GRAFT_CHECK(q != nullptr && k != nullptr, "lora_sparse: ", attention,
                  " has no projections of queries and keys");
      GRAFT_CHECK(config_.r <= context.info.head_dim, "lora_sparse: r = ", config_.r,
                  ", at most the width of a head, ", context.info.head_dim, ", is possible");
      layers_.push_back({q, k, std::make_shared<LoraSparseCore>(config_, loss, *q, *k, context)});
      site.slot->push(layers_.back().core);
      q->slot->push(std::make_shared<LoraSparseInput>(layers_.back().core));
      const std::string path = q->hf_path.substr(0, q->hf_path.rfind('.'));
      list_tensors(context, *layers_.back().core,
                   {site.name, "base_model.model." + path, site.stage},
                   {{"q", "lora_sparse_q.weight"}, {"k", "lora_sparse_k.weight"}});
    }
  }
  void initialize(BaseWeights& base) override {
    if (config_.init_weights != "svd") return;
    const at::NoGradGuard no_grad;
    for (const Layer& layer : layers_)
      layer.core->start_at(base.weight(*layer.q), base.weight(*layer.k));
  }
  nlohmann::json to_peft_config(const SlotMap&) const override {
    return write_peft_entries({}, configs::describe(config_));
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    PeftConfigReader config(adapter);
    read_peft_entries({}, config, nullptr, [&](configs::Fields& f) { config_.fields(f); });
  }

 private:
  struct Layer {
    const LinearSite *q, *k;
    std::shared_ptr<LoraSparseCore> core;
  };
  LoraSparseConfig config_;
  std::vector<Layer> layers_;
};

}  // namespace

void register_lora_sparse(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<LoraSparse>(); }});
}

}  // namespace graft::peft
