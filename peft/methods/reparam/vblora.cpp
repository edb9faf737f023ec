// VB-LoRA: y = W x + b + B A x, with A and B put together from the vectors of one bank: each piece
// of them is sum_k softmax(top k of its logits)_k bank[k].
//                                                   Li et al. 2024, arXiv:2405.15179
// Trains the bank [num_vectors, vector_length], one for all slots (uniform within
// init_vector_bank_bound), and of each slot vblora_logits_A [r, in / length, num_vectors] and
// vblora_logits_B [out / length, r, num_vectors] (normal): no start at the base. Mergeable. Fields
// and files are those of HF PEFT's VBLoRAConfig. A file of its save_only_topk_weights has numbers
// and shares of the k vectors for the logits: they stay as they are, and only the bank could be
// trained on.
#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <numeric>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/places.h"
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
  Tensor bank;             ///< no field: what the slots share
  bool only_topk = false;  ///< no field: save_only_topk_weights of a file

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
  at::ScalarType number_type() const {  // as PEFT writes them
    if (num_vectors < 1 << 8) return at::kByte;
    return num_vectors < 1 << 15 ? at::kShort : at::kInt;
  }
  bool starts_as_base() const { return false; }
};

/// Which vectors a factor's pieces are mixed of: by logits, or by numbers and shares of a file.
struct VbloraMixture {
  Tensor logits, shares;  ///< the last is 1 less the others'
  Places places;
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
    const auto add = [&](const std::string& side, int64_t rows, int64_t columns, int number) {
      const auto options = at::TensorOptions().device(device);
      VbloraMixture mixture;
      if (!c.only_topk) {
        const auto key = kernels::derive(random, number);
        const Tensor logits =
            draw_normal({rows, columns, c.num_vectors}, c.init_logits_std, key, device);
        mixture.logits = register_parameter("logits_" + side, logits);
        return mixture;
      }
      mixture.shares =
          register_buffer("shares_" + side, at::zeros({rows, columns, c.topk - 1}, options));
      const Tensor places = at::zeros({rows, columns, c.topk}, options.dtype(c.number_type()));
      mixture.places = {register_buffer("places_" + side, places), c.num_vectors,
                        site.name + ": topk_indices"};
      return mixture;
    };
    a_ = add("a", c.r, in / length, 0), b_ = add("b", out / length, c.r, 1);
  }
  static std::vector<Leaf> leaves() {
    return {{"logits_a", "vblora_logits_A"},
            {"logits_b", "vblora_logits_B"},
            {"shares_a", "vblora_logits_A_topk_weights"},
            {"shares_b", "vblora_logits_B_topk_weights"},
            {"places_a", "vblora_logits_A_topk_indices"},
            {"places_b", "vblora_logits_B_topk_indices"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    return kernels::lowrank_add(base(x), dropout(x, dropout_, pass, random_), a(), b(), 1);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override { return w + b().mm(a()).to(w.scalar_type()); }

 private:
  /// [..., vector_length]
  Tensor mixed(const VbloraMixture& m) const {
    Tensor shares, places;
    if (m.logits.defined()) {
      std::tie(shares, places) = m.logits.topk(topk_, -1);
      shares = shares.softmax(-1);
    } else {
      shares = at::cat({m.shares, 1 - m.shares.sum(-1, true)}, -1), places = m.places.checked();
    }
    return (shares.unsqueeze(-1) * at::embedding(bank_, places)).sum(-2);
  }
  Tensor a() const { return mixed(a_).flatten(1); }
  Tensor b() const { return mixed(b_).transpose(1, 2).flatten(0, 1); }

  int64_t topk_;
  double dropout_;
  kernels::Key random_;
  Tensor bank_;
  VbloraMixture a_, b_;
};

class Vblora : public LinearMethod<VbloraConfig, VbloraLinear> {
 public:
  void from_peft_config(const SavedAdapter& adapter) override {
    SavedAdapter other = adapter;
    auto& only_topk = other.config["save_only_topk_weights"];
    config_.only_topk = only_topk == true;
    only_topk = false;
    LinearMethod::from_peft_config(other);
  }
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    nlohmann::json config = LinearMethod::to_peft_config(slots);
    config["save_only_topk_weights"] = config_.only_topk;
    return config;
  }

 protected:
  void before_slots(AttachContext& context) override {
    GRAFT_CHECK(config_.topk <= config_.num_vectors, "peft: vblora: topk = ", config_.topk,
                " vectors of num_vectors = ", config_.num_vectors);
    const auto key = kernels::derive(context.random, 0);
    config_.bank = draw_uniform({config_.num_vectors, config_.vector_length},
                                config_.init_vector_bank_bound, key, context.device);
    add_shared(context, kBank, "base_model." + kBank, config_.bank, sites_);
  }
  void attach_to(AttachContext& context, const LinearSite& site) override {
    LinearMethod::attach_to(context, site);
    if (&site == sites_.front()) adapters_.back()->register_parameter(kBank, config_.bank);
  }

 private:
  inline static const std::string kBank = "vblora_vector_bank";
};

}  // namespace

void register_vblora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Vblora>(); }});
}

}  // namespace graft::peft
