// The contract every method meets, on every tiny model: a method is tested the day it stands in
// methods.def. peft/README.md lists the clauses.
#include <gtest/gtest.h>

#include <mutex>
#include <set>

#include "tests/peft/all_methods.h"
#include "tests/peft/tiny.h"

namespace graft::peft {

namespace {

struct Case {
  std::string method, model, options;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.method << " on " << c.model << " " << c.options;
}

/// Fields worth a run of their own, beside the defaults.
const std::vector<std::pair<std::string, std::string>> kVariants = {
    {"lora", "{target_modules: all-linear, lora_dropout: 0.25}"},
    {"lora",
     "{target_modules: [all-linear, embed], modules_to_save: head, bias: all, use_rslora: true,"
     " rank_pattern: {v_proj: 3}}"},
    {"lora",
     "{target_modules: all-linear, init_lora_weights: gaussian, loraplus_lr_ratio: 4,"
     " lora_bias: true}"},
    {"lora", "{target_modules: attn.v, modules_to_save: [attn.q, embed, head], bias: all}"},
    {"lora", "{trainable_token_indices: [11, 48, 85, 122], loraplus_lr_ratio: 4}"},
    {"lora", "{init_lora_weights: orthogonal, lora_fa: true, lora_dropout: 0.25}"},
    {"lora", "{target_modules: [all-linear, embed], init_lora_weights: false}"},
    {"lora", "{target_modules: all-linear, r: 4, init_lora_weights: pissa, use_rslora: true}"},
    {"lora", "{r: 4, init_lora_weights: olora, lora_dropout: 0.25, rank_pattern: {v_proj: 3}}"},
    {"lora", "{target_modules: all-linear, init_lora_weights: eva, eva_config: {rho: 1}}"},
    {"lora", "{r: 4, init_lora_weights: corda, alpha_pattern: {v_proj: 2}}"},
    {"lora", "{target_modules: all-linear, r: 4, init_lora_weights: lora_ga}"},
    {"lora", "{target_modules: all-linear, init_lora_weights: mica}"},
    {"dora", "{target_modules: all-linear, r: 4, init_lora_weights: pissa}"},
    {"dora", "{target_modules: [all-linear, head], lora_dropout: 0.25, use_rslora: true}"},
    {"dora", "{init_lora_weights: false, loraplus_lr_ratio: 2, rank_pattern: {v_proj: 3}}"},
    {"adalora",
     "{target_modules: all-linear, init_r: 6, target_r: 2, tinit: 1, tfinal: 96, deltaT: 2}"},
    {"adalora", "{init_r: 6, target_r: 3, tfinal: 98, lora_dropout: 0.25, orth_reg_weight: 0}"},
    {"delta_lora", "{target_modules: all-linear, r: 4, lora_alpha: 4, start_steps: 1}"},
    {"delta_lora", "{start_steps: 0, update_ratio: 0.5}"},
    {"example", "{target_modules: [all-linear, embed, head]}"},
    {"c3a",
     "{target_modules: all-linear, block_size: 8, block_size_pattern: {v_proj: 4},"
     " init_weights: \"true\"}"},
    {"deft", "{target_modules: all-linear, alpha: 4, deft_dropout: 0.25}"},
    {"deft", "{para: true, decomposition_method: qr, bias: all}"},
    {"deft", "{init_weights: false, init_scale: 0.5}"},
    {"fourierft",
     "{target_modules: all-linear, n_frequency: 200, random_loc_seed: 3,"
     " n_frequency_pattern: {v_proj: 100}, init_weights: true}"},
    {"glora", "{target_modules: all-linear, matrix_product: true, config_C: none}"},
    {"glora",
     "{target_modules: all-linear, config_A_B: vector, config_C: vector, config_D_E: vector}"},
    {"gralora",
     "{target_modules: all-linear, r: 8, gralora_k: 4, hybrid_r: 3, gralora_dropout: 0.25}"},
    {"hira",
     "{r: 8, target_modules: [all-linear, embed], init_weights: gaussian, hira_dropout: 0.25,"
     " rank_pattern: {v_proj: 3}}"},
    {"hira", "{r: 2, target_modules: [attn.q, embed], init_weights: false}"},
    {"dylora",
     "{target_modules: all-linear, r: 6, block_size: 2, scale_by: rank, per_slot: true,"
     " lora_dropout: 0.25}"},
    {"dylora", "{r: 4, update: prefix, scale_by: pieces, inference_r: 3}"},
    {"ed_lora", "{token_ids: [11, 85], lora_dropout: 0.25, token_lr_ratio: 1}"},
    {"ed_lora", "{r: 2, lora_alpha: 3, token_ids: [48, 40, 77], token_start: [5, -1, 7]}"},
    {"increlora",
     "{target_modules: all-linear, init_warmup: 1, incre_interval: 1, top_h: 100, lora_r: 2,"
     " target_r: 6}"},
    {"increlora",
     "{init_warmup: 0, incre_interval: 2, advance_learn: false, scale_by: initial_rank,"
     " lora_dropout: 0.25}"},
    {"diffusekrona", "{target_modules: all-linear, scale: 2}"},
    {"krona", "{a_out: 8, a_in: 3}"},
    {"kasa", "{target_modules: all-linear, r: 4, lora_dropout: 0.25, rank_pattern: {v_proj: 3}}"},
    {"krona_b", "{residual: true, scale: 2, a_out: 4}"},
    {"loha",
     "{target_modules: all-linear, r: 2, rank_pattern: {v_proj: 3}, alpha_pattern: {up_proj: 4}}"},
    {"loha",
     "{init_weights: lycoris, use_scalar: true, rs_lora: true, rank_dropout: 0.25,"
     " module_dropout: 0.25}"},
    {"loha", "{r: 2, weight_decompose: true, wd_on_out: false, rank_dropout: 0.25}"},
    {"locon", "{target_modules: all-linear, use_scalar: true, rank_dropout: 0.25}"},
    {"locon", "{weight_decompose: true, module_dropout: 0.25, rank_pattern: {v_proj: 3}}"},
    {"lokr",
     "{factorization: unbalanced, full_matrix: true, unit_scale: true, init_weights: lycoris,"
     " rank_dropout: 0.25, rank_dropout_scale: true}"},
    {"lokr", "{r: 2, factorization: lycoris, decompose_factor: 16, weight_decompose: true}"},
    {"lokr", "{target_modules: all-linear, r: 2, decompose_both: true, init_weights: lycoris}"},
    {"lokr",
     "{r: 3, decompose_factor: 4, rank_pattern: {v_proj: 100}, alpha_pattern: {q_proj: 2}}"},
    {"lorand", "{sites: [block], factor: 4, branches: 2, kernel_dim: 3, share_kernel: true}"},
    {"lora_xs", "{target_modules: all-linear, r: 6, init_deviation: 0, dropout: 0.25}"},
    {"miss", "{target_modules: all-linear, r: 8, init_weights: bat, bias: MiSS_only}"},
    {"miss",
     "{target_modules: all-linear, r: 7, init_weights: mini, mini_r: 4, miss_dropout: 0.25}"},
    {"mpo", "{target_modules: all-linear, sites: 4, bond: 3}"},
    {"adamss", "{target_modules: all-linear, r: 12, subspace_rank: 4, random_seed: 3}"},
    {"adamss", "{target_modules: [attn.o, mlp.down], subspace_rank: 3, init_weights: false}"},
    {"adamss", "{target_modules: all-linear, r: 12, num_subspaces: 3, subspace_rank: 2}"},
    {"adamss",
     "{target_modules: all-linear, num_subspaces: 4, subspace_rank: 3, use_asa: true,"
     " asa_target_subspaces: 20, init_warmup: 0, final_warmup: 20, mask_interval: 2}"},
    {"frod", "{target_modules: all-linear, sparse_rate: 0.05, frod_dropout: 0.25}"},
    {"frod", "{projection_prng_key: 3, save_projection: false, init_weights: false}"},
    {"osf", "{target_modules: all-linear, effective_rank: 0.75, rank_pattern: {v_proj: 9}}"},
    {"osf", "{effective_rank: 12}"},
    {"poly", "{target_modules: all-linear, r: 4, n_tasks: 3, n_splits: 2, task_id: 1}"},
    {"lily", "{target_modules: all-linear, r: 4, num_B: 3, stride_A: 2, scaling: 2}"},
    {"lily", "{target_modules: [model.layers.*.self_attn.q_proj, mlp.up], init_weights: false}"},
    {"peanut", "{target_modules: all-linear, r: 6, depth: 2, act_fn: tanh, scaling: 2}"},
    {"peanut", "{r: 8, depth: 1, act_fn: silu, init_weights: false}"},
    {"supertuning",
     "{target_modules: all-linear, sparsity: 0.8, r: 4, lora_dropout: 0.25, select_top: false}"},
    {"supertuning", "{sparsity: 0.5, save_precomputed_indices: false, r: 3, lora_alpha: 9}"},
    {"tinylora",
     "{target_modules: all-linear, r: 4, u: 24, weight_tying: 0.6, tinylora_dropout: 0.25}"},
    {"tinylora", "{r: 6, weight_tying: 1, save_projection: false, init_weights: uniform}"},
    {"unilora",
     "{target_modules: all-linear, r: 3, theta_d_length: 300, unilora_dropout: 0.25,"
     " save_indices: true}"},
    {"unilora", "{theta_d_length: 60, init_weights: false, proj_seed: 3}"},
    {"trainable_tokens", "{target_modules: [embed, head], token_indices: [11, 48, 85, 122]}"},
    {"trainable_tokens", "{token_indices: [11, 48, 85, 122], init_weights: false}"},
    {"shira", "{target_modules: all-linear, r: 4, random_seed: 3}"},
    {"waveft", "{target_modules: all-linear, n_frequency: 60, scaling: 4, wavelet_family: db2}"},
    {"waveft",
     "{n_frequency: 500, scaling: 4, wavelet_family: db4, proportional_parameters: true}"},
    {"waveft", "{n_frequency: 90, scaling: 4, use_idwt: false, n_frequency_pattern: {v_proj: 30}}"},
    {"beft", "{target_modules: all-linear, init_weights: false}"},
    {"freeze_layers", "{num_layers: 0, final_norm: true, head: true}"},
    {"freeze_layers", "{num_layers: 2, embeddings: true}"},
    {"bitfit", "{target_modules: [attn.q, mlp.up], modules_to_save: [attn.v, head]}"},
    {"bottleneck",
     "{sites: [block], reduction_factor: 6, non_linearity: gelu, scaling: 2, learn_scaling: true,"
     " init_weights: bert}"},
    {"adapter_drop", "{drop_up_to: 1}"},
    {"bottleneck",
     "{form: parallel, tap: raw, reduction_factor: 4, init_weights: houlsby, skip_layers: [1]}"},
    {"bottleneck",
     "{sites: [mlp, block], form: parallel, reduction_factor: 4, non_linearity: tanh, leave_out: "
     "[0]}"},
    {"layernorm_tuning", "{target_modules: \"*norm\", layers_to_transform: [1]}"},
    {"llama_adapter", "{adapter_len: 12, adapter_layers: 2}"},
    {"llama_adapter", "{gate: heads}"},
    {"prefix_tuning", "{num_virtual_tokens: 5, init_weights: zero}"},
    {"prefix_tuning", "{num_virtual_tokens: 5, prefix_projection: true, encoder_hidden_size: 24}"},
    {"prefix_tuning", "{num_virtual_tokens: 5, shift_positions: false}"},
    {"p_tuning",
     "{num_virtual_tokens: 2, encoder_hidden_size: 5, encoder_reparameterization_type: LSTM,"
     " encoder_dropout: 0.25}"},
    {"prompt_tuning", "{num_virtual_tokens: 3, prompt_tuning_init: SAMPLE_VOCAB}"},
    {"boft", "{target_modules: all-linear, boft_n_butterfly_factor: 3, boft_dropout: 0.2}"},
    {"boft", "{boft_block_size: 0, boft_block_num: 12, boft_n_butterfly_factor: 2}"},
    {"boft", "{rotate: outputs, boft_n_butterfly_factor: 2}"},
    {"delora",
     "{target_modules: all-linear, delora_lambda: 2, module_dropout: 0.25,"
     " rank_pattern: {v_proj: 3}, lambda_pattern: {q_proj: 1}}"},
    {"hra", "{target_modules: all-linear, r: 3}"},
    {"hra", "{apply_GS: true, r: 4, bias: hra_only}"},
    {"ia3", "{target_modules: all-linear, feedforward_modules: [attn.o, mlp.down]}"},
    {"ia3", "{target_modules: all-linear, scale_bias: false}"},
    {"oft", "{target_modules: all-linear, use_cayley_neumann: false, oft_block_size: 8}"},
    {"oft", "{r: 4, oft_block_size: 0, block_share: true, num_cayley_neumann_terms: 7}"},
    {"oft", "{rotate: outputs, rescaled: true, use_cayley_neumann: false, oft_block_size: 8}"},
    {"oft", "{coft: true, eps: 2, oft_block_size: 8}"},
    {"psoft",
     "{target_modules: all-linear, r: 6, use_cayley_neumann: true, ab_svd_init: pissa_init,"
     " psoft_dropout: 0.25}"},
    {"psoft", "{r: 8, psoft_orth: false, psoft_mag_a: false}"},
    {"pvera", "{target_modules: all-linear, r: 32, pvera_dropout: 0.25}"},
    {"pvera", "{sample_at_inference: true, save_projection: false}"},
    {"randlora",
     "{target_modules: [k_proj, mlp.down], r: 7, randlora_alpha: 1, randlora_dropout: 0.25}"},
    {"randlora", "{sparse: true, r: 8, randlora_alpha: 2, save_projection: false}"},
    {"randlora", "{target_modules: [k_proj, mlp.down], r: 7, randlora_alpha: 2, pairing: paper}"},
    {"road", "{target_modules: all-linear, group_size: 8, variant: road_2}"},
    {"road", "{group_size: 4, variant: road_4}"},
    {"vblora",
     "{target_modules: [k_proj, mlp.down], vector_length: 16, num_vectors: 5, topk: 3,"
     " init_logits_std: 2, vblora_dropout: 0.25}"},
    {"vera", "{target_modules: all-linear, r: 64, vera_dropout: 0.25}"},
    {"vera", "{save_projection: false, projection_prng_key: 5}"},
    {"xlora",
     "{adapters: " + tiny_loras() +
         ", layerwise_scalings: true, xlora_depth: 2, xlora_size: 24, xlora_dropout_p: 0.1}"},
    {"xlora", "{adapters: " + tiny_loras() +
                  ", enable_softmax: false, top_k_lora: 2, enable_softmax_topk: true}"},
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const char* model : {"llama", "mistral", "qwen2", "qwen3"}) {
    for (const std::string& method : registry().names())
      all.push_back({method, model, defaults(method)});
    for (const auto& [method, options] : kVariants) all.push_back({method, model, options});
  }
  // A classifier's head comes beside any method: one that puts modules into the model, a prompt,
  // ...
  for (const char* method : {"lora", "bottleneck", "p_tuning_v2", "linear_probe", "bitfit"})
    all.push_back({method, "llama_tokens", defaults(method)});
  // ... and with its bias, beside those that train biases.
  all.push_back({"lora", "llama_tokens", "{bias: all}"});
  all.push_back({"bitfit", "llama_tokens", "{target_modules: [all-linear, head]}"});
  return all;
}

class Contract : public testing::TestWithParam<Case> {
 protected:
  static std::unique_ptr<Tiny> make(models::LoadOptions options = {}, dist::Comm* comm = nullptr) {
    auto tiny = std::make_unique<Tiny>(GetParam().model.c_str());
    std::shared_ptr<Method> method = registry().make(GetParam().method);
    read_fields(*method, GetParam().options);
    if (method->acts_on_others()) tiny->attach("lora", registry().make("lora"));
    tiny->attach(GetParam().method, method);
    tiny->load(std::move(options), comm);
    return tiny;
  }
  static models::LoadOptions unquantised() {
    models::LoadOptions options;
    options.quantization = models::Quantization::kNone;
    return options;
  }
};

const std::vector<models::Lane> kLanes = {make_lane(0), make_lane(1)};

TEST_P(Contract, OutputAtStepZeroIsTheBases) {
  const auto tiny = make();
  const auto method = registry().make(GetParam().method);
  read_fields(*method, GetParam().options);
  if (!method->starts_as_base()) GTEST_SKIP() << "the method starts elsewhere";
  const data::Batch& batch = kLanes[0].batch;
  EXPECT_TRUE(at::equal(tiny->logits(batch), tiny->logits(batch, false)));
  const Tensor start = tiny->logits(batch);
  tiny->jitter();
  EXPECT_FALSE(at::equal(tiny->logits(batch), start)) << "the adapter is not in the model";
}

TEST_P(Contract, InitialValuesAreAFunctionOfTheSeedAlone) {
  EXPECT_EQ(make()->adapters.params().hash(), make()->adapters.params().hash());
}

TEST_P(Contract, ExactlyTheParamSetGetsGradients) {
  const auto tiny = make();
  tiny->jitter();
  std::set<const void*> listed, trainable;
  for (const Param& p : tiny->params()) {
    if (p.thawed == nullptr) listed.insert(p.value.unsafeGetTensorImpl());
  }
  const auto collect = [&](const auto& sites) {
    for (const auto& site : sites) {
      for (const auto& adapter : site.slot->adapters()) {
        for (const Tensor& p : adapter->parameters()) {
          if (p.requires_grad()) trainable.insert(p.unsafeGetTensorImpl());
        }
      }
    }
  };
  const SlotMap& slots = tiny->adapters.slots();
  collect(slots.linears), collect(slots.gains), collect(slots.sublayers), collect(slots.attentions),
      collect(slots.sequences);
  collect(slots.tensors), collect(slots.carries), collect(slots.losses);
  EXPECT_EQ(trainable, listed);
  const auto gradients = tiny->sweep(kLanes, 2).gradients;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (gradients[i].numel() == 0) continue;  // fish_mask chose nothing of this matrix
    EXPECT_TRUE(at::isfinite(gradients[i]).all().item<bool>()) << tiny->params()[i].name;
    EXPECT_GT(gradients[i].abs().max().item<double>(), 0)
        << tiny->params()[i].name << " has no gradient";
  }
}

TEST_P(Contract, BaseBytesAreTheSameAfterThreeSteps) {
  const auto tiny = make();
  const std::string base = tiny->store->hash(), start = tiny->adapters.params().hash();
  for (int i = 0; i < 3; ++i) tiny->step(kLanes, 2);
  EXPECT_EQ(tiny->store->hash(), base);
  EXPECT_NE(tiny->adapters.params().hash(), start);
}

// Central differences of the float32 model along u = unit(unit(gradient) + unit(noise)): along the
// gradient the signal is largest, the noise reaches every element. A step of h = 0.01 changes the
// loss (about 5) by 2 h |g|; float32 leaves errors of some 1e-6, so a difference is known to 1e-6 /
// (2 h) = 5e-5, and the cubic term is of the order of h^2.
TEST_P(Contract, GradientsMatchFiniteDifferences) {
  constexpr double kStep = 0.01, kAbsolute = 2e-4, kRelative = 0.01;
  const auto tiny = make(unquantised());
  tiny->jitter();
  const auto gradients = tiny->sweep(kLanes, 2).gradients;
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Param& param = tiny->params()[i];
    // The paper's gradient takes the lengths as constants: compared with PEFT's (golden_test.cpp).
    if (GetParam().method == "dora" && !param.name.ends_with("magnitude")) continue;
    const Tensor saved = param.value.clone(), noise = fill(param.name + " noise", saved.sizes(), 1);
    Tensor u = gradients[i] / (gradients[i].norm() + 1e-12) + noise / noise.norm();
    if (u.norm().item<double>() < 0.5) u = noise.clone();  // of one element, opposite signs
    u /= u.norm();
    const auto loss_at = [&](double h) {
      Tensor(param.value).copy_(saved + h * u);
      const at::AutoGradMode grad(true);
      return tiny->sweep(kLanes, 2).loss;
    };
    const double measured = (loss_at(kStep) - loss_at(-kStep)) / (2 * kStep);
    Tensor(param.value).copy_(saved);
    const double expected = (gradients[i] * u).sum().item<double>();
    EXPECT_NEAR(measured, expected, kAbsolute + kRelative * std::abs(expected)) << param.name;
  }
}

TEST_P(Contract, SavedAndLoadedItGoesOnBitForBit) {
  const TestFolder folder;
  const auto first = make(), second = make();
  for (int i = 0; i < 2; ++i) first->step(kLanes, 2);
  first->save(folder.path());
  second->adapters.load(folder.path());
  EXPECT_EQ(second->adapters.params().hash(), first->adapters.params().hash());
  for (size_t i = 0; i < first->optimizer->states().size(); ++i)
    Tensor(second->optimizer->states()[i].value).copy_(first->optimizer->states()[i].value);
  second->optimizer->set_num_steps(first->optimizer->num_steps());
  for (int i = 0; i < 2; ++i) EXPECT_EQ(second->step(kLanes, 2), first->step(kLanes, 2));
  EXPECT_EQ(second->adapters.params().hash(), first->adapters.params().hash());
}

TEST_P(Contract, SavedAndFrozenItComputesTheSame) {
  if (GetParam().model != "llama_tokens" && GetParam().method != "bitfit")
    GTEST_SKIP() << "its file has no whole module beside biases of others";
  const TestFolder folder;
  const auto trained = make();
  for (int i = 0; i < 2; ++i) trained->step(kLanes, 2);
  trained->save(folder.path());
  Tiny frozen(GetParam().model.c_str());
  frozen.adapters.attach_frozen(folder.path());
  frozen.load();
  const data::Batch& batch = kLanes[0].batch;
  EXPECT_TRUE(at::equal(frozen.logits(batch), trained->logits(batch)));
}

TEST_P(Contract, MergedWeightsComputeTheSame) {
  const auto adapted = make(unquantised());
  const data::Batch& batch = kLanes[0].batch;
  const Tensor start = adapted->logits(batch, false);
  adapted->jitter();
  std::map<std::string, const LinearSite*> sites_by_weight;
  const SlotMap& map = adapted->adapters.slots();
  const auto none = [](const auto& sites) {
    return std::all_of(sites.begin(), sites.end(), [](auto& site) { return site.slot->empty(); });
  };
  if (!none(map.sublayers) || !none(map.attentions) || !none(map.sequences))
    GTEST_SKIP() << "the method acts beside the matrices";
  for (const auto* sites : {&map.linears, &map.gains}) {
    for (const LinearSite& site : *sites) {
      for (const auto& adapter : site.slot->adapters()) {
        if (!adapter->mergeable())
          GTEST_SKIP() << "the adapter of " << site.name << " cannot be merged";
      }
      sites_by_weight[site.hf_path + ".weight"] = &site;
    }
  }
  std::map<std::string, Tensor> thawed;
  for (const Param& p : adapted->params()) {
    if (p.thawed != nullptr) thawed[p.hf_key] = p.thawed->collect();
  }
  const auto merge = [&](const std::string& name, Tensor w) {
    const at::NoGradGuard no_grad;
    if (thawed.contains(name)) return thawed.at(name);
    if (!sites_by_weight.contains(name)) return w;
    const LinearSite& site = *sites_by_weight.at(name);
    w = adapted->adapters.prepare_weight(site.name + ".weight", w);
    for (const auto& adapter : site.slot->adapters()) w = adapter->merged(w);
    return w;
  };
  Tiny merged(GetParam().model.c_str());
  merged.load(unquantised(), nullptr, merge);
  const Tensor expected = adapted->logits(batch);
  EXPECT_LT((merged.logits(batch) - expected).abs().max().item<double>(), 1e-4);
  EXPECT_GT((merged.logits(batch) - start).abs().max().item<double>(), 1e-2);
}

TEST_P(Contract, ComputesInBfloat16Too) {
  models::LoadOptions options = unquantised();
  options.compute_dtype = at::kBFloat16;
  const auto half = make(options), whole = make(unquantised());
  half->jitter();
  whole->jitter();
  const double expected = whole->sweep(kLanes, 2).loss;
  const auto [loss, gradients] = half->sweep(kLanes, 2);
  EXPECT_NEAR(loss, expected, 0.1 * expected);
  for (size_t i = 0; i < gradients.size(); ++i) {
    EXPECT_EQ(gradients[i].scalar_type(), at::kFloat) << half->params()[i].name;
    EXPECT_TRUE(at::isfinite(gradients[i]).all().item<bool>()) << half->params()[i].name;
  }
}

TEST_P(Contract, TwoRanksOfOneLaneAreOneRankOfTwo) {
  constexpr int kSteps = 2;
  const auto alone = make();
  std::vector<double> expected;
  for (int i = 0; i < kSteps; ++i) expected.push_back(alone->step(kLanes, 2));
  const models::io::NamedTensors expected_saved = alone->saved_tensors();
  std::mutex mutex;  // EXPECT may be called from one thread at a time
  dist::run_virtual_ranks(2, [&](dist::Comm& comm) {
    const auto tiny = make({}, &comm);
    std::vector<double> losses;
    for (int i = 0; i < kSteps; ++i)
      losses.push_back(tiny->step({kLanes[static_cast<size_t>(comm.rank())]}, 2));
    const models::io::NamedTensors saved = tiny->saved_tensors();
    const std::lock_guard lock(mutex);
    EXPECT_EQ(losses, expected);
    EXPECT_EQ(tiny->adapters.params().replicated_hash(), alone->adapters.params().replicated_hash())
        << "rank " << comm.rank();
    for (size_t i = 0; i < (comm.rank() == 0 ? saved.size() : 0); ++i)
      EXPECT_TRUE(at::equal(saved[i].second, expected_saved[i].second)) << saved[i].first;
  });
}

TEST_P(Contract, LossFallsOnFourSamples) {
  const auto tiny = make();
  const double first = tiny->step(kLanes, 2);
  for (int i = 0; i < 40; ++i) tiny->step(kLanes, 2);
  EXPECT_LT(tiny->sweep(kLanes, 2).loss, 0.95 * first);
}

std::string case_name(const testing::TestParamInfo<Case>& info) {
  int variant = 0;
  for (const auto& [method, options] : kVariants) {
    variant += method == info.param.method ? 1 : 0;
    if (options == info.param.options) break;
  }
  const bool is_default = info.param.options == defaults(info.param.method);
  return info.param.method + (is_default ? "" : std::to_string(variant)) + "_" + info.param.model;
}
INSTANTIATE_TEST_SUITE_P(Methods, Contract, testing::ValuesIn(cases()), case_name);

// --- clause 1: fields

class Fields : public testing::TestWithParam<std::string> {};

/// A value for `field` outside of its bound, or "" if it takes any.
std::string out_of_range(const configs::FieldDoc& field) {
  if (!field.bound.choices.empty()) return "no-such-choice";
  std::string bad;
  if (field.bound.low) bad = std::to_string(static_cast<int64_t>(*field.bound.low) - 1);
  if (!field.bound.low && field.bound.high)
    bad = std::to_string(static_cast<int64_t>(*field.bound.high) + 1);
  return field.type == configs::Type::kList && !bad.empty() ? "[" + bad + "]" : bad;
}

TEST_P(Fields, DefaultsLoad) { EXPECT_NO_THROW(read_fields(*registry().make(GetParam()), "{}")); }

TEST_P(Fields, UnknownKeyIsRefusedWithItsLine) {
  const auto method = registry().make(GetParam());
  models::io::expect_refused([&] { read_fields(*method, "\nno_such_key: 1\n"); },
                             "options.yaml:2:1: no_such_key", ExitCode::kUsage);
}

/// Tries a bad value for each field that has a bound, those of a child method in its section.
int try_bad_values(const std::string& method, const configs::FieldDoc& section,
                   const std::string& name = "") {
  int tried = 0;
  for (const configs::FieldDoc& field : section.members) {
    if (field.type == configs::Type::kSection) tried += try_bad_values(method, field, field.name);
    const std::string bad = out_of_range(field);
    if (bad.empty()) continue;
    ++tried;
    const std::string indent = name.empty() ? "\n" : name + ":\n  ";
    const size_t column =
        field.name.size() + (bad.starts_with('[') ? 4 : 3) + (name.empty() ? 0 : 2);
    models::io::expect_refused(
        [&] { read_fields(*registry().make(method), indent + field.name + ": " + bad); },
        "options.yaml:2:" + std::to_string(column) + ": " + name + (name.empty() ? "" : ".") +
            field.name,
        ExitCode::kUsage);
  }
  return tried;
}

TEST_P(Fields, ValuesOutOfRangeAreRefusedWithNameAndLine) {
  const auto method = registry().make(GetParam());
  const int tried = try_bad_values(
      GetParam(), configs::describe_section([&](configs::Fields& f) { method->fields(f); }));
  if (tried == 0) GTEST_SKIP() << "no field has a bound";
}

INSTANTIATE_TEST_SUITE_P(Methods, Fields, testing::ValuesIn(registry().names()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace graft::peft
