// What LoRA and its kin do in a step beside the optimiser's rule: learning rates, gradients and
// ranks against HF PEFT's (tests/oracle/lora_steps.py writes GRAFT_ORACLE_DIR/lora_steps), and what
// their papers say of it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

using models::io::SafetensorsFile;

std::string oracle_root() {
  const char* root = std::getenv("GRAFT_ORACLE_DIR");
  return root == nullptr ? "" : root;
}

nlohmann::json oracle_json(const std::string& name) {
  return nlohmann::json::parse(std::ifstream(oracle_root() + "/lora_steps/" + name + ".json"));
}

double largest(const Tensor& t) { return t.abs().max().item<double>(); }

models::LoadOptions dense() {
  models::LoadOptions options;
  options.quantization = models::Quantization::kNone;
  return options;
}

std::unique_ptr<Tiny> tiny_with(const std::string& name, const std::string& options,
                                const nlohmann::json& model = tiny_config("llama"),
                                const models::LoadOptions& load = dense()) {
  auto tiny = std::make_unique<Tiny>(model);
  std::shared_ptr<Method> method = methods().make(name);
  read_fields(*method, options);
  tiny->attach(name, method);
  tiny->load(load);
  return tiny;
}

nlohmann::json oracle_model() { return models::read_base_config(oracle_root() + "/qwen2/model"); }

Tensor named(const Tiny& tiny, const std::string& name) {
  for (const Param& p : tiny.params()) {
    if (p.name == name) return p.value;
  }
  for (const Constant& c : tiny.adapters.params().constants()) {
    if (c.name == name) return c.value;
  }
  throw Error(ExitCode::kUsage, "no tensor " + name);
}

// --- against PEFT

TEST(LoraStepsOracle, LoraPlusHasPeftsRates) {
  const nlohmann::json cases = oracle_json("rates");
  for (const auto& [name, expected] : cases.items()) {
    nlohmann::json fields = expected["fields"];
    const bool dora = fields.contains("use_dora");
    fields.erase("use_dora");
    fields["loraplus_lr_ratio"] = 16;
    const auto tiny = tiny_with(dora ? "dora" : "lora", fields.dump(), oracle_model());
    EXPECT_EQ(tiny->params().size(), expected["rates"].size()) << name;
    for (const Param& p : tiny->params()) {
      ASSERT_TRUE(expected["rates"].contains(p.hf_key)) << name << " " << p.hf_key;
      EXPECT_DOUBLE_EQ(p.learning_rate.value_or(1e-2 * p.learning_rate_factor),
                       expected["rates"][p.hf_key].get<double>())
          << name << " " << p.hf_key;
    }
  }
}

TEST(LoraStepsOracle, LoraFaHasPeftsGradient) {
  const SafetensorsFile oracle(oracle_root() + "/lora_steps/lora_fa.safetensors");
  const auto tiny = tiny_with("lora",
                              "{target_modules: [q_proj, v_proj, down_proj], r: 4, lora_alpha: 6,"
                              " lora_fa: true}",
                              oracle_model());
  const auto path = [](const std::string& key) {
    return key.substr(kFilePrefix.size(), key.rfind(".lora_") - kFilePrefix.size());
  };
  for (const Constant& c : tiny->adapters.params().constants())
    Tensor(c.value).copy_(oracle.read("a." + path(c.hf_key)));
  for (const Param& p : tiny->params())
    Tensor(p.value).mutable_grad() = oracle.read("gradient." + path(p.hf_key));
  tiny->adapters.after_reduce({0, 10});
  for (const Param& p : tiny->params()) {
    const Tensor expected = oracle.read("projected." + path(p.hf_key));
    EXPECT_LE(largest(p.value.grad() - expected), 1e-4 * largest(expected)) << p.name;
  }
}

TEST(LoraStepsOracle, AdaloraHasPeftsScoresAndKeepsItsRanks) {
  const SafetensorsFile oracle(oracle_root() + "/lora_steps/adalora.safetensors");
  const nlohmann::json run = oracle_json("adalora");
  const auto tiny = tiny_with("adalora", run["fields"].dump(), oracle_model());
  const int64_t steps = run["steps"];
  int compared = 0;
  for (int64_t step = 1; step <= steps; ++step) {
    for (const Param& p : tiny->params()) {
      const std::string number = std::to_string(step);
      const at::NoGradGuard no_grad;
      Tensor(p.value).copy_(fill(p.hf_key + ".value." + number, p.value.sizes(), 1));
      Tensor(p.value).mutable_grad() = fill(p.hf_key + ".gradient." + number, p.value.sizes(), 1);
    }
    tiny->adapters.after_step({step - 1, steps});
    for (const Param& p : tiny->params()) {
      const std::string prefix = std::to_string(step) + ".";
      const std::string slot = p.name.substr(0, p.name.rfind('.') + 1),
                        leaf = p.name.substr(p.name.rfind('.') + 1);
      if (oracle.find(prefix + "importance." + p.hf_key) != nullptr) {
        const std::string ours = leaf == "lora_a"   ? "lora_A"
                                 : leaf == "lora_b" ? "lora_B"
                                                    : "lora_E";
        const Tensor expected = oracle.read(prefix + "importance." + p.hf_key);
        EXPECT_LE(largest(named(*tiny, slot + ours + ".importance") - expected), 1e-6) << p.name;
        ++compared;
      }
      if (leaf != "lora_e") continue;
      EXPECT_TRUE(at::equal(p.value.ne(0).flatten(), oracle.read(prefix + "ranks." + p.hf_key)))
          << p.name << ", step " << step;
    }
  }
  EXPECT_EQ(compared, 3 * static_cast<int>(tiny->params().size()));
}

// --- LoRA

TEST(LoraSteps, AtTheStartBAloneHasAGradient) {
  const auto tiny = tiny_with("lora", "{target_modules: all-linear}");
  const auto gradients = tiny->sweep({make_lane(0)}, 1).gradients;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const bool is_a = tiny->params()[i].name.ends_with("lora_a");
    EXPECT_EQ(gradients[i].ne(0).any().item<bool>(), !is_a) << tiny->params()[i].name;
  }
}

/// How large what one Adam step adds to a matrix of 256 x 256 is.
double first_update(int rank, bool use_rslora) {
  nlohmann::json model = tiny_config("llama");
  model["hidden_size"] = 256, model["num_hidden_layers"] = 1, model["num_attention_heads"] = 16;
  const auto tiny = tiny_with("lora",
                              "{target_modules: attn.q, lora_alpha: 8, r: " + std::to_string(rank) +
                                  ", use_rslora: " + (use_rslora ? "true}" : "false}"),
                              model);
  tiny->step({make_lane(0), make_lane(1)}, 2);
  const LinearSite& site = *tiny->adapters.slots().find_linear("block.0.attn.q");
  const Tensor zeros = at::zeros({site.info.out, site.info.in});
  return site.slot->adapters().front()->merged(zeros).norm().item<double>();
}

TEST(LoraSteps, RsLoraMovesAsFarAtEveryRankAndLoraLessAtMore) {
  std::vector<double> with, without;
  for (const int rank : {4, 16, 64, 256}) {
    with.push_back(first_update(rank, true));
    without.push_back(first_update(rank, false));
  }
  const auto [least, most] = std::minmax_element(with.begin(), with.end());
  EXPECT_LT(*most, 1.5 * *least);
  for (size_t i = 1; i < without.size(); ++i) EXPECT_LT(without[i], without[i - 1] / 1.4) << i;
}

TEST(LoraSteps, LoraPlusEmbeddingsMoveAtTheirOwnRate) {
  const auto moved = [](const std::string& ratio) {
    auto tiny = tiny_with("lora", "{target_modules: [attn.q, embed], loraplus_lr_ratio: " + ratio +
                                      ", loraplus_lr_embedding: 1e-4}");
    launcher::StepConfig config;
    config.learning_rate = 1e-2;
    launcher::AdamW optimizer(tiny->adapters.params(), config);
    const Tensor a = named(*tiny, "0.embed.lora_embedding_a");
    const auto result = tiny->sweep({make_lane(0)}, 1);
    optimizer.step(result.gradients, 5e-3);  // the run is at half its rate
    return largest(a);                       // from zero, the first step of Adam is the rate
  };
  EXPECT_NEAR(moved("16"), 0.5e-4, 1e-7);
  EXPECT_NEAR(moved("1"), 5e-3, 1e-5);
}

// --- LoRA-FA

TEST(LoraSteps, LoraFaMovesAsNearAsItCanToTheMatrixItself) {
  constexpr double kScale = 12.0 / 4;
  OneSlot slot("lora", "{target_modules: block.0.attn.q, r: 4, lora_alpha: 12, lora_fa: true}");
  const Tensor w = slot.weight(), a = slot.value("lora_a");
  const Tensor x = fill("x", {9, w.size(1)}, 1), dy = fill("dy", {9, w.size(0)}, 1);
  slot.adapter().forward(x, Dense(w, {}), models::Pass()).backward(dy);
  const Tensor b = slot.adapter().named_parameters()["lora_b"];
  slot.tiny.adapters.after_reduce({0, 10});
  // min |s g A - dW| over g, row by row
  const Tensor dw = dy.t().mm(x).to(at::kDouble);
  const Tensor expected = std::get<0>(at::linalg_lstsq(kScale * a.t().to(at::kDouble), dw.t())).t();
  EXPECT_LE(largest(b.grad() - expected), 1e-4 * largest(expected));
}

TEST(LoraSteps, LoraFaPlainIsTheGradientItself) {
  OneSlot slot("lora", "{target_modules: attn.q, lora_fa: true, lora_fa_gradient: plain}");
  const Tensor before = slot.tiny.sweep({make_lane(0)}, 1).gradients[0].clone();
  slot.tiny.adapters.after_reduce({0, 10});
  EXPECT_TRUE(at::equal(slot.tiny.params()[0].value.grad(), before));
}

TEST(LoraSteps, LoraFaLeavesAAsItWas) {
  const auto tiny = tiny_with("lora", "{target_modules: all-linear, lora_fa: true}");
  std::vector<Tensor> before;
  for (const Constant& c : tiny->adapters.params().constants()) before.push_back(c.value.clone());
  ASSERT_EQ(before.size(), tiny->params().size());
  const double loss = tiny->step({make_lane(0)}, 1);
  for (int step = 0; step < 4; ++step) tiny->step({make_lane(0)}, 1);
  EXPECT_LT(tiny->sweep({make_lane(0)}, 1).loss, loss);
  for (size_t i = 0; i < before.size(); ++i)
    EXPECT_TRUE(at::equal(tiny->adapters.params().constants()[i].value, before[i]));
}

// --- DoRA

/// The rows that a slot's matrix has in the model: through NF4 and back.
Tensor through_nf4(const Tensor& w) {
  models::Weight weight(w.sizes().vec(), models::WeightUse::kMatrix);
  weight.set_format({models::WeightFormat::Kind::kNf4, true}, at::kFloat);
  return weight.round_trip(w);
}

TEST(LoraSteps, DoraHasTheLengthsOfItsRowsWithoutTheMatrix) {
  const auto tiny = tiny_with("dora", "{target_modules: attn.q, r: 4, lora_alpha: 6}",
                              tiny_config("qwen2"), models::LoadOptions());
  const LinearSite& site = *tiny->adapters.slots().find_linear("block.0.attn.q");
  ASSERT_TRUE(site.info.has_bias);
  for (int step = 0; step < 5; ++step) tiny->step({make_lane(0), make_lane(1)}, 2);
  const at::NoGradGuard no_grad;
  const Tensor w = through_nf4(fill(site.hf_path + ".weight", {site.info.out, site.info.in}, 0.25));
  const Tensor bias = fill(site.hf_path + ".bias", {site.info.out}, 0.2);
  const std::string slot = "0." + site.name + ".";
  const Tensor a = named(*tiny, slot + "lora_a"), b = named(*tiny, slot + "lora_b"),
               m = named(*tiny, slot + "magnitude");
  const Tensor v = (w.to(at::kDouble) + 1.5 * b.to(at::kDouble).mm(a.to(at::kDouble)));
  const Tensor x = fill("x", {5, site.info.in}, 1);
  const Tensor y = site.slot->adapters().front()->forward(x, Dense(w, bias), models::Pass());
  const Tensor gain = (m.to(at::kDouble) / v.norm(2, 1)).unsqueeze(1);
  const Tensor expected = at::linear(x.to(at::kDouble), gain * v, bias.to(at::kDouble));
  EXPECT_LE(largest(y - expected), 1e-6 * largest(expected));
  const Tensor merged = site.slot->adapters().front()->merged(w);
  EXPECT_LE(largest(merged.norm(2, 1) - m.abs()), 1e-6 * largest(m));
  EXPECT_GT(largest(m - w.norm(2, 1)), 1e-2);  // it has learnt
}

// --- AdaLoRA

TEST(LoraSteps, AdaloraGivesRanksToTheSlotThatTheTaskNeeds) {
  const std::string planted = "block.1.mlp.down";
  const char* options =
      "{target_modules: all-linear, init_r: 4, target_r: 1, tinit: 10, tfinal: 40}";
  const auto teacher = tiny_with("adalora", options), student = tiny_with("adalora", options);
  {
    const at::NoGradGuard no_grad;
    Tensor(named(*teacher, "0." + planted + ".lora_e")).fill_(1);
    for (const char* leaf : {".lora_a", ".lora_b"})
      Tensor(named(*teacher, "0." + planted + leaf)).mul_(15);
  }
  std::vector<models::Lane> lanes;
  for (int64_t i = 0; i < 4; ++i) {
    models::Lane lane = make_lane(i);
    const Tensor labels = teacher->logits(lane.batch).argmax(-1);
    lane.batch.labels_BL = labels;
    lane.batch.num_targets = labels.numel();
    lanes.push_back(lane);
  }
  for (int step = 0; step < 60; ++step) student->step(lanes, 4, 2e-2);
  std::map<std::string, int64_t> ranks;
  int64_t total = 0;
  for (const Param& p : student->params()) {
    if (!p.name.ends_with("lora_e")) continue;
    total += ranks[p.name] = p.value.ne(0).sum().item<int64_t>();
  }
  const double mean = static_cast<double>(total) / static_cast<double>(ranks.size());
  EXPECT_EQ(mean, 1);
  EXPECT_GT(ranks.at("0." + planted + ".lora_e"), mean);
}

// --- Delta-LoRA

TEST(LoraSteps, DeltaLoraThatDoesNotFollowIsLora) {
  const auto delta = tiny_with("delta_lora", "{r: 4, update_ratio: 0, start_steps: 1}");
  const auto lora = tiny_with("lora", "{r: 4}");
  for (int step = 0; step < 5; ++step)
    EXPECT_EQ(delta->step({make_lane(0)}, 1), lora->step({make_lane(0)}, 1)) << step;
  ASSERT_EQ(delta->params().size(), lora->params().size());
  for (size_t i = 0; i < lora->params().size(); ++i)
    EXPECT_TRUE(at::equal(delta->params()[i].value, lora->params()[i].value));
}

// --- LoftQ

TEST(LoraSteps, LoftqStartsNearerToTheUnquantisedModelThanLora) {
  const auto at_start = [](const std::string& start, const models::LoadOptions& load) {
    const auto tiny = tiny_with("lora",
                                "{target_modules: all-linear, r: 16, lora_alpha: 32,"
                                " init_lora_weights: " +
                                    start + "}",
                                tiny_config("llama"), load);
    std::vector<double> losses;
    for (int64_t i = 0; i < 8; ++i)
      losses.push_back(tiny->sweep({{make_lane(i).batch, 0}}, 1).loss);
    return losses;
  };
  const auto exact = at_start("\"true\"", dense()), plain = at_start("\"true\"", {}),
             loftq = at_start("loftq", {});
  double of_plain = 0, of_loftq = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    of_plain += std::abs(plain[i] - exact[i]);
    of_loftq += std::abs(loftq[i] - exact[i]);
  }
  EXPECT_LT(of_loftq, 0.7 * of_plain);
}

}  // namespace
}  // namespace graft::peft
