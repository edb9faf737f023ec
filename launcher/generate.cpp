#include "launcher/generate.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "configs/check.h"
#include "kernels/random/random.h"

namespace graft::launcher {
namespace {

/// One row of one document whose first token stands at `position`.
models::Lane lane_of(const std::vector<int64_t>& ids, int64_t position, at::Device device) {
  const auto length = static_cast<int64_t>(ids.size());
  models::Lane lane;
  lane.batch.tokens_BL = at::tensor(ids).unsqueeze(0).to(device);
  lane.batch.positions_BL =
      at::arange(position, position + length, at::kLong).unsqueeze(0).to(device);
  lane.batch.documents_BL = at::zeros({1, length}, at::kLong);
  lane.batch.labels_BL = at::full({1, length}, -100, at::kLong).to(device);
  lane.batch.num_tokens = length;
  return lane;
}

constexpr double kGreedyBelow = 1e-6;  // float32 logits divided by less may overflow

/// Sampling by Gumbel's trick: the noise is a function of (seed, prompt, step, token), so ranks
/// agree without talking.
int64_t choose(const at::Tensor& logits_V, const GenerateOptions& options, int64_t step) {
  if (options.temperature < kGreedyBelow) return logits_V.argmax().item<int64_t>();
  at::Tensor noise = at::empty(logits_V.sizes(), logits_V.options());
  kernels::uniform(noise, kernels::derive({options.seed, 2}, options.prompt_number << 32 | step));
  noise.clamp_min_(1e-20).log_().neg_().log_().neg_();
  return (logits_V / options.temperature + noise).argmax().item<int64_t>();
}

}  // namespace

std::vector<int64_t> generate(Workbench& bench, const std::vector<int64_t>& prompt,
                              const GenerateOptions& options,
                              const std::function<void(int64_t)>& on_token) {
  GRAFT_CHECK(!prompt.empty(), "the prompt is empty");
  models::KvCache cache;
  models::Pass pass;
  pass.want = models::Want::kLastLogits;
  pass.cache = &cache;
  std::vector<int64_t> input = prompt, out;
  for (int64_t step = 0; step < options.max_new_tokens; ++step) {
    const std::vector<models::Lane> lanes = {lane_of(input, cache.length, bench.world.device)};
    const at::Tensor logits_V = bench.trunk->forward(lanes, pass).front().flatten().to(at::kFloat);
    GRAFT_CHECK(at::isfinite(logits_V).all().item<bool>(), ExitCode::kNumerics,
                "the model's logits are not finite");
    const int64_t token = choose(logits_V, options, step);
    if (std::find(options.eos_ids.begin(), options.eos_ids.end(), token) != options.eos_ids.end())
      break;
    out.push_back(token);
    on_token(token);
    input = {token};
  }
  return out;
}

}  // namespace graft::launcher
