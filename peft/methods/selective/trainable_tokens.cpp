// Trainable tokens: of the embedding only the rows of some tokens are trained, such as those of
// words that the base does not know.                      HF PEFT 0.21.2, TrainableTokensConfig
// Trains and saves the whole new rows [tokens, width]; they begin as the base's, so the model is
// unchanged at step 0. A head that is tied to the embedding uses the same rows, and PEFT writes
// them once more for it (not beside a LoRA). Mergeable. Fields and files are those of HF PEFT's
// TrainableTokensConfig.
#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <set>

#include "configs/check.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/projection.h"
#include "peft/token_rows.h"

namespace graft::peft {
namespace {

struct TrainableTokensConfig {
  Targets targets{.modules = {"embed"}};
  std::vector<int> token_indices;
  bool init_weights = true;
  Tensor rows, frozen;  ///< no fields: the embedding's, for a head that is tied to it

  void fields(configs::Fields& f) {
    f("token_indices", token_indices, f.at_least(0), "the tokens, by number");
    f("init_weights", init_weights, "false: rows start from N(0, 1), not as the base's");
  }
  static PeftForm peft_form() { return {.type = "TRAINABLE_TOKENS"}; }
  bool starts_as_base() const { return init_weights; }
};

class TrainableTokensTable : public models::LinearAdapter {
 public:
  static constexpr bool kAdaptsEmbeddings = true;

  TrainableTokensTable(const TrainableTokensConfig& c, const LinearSite& site, kernels::Key random,
                       at::Device device)
      : is_embedding_(site.info.kind == models::LinearKind::kEmbedding) {
    GRAFT_CHECK(site.layer < 0, "peft: trainable_tokens: ", site.name,
                " has no rows of tokens; embed and head have");
    GRAFT_CHECK(!c.token_indices.empty(), "peft: trainable_tokens: token_indices is empty");
    const int64_t vocabulary = is_embedding_ ? site.info.in : site.info.out;
    std::set<int> seen;
    for (const int token : c.token_indices) {
      GRAFT_CHECK(token < vocabulary, "peft: trainable_tokens: token_indices: ", token, ", ",
                  site.name, " has tokens 0 to ", vocabulary - 1);
      GRAFT_CHECK(seen.insert(token).second, "peft: trainable_tokens: token_indices: ", token,
                  " stands there twice");
    }
    const int64_t n = static_cast<int64_t>(seen.size());
    tokens_ = at::tensor(c.token_indices, at::kLong).to(device);
    places_ = at::full({vocabulary}, n, tokens_.options());
    places_.index_copy_(0, tokens_, at::arange(n, tokens_.options()));
    const int64_t width = is_embedding_ ? site.info.out : site.info.in;
    rows_ = register_parameter(
        "rows", c.rows.defined() ? c.rows : draw_normal({n, width}, 1, random, device));
    frozen_ = c.frozen.defined() ? c.frozen : at::zeros({n, width}, rows_.options());
  }
  static std::vector<Leaf> leaves() { return {{"rows", "trainable_tokens_delta"}}; }
  void initialize(const TrainableTokensConfig& c, const LinearSite& site, BaseWeights& base) {
    frozen_.copy_(base.weight(site).to(frozen_.device()).index_select(0, tokens_));
    if (c.init_weights) rows_.copy_(frozen_);
  }
  const Tensor& rows() const { return rows_; }
  const Tensor& frozen() const { return frozen_; }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x);
    if (!is_embedding_) {  // a difference of rows, so that no difference is exactly the base's
      const Tensor change = at::linear(x, (rows_ - frozen_).to(x.scalar_type()));
      return y.index_add(-1, tokens_, change.to(y.scalar_type()));
    }
    const Tensor place = places_.index_select(0, x.flatten()).view(x.sizes());
    const Tensor others = at::zeros({1, rows_.size(1)}, rows_.options());
    const Tensor mine = at::embedding(at::cat({rows_, others}), place);
    return at::where(place.lt(tokens_.size(0)).unsqueeze(-1), mine.to(y.scalar_type()), y);
  }
  bool mergeable() const override { return true; }
  bool replaces() const override { return true; }  // its rows
  Tensor merged(const Tensor& w) const override {
    return w.index_copy(0, tokens_, rows_.to(w.scalar_type()));
  }

 private:
  bool is_embedding_;
  Tensor tokens_, places_;  ///< [n]; [V]: where a token's row is, n if it is the base's
  Tensor rows_, frozen_;
};

class TrainableTokens : public LinearMethod<TrainableTokensConfig, TrainableTokensTable> {
 public:
  TrainableTokens() = default;
  /// @param place  between the module and the tensor in keys of files
  TrainableTokens(const std::vector<int>& tokens, std::string place) : place_(std::move(place)) {
    config_.token_indices = tokens;
  }
  void fields(configs::Fields& f) override {  // PEFT's has no modules_to_save
    config_.targets.fields(f);
    config_.fields(f);
  }
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    nlohmann::json config = LinearMethod::to_peft_config(slots);
    config.erase("modules_to_save");
    return config;
  }

 protected:
  void attach_to(AttachContext& context, const LinearSite& site) override {
    if (config_.rows.defined() && site.role == "head") {  // has the embedding's
      adapters_.push_back(tied_head_);
      return;
    }
    const auto push = [&](const LinearSite& to) {
      auto table = std::make_shared<TrainableTokensTable>(config_, to, site_key(context, to),
                                                          context.device);
      to.slot->push(table);
      return table;
    };
    const auto key = [&](const LinearSite& of) {
      return "base_model.model." + of.hf_path + "." + place_ + "trainable_tokens_delta";
    };
    adapters_.push_back(push(site));
    const Tensor& rows = adapters_.back()->rows();
    std::vector<const LinearSite*> users = {&site};
    if (context.info.tied_head && site.role == "embed") {
      users.push_back(context.slots.find_linear("head"));
      config_.rows = rows, config_.frozen = adapters_.back()->frozen();
      tied_head_ = push(*users.back());
      context.params.add(Constant{.name = context.prefix + "head.rows",
                                  .hf_key = key(*users.back()),
                                  .value = rows.detach(),
                                  .may_be_left_out = true,
                                  .is_saved = place_.empty()});
    }
    add_shared(context, site.name + ".rows", key(site), rows, users);
  }

 private:
  std::string place_;
  std::shared_ptr<TrainableTokensTable> tied_head_;
};

}  // namespace

std::unique_ptr<Method> make_token_rows(const std::vector<int>& tokens) {
  return std::make_unique<TrainableTokens>(tokens, "token_adapter.");
}

void register_trainable_tokens(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<TrainableTokens>(); }});
}

}  // namespace graft::peft
