// adamw_8bit against what it fuses, composed: moments decoded, kernels::adamw, and encoded again.
// tests/launcher/optim_test.cpp compares it with bitsandbytes.
#include "kernels/adamw8/adamw8.h"

#include "configs/check.h"
#include "kernels/nf4/nf4.h"
#include "tests/kernels/near.h"

namespace graft::kernels {
namespace {

const AdamWConfig kConfig{
    .learning_rate = 3e-3, .beta1 = 0.85, .beta2 = 0.99, .epsilon = 1e-7, .weight_decay = 0.1};
const std::vector<int64_t> kSizes = {1, 255, 256, 257, 8192, 8193, 20000};

struct State {
  std::vector<at::Tensor> parameters;
  std::vector<EightBitMoment> first, second;
  State() {
    at::manual_seed(8);
    for (const int64_t size : kSizes) {
      parameters.push_back(at::randn({size}));
      for (auto* moments : {&first, &second})
        moments->push_back({at::zeros({size}, at::kByte), at::zeros({(size + 255) / 256})});
    }
  }
  std::vector<at::Tensor> all() const {
    std::vector<at::Tensor> result = parameters;
    for (const auto* moments : {&first, &second}) {
      for (const EightBitMoment& m : *moments) result.insert(result.end(), {m.codes, m.absmax});
    }
    return result;
  }
};

/// Of many magnitudes, with a block that stays zero in the longest.
std::vector<at::Tensor> gradients(int64_t step) {
  at::manual_seed(100 + step);
  std::vector<at::Tensor> result;
  for (const int64_t size : kSizes) {
    result.push_back(at::randn({size}) * at::pow(10, at::randn({size})));
    if (size == kSizes.back()) result.back().slice(0, 512, 768).zero_();
  }
  return result;
}

State after_steps(int64_t num_steps) {
  State state;
  for (int64_t step = 1; step <= num_steps; ++step)
    adamw_8bit(state.parameters, gradients(step), state.first, state.second, step, kConfig);
  return state;
}

/// Of one magnitude, as those of a matrix are: v of a far smaller one than its block's is lost.
std::vector<at::Tensor> even_gradients(int64_t step) {
  at::manual_seed(100 + step);
  return {at::randn({20000})};
}

at::Tensor decode(const EightBitMoment& moment, const at::Tensor& map) {
  return map.index({moment.codes.to(at::kLong)}) *
         moment.absmax.repeat_interleave(kAdamW8Block).slice(0, 0, moment.codes.numel());
}

void encode(const at::Tensor& values, const at::Tensor& map, EightBitMoment& moment) {
  const int64_t size = values.numel(), blocks = moment.absmax.numel();
  const at::Tensor rows =
      at::constant_pad_nd(values, {0, blocks * kAdamW8Block - size}).view({blocks, kAdamW8Block});
  moment.absmax = rows.abs().amax(1);
  const at::Tensor scaled = rows * (1 / moment.absmax.clamp_min(1e-38)).unsqueeze(1);
  const at::Tensor bounds = (map.slice(0, 0, 255) + map.slice(0, 1, 256)) / 2;
  moment.codes = at::bucketize(scaled, bounds).to(at::kByte).flatten().slice(0, 0, size);
}

TEST(AdamW8, HasTheBitsOfDecodingSteppingAndEncoding) {
  State composed;
  for (int64_t step = 1; step <= 5; ++step) {
    const std::vector<at::Tensor> g = gradients(step);
    for (size_t i = 0; i < g.size(); ++i) {
      const at::Tensor m = decode(composed.first[i], dynamic_map());
      const at::Tensor v = decode(composed.second[i], unsigned_dynamic_map());
      adamw(composed.parameters[i], g[i], m, v, step, kConfig);
      encode(m, dynamic_map(), composed.first[i]);
      encode(v, unsigned_dynamic_map(), composed.second[i]);
    }
  }
  const std::vector<at::Tensor> fused = after_steps(5).all(), expected = composed.all();
  for (size_t i = 0; i < fused.size(); ++i) EXPECT_TRUE(at::equal(fused[i], expected[i])) << i;
}

TEST(AdamW8, StaysNearTheMomentsInFloat32) {
  const at::Tensor start = at::randn({20000}), eight = start.clone(), exact = start.clone();
  const auto zeros = [] { return EightBitMoment{at::zeros({20000}, at::kByte), at::zeros({79})}; };
  const EightBitMoment first = zeros(), second = zeros();
  const at::Tensor m = at::zeros({20000}), v = at::zeros({20000});
  for (int64_t step = 1; step <= 5; ++step) {
    adamw_8bit(eight, even_gradients(step), {first}, {second}, step, kConfig);
    adamw(exact, even_gradients(step), m, v, step, kConfig);
  }
  const double apart = (eight - exact).abs().mean().item<double>();
  EXPECT_LT(apart, 0.05 * (exact - start).abs().mean().item<double>());
  EXPECT_GT(apart, 0);
}

TEST(AdamW8, HasTheSameBitsAtAnyThreadCount) {
  expect_same_bits_at_any_thread_count([] { return after_steps(2).all(); });
}

TEST(AdamW8, RefusesListsThatDoNotFit) {
  const at::Tensor p = at::zeros({300});
  const EightBitMoment fits{at::zeros({300}, at::kByte), at::zeros({2})};
  const EightBitMoment short_scales{at::zeros({300}, at::kByte), at::zeros({1})};
  const EightBitMoment floats{at::zeros({300}), at::zeros({2})};
  EXPECT_THROW(adamw_8bit(p, p, {fits}, {short_scales}, 1, kConfig), Error);
  EXPECT_THROW(adamw_8bit(p, p, {floats}, {fits}, 1, kConfig), Error);
  EXPECT_THROW(adamw_8bit(p, at::zeros({299}), {fits}, {fits}, 1, kConfig), Error);
  EXPECT_THROW(adamw_8bit(p, p, {fits}, {}, 1, kConfig), Error);
  EXPECT_THROW(adamw_8bit(p, p, {fits}, {fits}, 0, kConfig), Error);
  adamw_8bit(at::TensorList(), at::TensorList(), {}, {}, 1, kConfig);
}

}  // namespace
}  // namespace graft::kernels
