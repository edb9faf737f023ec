#include "peft/lora_fields.h"

#include <ATen/ATen.h>

#include <cmath>

#include "configs/check.h"
#include "kernels/random/random.h"
#include "peft/draws.h"

namespace graft::peft {

void LoraFields::fields(configs::Fields& f) {
  const configs::Bound alpha = f.positive().at_most(1e30);  // alpha / r is a float32
  f("r", r, f.range(1, 4096), "rank, the inner size");
  f("lora_alpha", lora_alpha, alpha, "the output is scaled by lora_alpha / r");
  f("lora_dropout", lora_dropout, f.at_least(0).below(1), "probability, on the adapter's input");
  f("use_rslora", use_rslora, "scale by lora_alpha / sqrt(r) instead");
  f("rank_pattern", rank_pattern, f.range(1, 4096), "other ranks by slot, suffix or glob");
  f("alpha_pattern", alpha_pattern, alpha, "other lora_alpha by slot, suffix or glob");
  std::vector<std::string> starts = {"true",  "gaussian", "orthogonal", "false",   "pissa", "olora",
                                     "loftq", "eva",      "corda",      "lora_ga", "mica"};
  for (const int rounds : {1, 2, 4, 8, 16, 32, 64})
    starts.push_back("pissa_niter_" + std::to_string(rounds));
  f("init_lora_weights", init_lora_weights, f.one_of(starts),
    "true: A Kaiming-uniform, B zero; gaussian: A normal; orthogonal and false do not start as the "
    "base; the others are computed from its matrices or from data");
  f("loraplus_lr_ratio", loraplus_lr_ratio, f.positive(),
    "LoRA+: the learning rate of B over that of A");
}

double LoraFields::learning_rate_factor(std::string_view leaf) const {
  const bool is_fast =
      leaf == "lora_b" || leaf == "lora_bias" || leaf == "magnitude" || leaf == "bias";
  return is_fast ? loraplus_lr_ratio : 1;
}

LoraFields::Decision LoraFields::decision(const LinearSite& site) const {
  if (!decided)
    return {pattern_value(rank_pattern, site, r), pattern_value(alpha_pattern, site, lora_alpha)};
  const auto found = decided->find(site.hf_path);
  return found == decided->end() ? Decision{0, lora_alpha} : found->second;
}

double LoraFields::scale(const LinearSite& site) const {
  const auto [rank, alpha] = decision(site);
  if (rank == 0) return 0;
  return alpha / (use_rslora ? std::sqrt(rank) : rank);
}

std::pair<Tensor, Tensor> LoraFields::start(const LinearSite& site, kernels::Key key,
                                            at::Device device) const {
  const int64_t r = rank(site), in = site.info.in, out = site.info.out;
  if (init_lora_weights == "orthogonal") {  // rows of one orthogonal matrix: B A = 0
    GRAFT_CHECK(r % 2 == 0, "init_lora_weights: orthogonal needs an even rank, and ", site.name,
                " has ", r);
    const Tensor q = std::get<0>(at::linalg_qr(draw_normal({r, r}, 1, key, at::kCPU))).to(device);
    const auto part = [&](int64_t rows, int number) {
      return draw_normal({rows, r / 2}, 0.1, kernels::derive(key, number), device);
    };
    return {part(in, 1).mm(q.slice(0, 0, r, 2)).t().contiguous(),
            part(out, 2).mm(q.slice(0, 1, r, 2))};
  }
  const Tensor a = init_lora_weights == "gaussian"
                       ? draw_normal({r, in}, 1 / static_cast<double>(r), key, device)
                       : draw_kaiming({r, in}, key, device);
  if (init_lora_weights == "false")
    return {a, draw_kaiming({out, r}, kernels::derive(key, 1), device)};
  return {a, at::zeros({out, r}, a.options())};
}

PeftForm LoraFields::peft_form() {
  return {.type = "LORA",
          .bias_only = "lora_only",
          .inert = {"runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"},
          .ours = {"loraplus_lr_ratio", "loraplus_lr_embedding", "lora_fa", "lora_fa_gradient"}};
}

SavedAdapter LoraFields::with_known_start(SavedAdapter adapter) {
  const auto found = adapter.config.find("init_lora_weights");
  if (found == adapter.config.end()) return adapter;
  GRAFT_CHECK(found->is_null() || found->is_boolean() || *found == "gaussian" || *found == "eva" ||
                  *found == "orthogonal" || *found == "mica",
              ExitCode::kData, "adapter_config.json: init_lora_weights = ", found->dump(),
              " changes the base and is not supported; convert the adapter to plain LoRA");
  return adapter;
}

}  // namespace graft::peft
