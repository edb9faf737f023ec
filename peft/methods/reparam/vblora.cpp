// VB-LoRA: y = W x + b + B A x, with A and B put together from the vectors of one bank: each piece
// of them is sum_k softmax(top k of its logits)_k bank[k].
//                                                   Li et al. 2024, arXiv:2405.15179
// Trains the bank [num_vectors, vector_length], one for all slots (uniform within
// init_vector_bank_bound), and of each slot vblora_logits_A [r, in / length, num_vectors] and
// vblora_logits_B [out / length, r, num_vectors] (normal): no start at the base. Mergeable. Fields
// and files are those of HF PEFT's VBLoRAConfig; files of its save_only_topk_weights, which cannot
// be trained further, are refused.
#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <numeric>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/projection.h"

namespace graft::peft {
namespace {

struct VbloraConfig {
  Targets targets;
  int r = 4;
  int num_vectors = 256;
  int vector_length = 256;
  int topk = 2;
  double vblora_dropout = 0;
  double init_vector_bank_bound = 0.02;
  double init_logits_std = 0.1;
  Tensor bank;  ///< no field: what the slots share

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank, the inner size");
    f("num_vectors", num_vectors, f.range(1, 1048576), "vectors in the bank");
    f("vector_length", vector_length, f.range(1, 65536), "divides inputs and outputs of the slots");
    f("topk", topk, f.range(1, 1024), "vectors that a piece is mixed of");
    f("vblora_dropout", vblora_dropout, f.at_least(0).below(1), "on the adapter's input");
    f("init_vector_bank_bound", init_vector_bank_bound, f.positive(), "of the bank's first values");
    f("init_logits_std", init_logits_std, f.positive(), "of the logits' first values");
  }
  int rank(const LinearSite&) const { return r; }
  static PeftForm peft_form() {
    return {
        .type = "VBLORA", .bias_only = "vblora_only", .fixed = {{"save_only_topk_weights", false}}};
  }
  bool starts_as_base() const { return false; }
};

class VbloraLinear : public models::LinearAdapter {
 public:
  VbloraLinear(const VbloraConfig& c, const LinearSite& site, kernels::Key random,
               at::Device device)
      : topk_(c.topk), dropout_(c.vblora_dropout), random_(random), bank_(c.bank) {
    const int64_t length = c.vector_length, in = site.info.in, out = site.info.out;
    GRAFT_CHECK(in % length == 0 && out % length == 0, "peft: vblora: ", site.name, " has ", in,
                " inputs and ", out, " outputs; vector_length = ", length,
                " does not divide both; take one of ", divisors_of(std::gcd(in, out)));
    const double deviation = c.init_logits_std;
    a_ = register_parameter("logits_a", draw_normal({c.r, in / length, c.num_vectors}, deviation,
                                                    kernels::derive(random, 0), device));
    b_ = register_parameter("logits_b", draw_normal({out / length, c.r, c.num_vectors}, deviation,
                                                    kernels::derive(random, 1), device));
  }
  static std::vector<Leaf> leaves() {
    return {{"logits_a", "vblora_logits_A"}, {"logits_b", "vblora_logits_B"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    return kernels::lowrank_add(base(x), dropout(x, dropout_, pass, random_), a(), b(), 1);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override { return w + b().mm(a()).to(w.scalar_type()); }

 private:
  /// [..., num_vectors] -> [..., vector_length]
  Tensor mixed(const Tensor& logits) const {
    const auto [top, places] = logits.topk(topk_, -1);
    return (top.softmax(-1).unsqueeze(-1) * at::embedding(bank_, places)).sum(-2);
  }
  Tensor a() const { return mixed(a_).flatten(1); }
  Tensor b() const { return mixed(b_).transpose(1, 2).flatten(0, 1); }

  int64_t topk_;
  double dropout_;
  kernels::Key random_;
  Tensor bank_, a_, b_;
};

class Vblora : public LinearMethod<VbloraConfig, VbloraLinear> {
 public:
  void from_peft_config(const SavedAdapter& adapter) override {
    GRAFT_CHECK(adapter.config.value("save_only_topk_weights", nlohmann::ordered_json()) != true,
                ExitCode::kData, "adapter_config.json: save_only_topk_weights = true: the file",
                " holds weights of the mixtures and no logits, which is not supported");
    LinearMethod::from_peft_config(adapter);
  }

 protected:
  void attach_to(AttachContext& context, const LinearSite& site) override {
    GRAFT_CHECK(config_.topk <= config_.num_vectors, "peft: vblora: topk = ", config_.topk,
                " vectors of num_vectors = ", config_.num_vectors);
    const bool is_first = !config_.bank.defined();
    const std::string name = "vblora_vector_bank";
    if (is_first) {
      const auto key = kernels::derive(context.random, 0);
      config_.bank = draw_uniform({config_.num_vectors, config_.vector_length},
                                  config_.init_vector_bank_bound, key, context.device);
      add_shared(context, name, "base_model." + name, config_.bank, sites_);
    }
    LinearMethod::attach_to(context, site);
    if (is_first) adapters_.back()->register_parameter(name, config_.bank);
  }
};

}  // namespace

void register_vblora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Vblora>(); }});
}

}  // namespace graft::peft
