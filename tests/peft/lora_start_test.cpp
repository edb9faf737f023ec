// LoRA's first values that come from matrices or data: against HF PEFT's, what their papers claim,
// and what is saved. tests/oracle/lora_starts.py writes GRAFT_ORACLE_DIR/lora_starts.
#include "peft/lora_start.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdlib>

#include "peft/adapter_file.h"
#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

using models::io::SafetensorsFile;

std::string oracle_root() {
  const char* root = std::getenv("GRAFT_ORACLE_DIR");
  return root == nullptr ? "" : root;
}

std::vector<std::string> start_names() {
  const std::filesystem::path root = oracle_root() + "/lora_starts";
  std::vector<std::string> names;
  if (!oracle_root().empty() && std::filesystem::exists(root)) {
    for (const auto& entry : std::filesystem::directory_iterator(root)) {
      if (entry.path().extension() == ".json") names.push_back(entry.path().stem().string());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

double largest(const Tensor& t) { return t.numel() == 0 ? 0 : t.abs().max().item<double>(); }

models::LoadOptions dense() {
  models::LoadOptions options;
  options.quantization = models::Quantization::kNone;
  return options;
}

models::LoadOptions nf4() {
  models::LoadOptions options;
  options.double_quantization = false;
  return options;
}

std::shared_ptr<Method> method_with(const std::string& name, const std::string& options) {
  std::shared_ptr<Method> method = methods().make(name);
  read_fields(*method, options);
  return method;
}

// --- against PEFT

class LoraStartPeftOracle : public testing::TestWithParam<std::string> {
 protected:
  static constexpr double kOfVectors = 2e-3;  ///< singular vectors turn by rounding over a gap
  static constexpr double kTolerance = 1e-4;

  LoraStartPeftOracle() {
    nlohmann::json fields = nlohmann::json::parse(
        std::ifstream(oracle_root() + "/lora_starts/" + GetParam() + ".json"));
    ranks = fields["decided_ranks"], alphas = fields["decided_alphas"];
    const bool dora = fields.contains("use_dora");
    for (const char* key : {"decided_ranks", "decided_alphas", "use_dora"}) fields.erase(key);
    init = fields["init_lora_weights"], rank = fields["r"];
    tiny.attach(dora ? "dora" : "lora", method_with(dora ? "dora" : "lora", fields.dump()));
    const data::Batch both = batch();
    tiny.first_rows = {{both, 0}};
    if (init == "eva") tiny.first_rows.push_back({both, 1});  // PEFT's sees it until it stops
    if (init == "corda") {                                    // PEFT's takes a row at a time
      tiny.first_rows.clear();
      for (int64_t i = 0; i < 2; ++i) {
        data::Batch one = both;
        for (Tensor* t : {&one.tokens_BL, &one.positions_BL, &one.documents_BL, &one.labels_BL})
          *t = t->slice(0, i, i + 1);
        tiny.first_rows.push_back({one, i});
      }
    }
    tiny.load(init == "loftq" ? nf4() : dense(), nullptr,
              [this](const std::string& name, Tensor w) {
                weights[name] = w;
                return w;
              });
  }
  static data::Batch batch() {
    const SafetensorsFile file(oracle_root() + "/qwen2/oracle.safetensors");
    return make_batch(file.read("input_ids"), file.read("labels"));
  }
  /// +1 or -1 for each rank of a slot's A, then of its B: singular vectors have no sign of their
  /// own. Only LoRA-GA takes A and B from different ones.
  using Signs = std::map<std::string, std::array<Tensor, 2>>;
  Signs signs() const {
    Signs found;
    for (const auto& [key, ours] : values()) {
      if (oracle.find("start." + key) == nullptr || key.ends_with("vector")) continue;
      const bool is_a = key.ends_with("lora_A.weight");
      const Tensor both = ours * oracle.read("start." + key);
      const Tensor sign = both.sum(is_a ? 1 : 0).sign();
      const std::string slot = key.substr(0, key.rfind(".lora_"));
      if (init == "lora_ga") {
        found[slot][is_a ? 0 : 1] = sign;
      } else if (!found.contains(slot) || is_a == (init != "mica")) {
        found[slot] = {sign, sign};
      }
    }
    return found;
  }
  std::map<std::string, Tensor> values() const {
    std::map<std::string, Tensor> all;
    for (const Param& p : tiny.params()) all[p.hf_key] = p.value.detach();
    for (const Constant& c : tiny.adapters.params().constants()) all[c.hf_key] = c.value;
    return all;
  }
  /// Rows of A and columns of B in PEFT's signs.
  enum class Of { kValues, kGradients };  ///< A's gradient has the signs of B, and B's of A
  static Tensor with_signs(const std::string& key, const Tensor& t, const Signs& signs,
                           Of of = Of::kValues) {
    const std::string slot = key.substr(0, key.rfind(".lora_"));
    const size_t a = of == Of::kValues ? 0 : 1;
    if (key.ends_with("lora_A.weight")) return t * signs.at(slot)[a].unsqueeze(1);
    return key.ends_with("lora_B.weight") ? t * signs.at(slot)[1 - a] : t;
  }
  /// What PEFT's base would be with A and B in our signs.
  Tensor base_in_our_signs(const std::string& module, const Tensor& w, const Tensor& base) const {
    const std::string slot = "base_model.model." + module;
    const auto [of_a, of_b] = signs().at(slot);
    const Tensor a = oracle.read("start." + slot + ".lora_A.weight");
    const Tensor b = oracle.read("start." + slot + ".lora_B.weight");
    const Tensor scale = (w - base).norm() / b.mm(a).norm();
    EXPECT_LE(largest(w - base - scale * b.mm(a)), kTolerance * largest(w)) << module;
    return w - scale * (b * (of_a * of_b)).mm(a);
  }

  SafetensorsFile oracle{oracle_root() + "/lora_starts/" + GetParam() + ".safetensors"};
  std::map<std::string, Tensor> weights;  ///< of the plain base
  nlohmann::json ranks, alphas;
  std::string init;
  int rank = 0;  ///< of the slots that nothing else is said of
  Tiny tiny{models::read_base_config(oracle_root() + "/qwen2/model")};
};

TEST_P(LoraStartPeftOracle, StartsWherePeftDoes) {
  const auto sign = signs();
  int compared = 0;
  for (const auto& [key, ours] : values()) {
    if (ours.numel() == 0) {
      EXPECT_EQ(oracle.find("start." + key), nullptr) << key;
      continue;
    }
    const Tensor theirs = oracle.read("start." + key);
    ASSERT_EQ(ours.sizes(), theirs.sizes()) << key;
    EXPECT_LE(largest(with_signs(key, ours, sign) - theirs), kOfVectors * largest(theirs)) << key;
    ++compared;
  }
  EXPECT_GE(compared, 8);
}

TEST_P(LoraStartPeftOracle, TheBaseGivesUpWhatItDoesInPeft) {
  int compared = 0;
  for (const auto& [name, w] : weights) {
    const auto* entry = oracle.find("base." + name);
    if (entry == nullptr || init == "loftq") continue;
    const LinearSite* site = nullptr;
    for (const LinearSite& s : tiny.adapters.slots().linears) {
      if (s.hf_path + ".weight" == name) site = &s;
    }
    ASSERT_NE(site, nullptr) << name;
    const Tensor ours = tiny.adapters.prepare_weight(site->name + ".weight", w);
    Tensor theirs = oracle.read(entry->name);
    if (init == "lora_ga") theirs = base_in_our_signs(site->hf_path, w, theirs);
    const double solved = init == "corda" ? 2 : 1;  // through the inverse of a covariance
    EXPECT_LE(largest(ours - theirs), solved * kTolerance * largest(w)) << name;
    ++compared;
  }
  const bool gives = tiny.adapters.changes_base() && init != "loftq";
  EXPECT_EQ(compared, gives ? 8 : 0);
}

TEST_P(LoraStartPeftOracle, HasPeftsLogitsLossAndGradients) {
  const Tensor theirs = oracle.read("logits");
  EXPECT_LE(largest(tiny.logits(batch()) - theirs), kTolerance * largest(theirs));
  const auto sign = signs();
  const auto gradients = tiny.sweep({{batch(), 0}}, 1).gradients;
  double size = 0;
  for (const Tensor& g : gradients) size = std::max(size, largest(g));
  for (size_t i = 0; i < gradients.size(); ++i) {
    const std::string& key = tiny.params()[i].hf_key;
    if (gradients[i].numel() == 0) continue;
    const Tensor expected = oracle.read("grad." + key);
    EXPECT_LE(largest(with_signs(key, gradients[i], sign, Of::kGradients) - expected),
              kOfVectors * size)
        << key;
  }
}

TEST_P(LoraStartPeftOracle, SharesRanksAsPeftDoes) {
  const auto config = tiny.adapters.save(0, {"base", "CAUSAL_LM", "print"}).config;
  if (init != "eva") GTEST_SKIP() << "no ranks to share";
  for (const auto& [module, expected] : ranks.items())
    EXPECT_EQ(config["rank_pattern"].value(module, rank), expected) << module;
  for (const auto& [module, alpha] : alphas.items())
    EXPECT_NEAR(config["alpha_pattern"].value(module, 6.0), alpha.get<double>(), 1e-9) << module;
  EXPECT_EQ(config["rank_pattern"].size(), ranks.size());
  EXPECT_EQ(config["init_lora_weights"], "eva");
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(LoraStartPeftOracle);
INSTANTIATE_TEST_SUITE_P(Starts, LoraStartPeftOracle, testing::ValuesIn(start_names()),
                         [](const auto& info) { return info.param; });

// --- what the papers claim

/// A matrix with singular values that fall as trained ones do.
Tensor falling(int64_t out, int64_t in) {
  const auto [u, s, vt] = at::linalg_svd(peft::fill("w", {out, in}, 1), false);
  return (u * at::pow(at::arange(1, s.size(0) + 1), -0.7)).mm(vt);
}

Tensor through_nf4(const Tensor& w) {
  models::Weight weight(w.sizes().vec(), models::WeightUse::kMatrix);
  weight.set_format({models::WeightFormat::Kind::kNf4, true}, at::kFloat);
  return weight.round_trip(w);
}

double distance(const Tensor& a, const Tensor& b) { return (a - b).norm().item<double>(); }

TEST(LoraStart, PissaQuantisesCloserThanTheMatrixItself) {
  const Tensor w = falling(96, 64);
  for (const double s : {0.5, 1.0, 3.0}) {
    const FirstFactors f = pissa(w, 8, s, 0, {});
    const Tensor rest = residual(w, f.taken_a, f.taken_b, s);
    EXPECT_LT(distance(rest + s * f.b.mm(f.a), w), 1e-5);
    EXPECT_LT(distance(through_nf4(rest) + s * f.b.mm(f.a), w), 0.8 * distance(through_nf4(w), w));
  }
}

TEST(LoraStart, PissaByProjectionIsNearTheExactOne) {
  const Tensor w = falling(96, 64);
  const auto product = [&](int rounds) {
    const FirstFactors f = pissa(w, 4, 1, rounds, {3, 5});
    return f.b.mm(f.a);
  };
  const Tensor exact = product(0);
  EXPECT_LT(distance(product(16), exact), 0.01 * exact.norm().item<double>());
  EXPECT_LT(distance(product(16), exact), distance(product(1), exact));
}

/// The distance of what a run with scale s starts as from W.
double loftq_error(const Tensor& w, double s, int rounds) {
  const FirstFactors f = loftq(w, 8, s, rounds, through_nf4);
  const Tensor base = f.taken_a.defined() ? residual(w, f.taken_a, f.taken_b, s) : w;
  return distance(through_nf4(base) + s * f.b.mm(f.a), w);
}

TEST(LoraStart, LoftqComesNearerWithEachRoundWhateverTheScale) {
  const Tensor w = falling(96, 64);
  const double plain = distance(through_nf4(w), w);
  for (const double s : {0.5, 1.0, 4.0}) {
    EXPECT_LT(loftq_error(w, s, 1), 0.9 * plain) << s;
    EXPECT_LT(loftq_error(w, s, 2), loftq_error(w, s, 1)) << s;
    EXPECT_LT(loftq_error(w, s, 5), loftq_error(w, s, 2)) << s;
    EXPECT_NEAR(loftq_error(w, s, 5), loftq_error(w, 1, 5), 0.02 * plain) << s;
  }
}

TEST(LoraStart, LoftqAsPeftHasItIsWrongUnlessAlphaIsR) {
  const Tensor w = falling(96, 64);
  const FirstFactors theirs = loftq(w, 8, 1, 1, through_nf4);  // PEFT takes s for 1
  const double s = 4;
  EXPECT_GT(distance(through_nf4(w) + s * theirs.b.mm(theirs.a), w), distance(through_nf4(w), w));
  EXPECT_LT(loftq_error(w, s, 1), distance(through_nf4(w), w));
}

TEST(LoraStart, OloraHasOrthonormalColumnsAndMicaTheSmallestDirections) {
  const Tensor w = falling(40, 64);
  const FirstFactors o = olora(w, 6), m = mica(w, 6);
  EXPECT_LT(distance(o.b.t().mm(o.b), at::eye(6)), 1e-5);
  const Tensor u = std::get<0>(at::linalg_svd(w, false)).slice(1, 34);
  EXPECT_LT(distance(m.b.mm(m.b.t()), u.mm(u.t())), 1e-4);
  EXPECT_EQ(largest(m.a), 0);
}

TEST(Eva, FindsTheSubspaceThatTheRowsComeFrom) {
  const Tensor basis = std::get<0>(at::linalg_qr(peft::fill("basis", {48, 3}, 1)));
  IncrementalPca pca(5, 0.999999);
  for (int batch = 0; batch < 4; ++batch)
    pca.fit(peft::fill("rows" + std::to_string(batch), {40, 3}, 1).mm(basis.t()) + 0.5);
  const Tensor shared = pca.components().slice(0, 0, 3).mm(basis);
  EXPECT_NEAR(std::get<1>(at::linalg_svd(shared)).min().item<double>(), 1, 1e-6);
  EXPECT_NEAR(pca.explained_variance_ratio().slice(0, 0, 3).sum().item<double>(), 1, 1e-4);
}

TEST(Eva, SharesTheBudgetByWhatDirectionsExplain) {
  const std::vector<Tensor> ratios = {at::tensor({0.5F, 0.3F, 0.1F, 0.01F}),
                                      at::tensor({0.2F, 0.05F, 0.04F, 0.03F}),
                                      at::tensor({0.02F, 0.02F, 0.02F, 0.02F})};
  EXPECT_EQ(share_ranks(ratios, 6), (std::vector<int>{3, 3, 0}));
  EXPECT_EQ(share_ranks(ratios, 8), (std::vector<int>{3, 4, 1}));
}

// --- what is saved

struct Saved : testing::TestWithParam<std::string> {
  TestFolder folder;
  /// A run that has moved, written with all that Graft knows of it.
  std::unique_ptr<Tiny> trained(const models::LoadOptions& options) const {
    auto tiny = std::make_unique<Tiny>("llama");
    tiny->attach("lora", method_with("lora", GetParam()));
    tiny->load(options);
    for (int i = 0; i < 2; ++i) tiny->step(lanes, 2);
    write(*tiny);
    return tiny;
  }
  void write(const Tiny& tiny) const {
    const Peft::Saved saved = tiny.adapters.save(0, {"base", "CAUSAL_LM", "print"});
    std::ofstream(folder.path() + "/adapter_config.json") << saved.config.dump(2);
    models::io::write_safetensors(folder.path() + "/adapter_model.safetensors", saved.tensors,
                                  saved.metadata);
  }
  std::vector<models::Lane> lanes = {make_lane(0), make_lane(1)};
};

TEST_P(Saved, IsAPlainLoraOfTwiceTheRankForPeft) {
  const auto tiny = trained(dense());
  const Peft::Saved saved = tiny->adapters.save(0, {"base", "CAUSAL_LM", "print"});
  EXPECT_EQ(saved.config["init_lora_weights"], true);
  EXPECT_EQ(saved.config["r"], 8);
  Tiny plain("llama");  // without our entries, as PEFT reads it
  TestFolder as_peft;
  Tiny::write_adapter(as_peft.path(), saved.config, saved.tensors);
  plain.adapters.attach_frozen(as_peft.path());
  plain.load(dense());
  const Tensor expected = tiny->logits(lanes[0].batch);
  EXPECT_LE(largest(plain.logits(lanes[0].batch) - expected), 1e-5 * largest(expected));
}

TEST_P(Saved, IsOnAQuantisedBaseTheVeryModelThatWasTrained) {
  const auto tiny = trained({});
  Tiny again("llama");
  again.adapters.attach_frozen(folder.path());
  again.load({});
  EXPECT_EQ(again.store->hash(), tiny->store->hash());
  EXPECT_TRUE(at::equal(again.logits(lanes[0].batch), tiny->logits(lanes[0].batch)));
}

TEST_P(Saved, GoesOnFromItsDirectoryBitForBit) {
  const auto tiny = trained({});
  Tiny again("llama");
  again.attach("", nullptr, folder.path());
  again.load({});
  EXPECT_EQ(again.store->hash(), tiny->store->hash());
  EXPECT_EQ(again.adapters.params().hash(), tiny->adapters.params().hash());
  EXPECT_EQ(again.sweep(lanes, 2).loss, tiny->sweep(lanes, 2).loss);
  const Peft::Saved before = tiny->adapters.save(0, {}), after = again.adapters.save(0, {});
  EXPECT_EQ(before.config, after.config);
  EXPECT_EQ(before.metadata, after.metadata);
}

INSTANTIATE_TEST_SUITE_P(
    Starts, Saved,
    testing::Values("{r: 4, init_lora_weights: pissa}",
                    "{r: 4, init_lora_weights: olora, target_modules: all-linear}",
                    "{r: 4, init_lora_weights: pissa, use_rslora: true, rank_pattern: {v_proj: 3}}",
                    "{r: 4, init_lora_weights: corda, alpha_pattern: {q_proj: 3}}",
                    "{r: 4, init_lora_weights: lora_ga}"));

TEST(SavedEva, HasTheRanksThatWereShared) {
  const auto make = [](const std::string& init_from) {
    auto tiny = std::make_unique<Tiny>("llama");
    const auto from = init_from.empty() ? std::nullopt : std::optional(init_from);
    tiny->attach("lora",
                 method_with("lora",
                             "{r: 2, target_modules: all-linear, init_lora_weights: eva,"
                             " eva_config: {rho: 4}}"),
                 from);
    tiny->load();
    return tiny;
  };
  const auto tiny = make("");
  std::set<int64_t> ranks;
  int64_t total = 0;
  for (const Param& p : tiny->params()) {
    if (p.name.ends_with("lora_a")) ranks.insert(p.value.size(0)), total += p.value.size(0);
  }
  EXPECT_EQ(total, 2 * 14);
  EXPECT_GT(ranks.size(), 2u);
  const std::vector<models::Lane> lanes = {make_lane(0), make_lane(1)};
  tiny->step(lanes, 2);
  TestFolder folder;
  tiny->save(folder.path());
  const auto again = make(folder.path());
  EXPECT_EQ(again->adapters.params().hash(), tiny->adapters.params().hash());
  Tiny frozen("llama");
  frozen.adapters.attach_frozen(folder.path());
  frozen.load();
  EXPECT_TRUE(at::equal(frozen.logits(lanes[0].batch), tiny->logits(lanes[0].batch)));
}

// --- what is refused

void expect_start_refused(const std::string& options, const std::string& message,
                          const models::LoadOptions& load = dense()) {
  Tiny tiny("llama");
  models::io::expect_refused(
      [&] {
        tiny.attach("lora", method_with("lora", options));
        tiny.load(load);
      },
      message, ExitCode::kUsage);
}

TEST(LoraStart, WhatCannotStartSoIsRefused) {
  expect_start_refused("{r: 33, init_lora_weights: pissa}",
                       "takes 33 directions of block.0.attn.v, which is 32 x 48; r at most 32");
  expect_start_refused("{r: 17, init_lora_weights: lora_ga}", "takes 34 directions of");
  expect_start_refused("{target_modules: head, init_lora_weights: olora}",
                       "is for the linear layers of blocks, and head is not one");
  expect_start_refused("{target_modules: embed, init_lora_weights: eva}", "and embed is not one");
  expect_start_refused("{init_lora_weights: loftq}", "model.quantization stores 32 bits");
  models::LoadOptions int8;
  int8.quantization = models::Quantization::kInt8;
  expect_start_refused("{init_lora_weights: loftq}", "loftq_bits = 4, and", int8);
  expect_start_refused("{init_lora_weights: pissa, lora_fa: true}", "lora_fa");
}

}  // namespace
}  // namespace graft::peft
