// Each small kernel beside the LibTorch calls it replaces, forward and backward, in one process and
// in turns: the machine may be shared, so compare the two columns of a row, never two runs. Usage:
// ops_bench [threads [filter]]
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <string_view>

#include "kernels/adamw/adamw.h"
#include "kernels/adamw8/adamw8.h"
#include "kernels/lowrank/lowrank.h"
#include "kernels/nf4/nf4.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/rope/rope.h"
#include "kernels/swiglu/swiglu.h"
#include "kernels/xent/xent.h"

namespace {

using namespace graft::kernels;

constexpr int kRounds = 15;
std::string_view filter;

double run_ms(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

/// Prints the best of kRounds of each, in turns.
void compare(const std::string& name, const std::function<void()>& composed,
             const std::function<void()>& ours) {
  if (name.find(filter) == std::string::npos) return;
  double best_composed = 1e30, best_ours = 1e30;
  for (int round = -1; round < kRounds; ++round) {  // round -1 warms up
    const double composed_ms = run_ms(composed), ours_ms = run_ms(ours);
    if (round < 0) continue;
    best_composed = std::min(best_composed, composed_ms);
    best_ours = std::min(best_ours, ours_ms);
  }
  std::printf("%-44s %10.3f %10.3f %7.2fx\n", name.c_str(), best_composed, best_ours,
              best_composed / best_ours);
}

at::Tensor input(at::IntArrayRef sizes, at::ScalarType type) {
  return at::randn(sizes).to(type).set_requires_grad(true);
}

/// Forward, and backward with a gradient that is made once; the leaves start without a gradient.
template <class Forward>
std::function<void()> step(const std::vector<at::Tensor>& leaves, Forward forward) {
  const at::Tensor d_y = at::ones_like(leaves[0]);
  return [=] {
    for (const at::Tensor& leaf : leaves) leaf.mutable_grad().reset();
    forward().backward(d_y);
  };
}

template <class Forward>
std::function<void()> loss_step(const at::Tensor& leaf, Forward forward) {
  return [=] {
    leaf.mutable_grad().reset();
    forward().backward();
  };
}

void bench_elementwise(at::ScalarType type, int64_t tokens, int64_t width, int64_t inner) {
  const std::string label = std::string(" ") + at::toString(type) + " ";
  const at::Tensor x = input({tokens, width}, type), weight = at::ones({width}, type);
  compare("rms_norm" + label + std::to_string(tokens) + " x " + std::to_string(width),
          step({x},
               [=] {
                 const at::Tensor wide = x.to(at::kFloat);
                 return weight * (wide * at::rsqrt(wide.square().mean(-1, true) + 1e-5)).to(type);
               }),
          step({x}, [=] { return rms_norm(x, weight, 1e-5); }));
  const at::Tensor gate = input({tokens, inner}, type), up = input({tokens, inner}, type);
  compare("swiglu" + label + std::to_string(tokens) + " x " + std::to_string(inner),
          step({gate, up}, [=] { return at::silu(gate) * up; }),
          step({gate, up}, [=] { return swiglu(gate, up); }));
  const int64_t heads = width / 64;
  const at::Tensor q = input({1, tokens, heads, 64}, type);
  const at::Tensor cos = at::rand({tokens, 64}), sin = at::rand({tokens, 64});
  const at::Tensor cos_cast = cos.to(type).unsqueeze(1), sin_cast = sin.to(type).unsqueeze(1);
  compare("rope" + label + std::to_string(tokens) + " x " + std::to_string(heads) + " x 64",
          step({q},
               [=] {
                 const auto halves = q.chunk(2, -1);
                 return q * cos_cast + at::cat({-halves[1], halves[0]}, -1) * sin_cast;
               }),
          step({q}, [=] { return rope(q, cos, sin); }));
}

void bench_lowrank(at::ScalarType type, int64_t tokens, int64_t in, int64_t out) {
  const at::Tensor x = input({tokens, in}, type), base = input({tokens, out}, type);
  const at::Tensor a = input({16, in}, at::kFloat), b = input({out, 16}, at::kFloat);
  compare(std::string("lowrank ") + at::toString(type) + " " + std::to_string(tokens) + ", " +
              std::to_string(in) + " to " + std::to_string(out),
          step({base, x, a, b},
               [=] { return base * 1 + 2.0 * x.mm(a.t().to(type)).mm(b.t().to(type)); }),
          step({base, x, a, b}, [=] { return lowrank_add(base * 1, x, a, b, 2.0); }));
}

void bench_xent(at::ScalarType type, int64_t tokens, int64_t width, int64_t vocabulary) {
  const at::Tensor hidden = input({tokens, width}, type);
  const at::Tensor weight = at::randn({vocabulary, width}).to(type);
  const at::Tensor labels = at::randint(vocabulary, {tokens}, at::kLong);
  const auto composed_loss = [=](const at::Tensor& logits) {
    return at::nll_loss(at::log_softmax(logits.to(at::kFloat), 1), labels, {}, at::Reduction::Sum);
  };
  const std::string shape =
      std::string(" ") + at::toString(type) + " " + std::to_string(tokens) + " x ";
  compare("frozen head" + shape + std::to_string(width) + " x " + std::to_string(vocabulary),
          loss_step(hidden, [=] { return composed_loss(hidden.mm(weight.t())); }),
          loss_step(hidden, [=] { return frozen_head_cross_entropy(hidden, weight, labels); }));
  const at::Tensor logits = input({tokens, vocabulary}, type);
  compare("cross_entropy" + shape + std::to_string(vocabulary),
          loss_step(logits, [=] { return composed_loss(logits); }),
          loss_step(logits, [=] { return cross_entropy(logits, labels); }));
}

void bench_adamw(int64_t num_tensors, int64_t size) {
  std::vector<at::Tensor> p, g, m, v, steps;
  for (int64_t i = 0; i < num_tensors; ++i) {
    for (auto* list : {&p, &g, &m, &v}) list->push_back(at::rand({size}));
    steps.push_back(at::ones({}));
  }
  compare(
      "adamw (_fused_adamw_) " + std::to_string(num_tensors) + " x " + std::to_string(size),
      [=] { at::_fused_adamw_(p, g, m, v, {}, steps, 1e-3, 0.9, 0.999, 0.01, 1e-8, false, false); },
      [=] { adamw(p, g, m, v, 1, {}); });
  const at::Tensor flat = at::cat(g);
  compare(
      "sum_of_squares " + std::to_string(flat.numel()),
      [=] { at::linalg_vector_norm(flat).item<float>(); }, [=] { sum_of_squares(flat); });
}

/// Moments in 8 bits: decoded, moved and encoded by LibTorch's calls.
void bench_adamw8(int64_t size) {
  const at::Tensor p = at::rand({size}), g = at::randn({size});
  const auto moment = [&] {
    return EightBitMoment{at::zeros({size}, at::kByte), at::zeros({size / kAdamW8Block})};
  };
  const EightBitMoment first = moment(), second = moment();
  const auto decoded = [](const EightBitMoment& m, const at::Tensor& map) {
    return (map.index_select(0, m.codes.to(at::kInt)).view({-1, kAdamW8Block}) *
            m.absmax.unsqueeze(1))
        .flatten();
  };
  const auto encode = [](const at::Tensor& values, const at::Tensor& map, const EightBitMoment& m) {
    const at::Tensor rows = values.view({-1, kAdamW8Block});
    m.absmax.copy_(rows.abs().amax(1));
    const at::Tensor scaled = rows * (1 / m.absmax.clamp_min(1e-38)).unsqueeze(1);
    m.codes.copy_(
        at::bucketize(scaled, (map.slice(0, 0, 255) + map.slice(0, 1, 256)) / 2).flatten());
  };
  compare(
      "adamw_8bit " + std::to_string(size),
      [=] {
        const at::Tensor m = decoded(first, dynamic_map());
        const at::Tensor v = decoded(second, unsigned_dynamic_map());
        adamw(p, g, m, v, 1, {});
        encode(m, dynamic_map(), first), encode(v, unsigned_dynamic_map(), second);
      },
      [=] { adamw_8bit(p, g, {first}, {second}, 1, {}); });
}

}  // namespace

int main(int argc, char** argv) {
  at::set_num_threads(argc > 1 ? std::stoi(argv[1]) : 2);
  if (argc > 2) filter = argv[2];
  std::printf("%-44s %10s %10s   (ms, best of %d, %d threads)\n", "forward + backward", "LibTorch",
              "graft", kRounds, at::get_num_threads());
  for (at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    bench_elementwise(type, 512, 576, 1536);
    bench_elementwise(type, 2048, 4096, 14336);
    bench_lowrank(type, 512, 576, 1536);
    bench_lowrank(type, 2048, 4096, 4096);
    bench_xent(type, 512, 576, 49152);
  }
  bench_adamw(420, 11700);
  bench_adamw(1, 4914000);
  bench_adamw8(4915200);
}
