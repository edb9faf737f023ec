// Every CUDA kernel against its CPU twin, which the other tests of this folder hold against
// formulas and reference libraries: on odd shapes and on sizes beyond one block and one grid.
// Integer and once-rounded arithmetic must agree bit for bit; all else to twice the tolerance of
// the dtype, since both twins may be off by one. Needs a GPU, else every test skips itself.
#include <ATen/Context.h>

#include <array>
#include <functional>
#include <limits>

#include "kernels/adamw/adamw.h"
#include "kernels/adamw8/adamw8.h"
#include "kernels/gemm/gemm.h"
#include "kernels/int8/int8.h"
#include "kernels/lowrank/lowrank.h"
#include "kernels/nf4/nf4.h"
#include "kernels/random/random.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/rope/rope.h"
#include "kernels/swiglu/swiglu.h"
#include "kernels/xent/xent.h"
#include "tests/kernels/near.h"

namespace graft::kernels {
namespace {

using Tensors = std::vector<at::Tensor>;

class CudaTwins : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "no GPU here";
    at::manual_seed(11);
  }
};

at::Tensor on_gpu(const at::Tensor& tensor) { return tensor.to(at::kCUDA); }

bool same_bits(const at::Tensor& gpu, const at::Tensor& cpu) {
  return gpu.is_cuda() && gpu.scalar_type() == cpu.scalar_type() && gpu.sizes() == cpu.sizes() &&
         at::equal(gpu.cpu().flatten().view(at::kByte), cpu.flatten().view(at::kByte));
}

void expect_twins(const at::Tensor& gpu, const at::Tensor& cpu) {
  ASSERT_TRUE(gpu.is_cuda());
  ASSERT_EQ(gpu.scalar_type(), cpu.scalar_type());
  ASSERT_EQ(gpu.sizes(), cpu.sizes());
  const at::Tensor wanted = cpu.to(at::kDouble);
  const double error = (gpu.cpu().to(at::kDouble) - wanted).abs().max().item<double>();
  const double largest = wanted.abs().max().item<double>();
  EXPECT_LE(error, 2 * tolerance(cpu.scalar_type()) * largest) << "largest value " << largest;
}

/// A differentiable function of leaves; whatever else it needs it moves to their device.
using Function = std::function<at::Tensor(const Tensors& leaves)>;

/// Its value, then the gradients of the leaves for an upstream gradient of sines.
Tensors value_and_gradients(const Function& f, const Tensors& inputs, at::Device device) {
  Tensors leaves;
  for (const at::Tensor& input : inputs) {
    leaves.push_back(input.detach().to(device).clone().set_requires_grad(true));
  }
  const at::Tensor y = f(leaves);
  const at::Tensor upstream = at::arange(y.numel(), at::kDouble).sin().view(y.sizes());
  y.backward(upstream.to(device, y.scalar_type()) + (y.dim() == 0 ? 1 : 0));
  Tensors results = {y.detach()};
  for (const at::Tensor& leaf : leaves) results.push_back(leaf.grad());
  return results;
}

/// EXPECTs that both devices agree, and that the GPU's bits repeat.
void expect_twins(const Function& f, const Tensors& inputs) {
  const Tensors cpu = value_and_gradients(f, inputs, at::kCPU);
  const Tensors gpu = value_and_gradients(f, inputs, at::kCUDA);
  const Tensors again = value_and_gradients(f, inputs, at::kCUDA);
  for (size_t i = 0; i < cpu.size(); ++i) {
    SCOPED_TRACE(i == 0 ? std::string("the value") : "the gradient of leaf " + std::to_string(i));
    expect_twins(gpu[i], cpu[i]);
    EXPECT_TRUE(same_bits(again[i], gpu[i].cpu()));
  }
}

constexpr std::array kTypes = {at::kFloat, at::kBFloat16};

at::Tensor random(at::IntArrayRef shape, at::ScalarType type = at::kFloat, double size = 1) {
  return (at::randn(shape) * size).to(type);
}

// --- random: sizes beyond the grid (4096 blocks of 256 threads, four elements each)

constexpr std::array<int64_t, 4> kDraws = {1, 3, 1023, 4'194'304 + 4099};
constexpr std::array<uint64_t, 4> kOffsets = {0, 1, 7, (uint64_t{1} << 34) + 3};

TEST_F(CudaTwins, UniformAndDropoutHaveTheSameBits) {
  for (const int64_t size : kDraws) {
    for (const uint64_t offset : kOffsets) {
      const at::Tensor cpu = at::empty({size}), gpu = on_gpu(cpu);
      uniform(cpu, {5, size_t(size)}, offset), uniform(gpu, {5, size_t(size)}, offset);
      EXPECT_TRUE(same_bits(gpu, cpu)) << size << " from " << offset;
      dropout_mask(cpu, {6, 1}, 0.3, offset), dropout_mask(gpu, {6, 1}, 0.3, offset);
      EXPECT_TRUE(same_bits(gpu, cpu)) << size << " from " << offset;
    }
  }
}

TEST_F(CudaTwins, NormalIsEqualToAMillionth) {
  for (const int64_t size : kDraws) {
    const at::Tensor cpu = at::empty({size}), gpu = on_gpu(cpu);
    normal(cpu, {7, 1}, 5), normal(gpu, {7, 1}, 5);
    EXPECT_LE((gpu.cpu() - cpu).abs().max().item<double>(), 1e-6 * 5.8);
  }
}

// --- storage of frozen matrices

/// Values of all magnitudes; a block of zeros and tiny numbers where there is room.
at::Tensor weights(int64_t size) {
  at::Tensor w = random({size}) * random({size}).exp();
  if (size > 300) w.slice(0, 64, 128).zero_(), w.slice(0, 128, 192).mul_(1e-38);
  return w;
}

void expect_same_codes(const FourBitCodes& gpu, const FourBitCodes& cpu) {
  EXPECT_TRUE(same_bits(gpu.codes, cpu.codes));
  EXPECT_TRUE(same_bits(gpu.absmax, cpu.absmax));
  EXPECT_EQ(gpu.nested_absmax.defined(), cpu.nested_absmax.defined());
  if (cpu.nested_absmax.defined()) {
    EXPECT_TRUE(same_bits(gpu.nested_absmax, cpu.nested_absmax));
    EXPECT_EQ(gpu.nested_offset, cpu.nested_offset);
  }
}

/// Decodes codes of the CPU on both devices, on the GPU also from and to addresses that no wide
/// access may use.
void expect_same_values(const FourBitCodes& q, int64_t size) {
  FourBitCodes there = q;
  there.codes = on_gpu(q.codes), there.absmax = on_gpu(q.absmax);
  if (q.nested_absmax.defined()) there.nested_absmax = on_gpu(q.nested_absmax);
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor cpu = at::empty({size}, type), gpu = at::empty_like(cpu, at::kCUDA);
    dequantize(q, cpu), dequantize(there, gpu);
    EXPECT_TRUE(same_bits(gpu, cpu)) << size << " " << type;
    FourBitCodes shifted = there;
    shifted.codes = at::cat({there.codes.slice(0, 0, 1), there.codes}).slice(0, 1);
    const at::Tensor from_odd = at::empty({size + 1}, gpu.options()).slice(0, 1);
    dequantize(shifted, from_odd);
    EXPECT_TRUE(same_bits(from_odd, cpu)) << size << " " << type << " at odd addresses";
  }
}

TEST_F(CudaTwins, FourBitCodesAndValuesHaveTheSameBits) {
  for (const int64_t size :
       {1, 2, 63, 64, 65, 127, 333, 2047, 2049, 64 * 256 + 64, 3'145'728 + 17}) {
    for (const FourBitType type : {FourBitType::kNf4, FourBitType::kFp4}) {
      for (const Scales scales : {Scales::kPlain, Scales::kNested}) {
        for (const at::ScalarType dtype : kTypes) {
          SCOPED_TRACE(::testing::Message() << size << " " << dtype << " type " << int(type)
                                            << " scales " << int(scales));
          const at::Tensor w = weights(size).to(dtype);
          const FourBitCodes cpu = quantize(w, type, scales);
          expect_same_codes(quantize(on_gpu(w), type, scales), cpu);
          expect_same_values(cpu, size);
        }
      }
    }
  }
}

TEST_F(CudaTwins, Int8CodesAndValuesHaveTheSameBits) {
  for (const auto& [rows, cols] : {std::pair{1, 1}, {3, 7}, {5, 1031}, {1000, 257}, {2, 40000}}) {
    for (const at::ScalarType type : kTypes) {
      SCOPED_TRACE(::testing::Message() << rows << " x " << cols << " " << type);
      at::Tensor w = weights(int64_t{rows} * cols).view({rows, cols});
      w[rows / 2].zero_();
      const Int8Codes cpu = quantize_int8(w.to(type)), gpu = quantize_int8(on_gpu(w.to(type)));
      EXPECT_TRUE(same_bits(gpu.codes, cpu.codes));
      EXPECT_TRUE(same_bits(gpu.absmax, cpu.absmax));
      const at::Tensor values = at::empty({rows, cols}, type), there = on_gpu(values);
      dequantize_int8(cpu, values), dequantize_int8(gpu, there);
      EXPECT_TRUE(same_bits(there, values));
    }
  }
}

// --- layers, forward and backward

TEST_F(CudaTwins, RmsNormAgrees) {
  const auto norm = [](const Tensors& leaf) { return rms_norm(leaf[0], leaf[1], 1e-5); };
  for (const int64_t width : {3, 31, 255, 576, 1031, 4099}) {
    for (const at::ScalarType type : kTypes) {
      SCOPED_TRACE(::testing::Message() << width << " " << type);
      expect_twins(norm, {random({3, 37, width}, type, 2), random({width}, type) + 1});
    }
  }
}

TEST_F(CudaTwins, SwigluAgrees) {
  const auto gate = [](const Tensors& leaf) { return swiglu(leaf[0], leaf[1]); };
  for (const int64_t size : {1, 255, 1023, 8192 * 256 + 77}) {  // the last one is beyond the grid
    for (const at::ScalarType type : kTypes) {
      for (const double scale : {1.0, 60.0}) {  // e^-g overflows
        SCOPED_TRACE(::testing::Message() << size << " " << type << " times " << scale);
        expect_twins(gate, {random({size}, type, scale), random({size}, type)});
      }
    }
  }
}

TEST_F(CudaTwins, RopeAgrees) {
  struct Shape {
    int64_t batch, length, heads, width;
  };
  for (const Shape s : {Shape{1, 1, 1, 2}, {2, 37, 3, 10}, {1, 5, 9, 64}, {3, 7, 40, 128}}) {
    for (const bool per_sample : {false, true}) {
      const at::Tensor half = random({s.batch, s.length, s.width / 2}, at::kFloat, 9);
      const at::Tensor all = at::cat({half, half}, 2), angles = per_sample ? all : all[0];
      const auto turn = [&](const Tensors& leaf) {  // a slice of a fused projection
        const at::Tensor x = leaf[0].slice(2, 1, 1 + s.heads);
        return rope(x, angles.cos().to(x.device()), angles.sin().to(x.device()));
      };
      for (const at::ScalarType type : kTypes) {
        SCOPED_TRACE(::testing::Message() << s.heads << " heads of " << s.width << " " << type);
        expect_twins(turn, {random({s.batch, s.length, s.heads + 2, s.width}, type)});
      }
    }
  }
}

TEST_F(CudaTwins, LowrankAddAgrees) {
  for (const at::ScalarType type : kTypes) {
    SCOPED_TRACE(type);
    const at::Tensor base = random({3, 67, 129}, type);
    const auto add = [&](const Tensors& leaf) {
      return lowrank_add(base.to(leaf[0].device(), type, false, true), leaf[0], leaf[1], leaf[2],
                         1.75);
    };
    expect_twins(add, {random({3, 67, 211}, type), random({5, 211}, type), random({129, 5}, type)});
  }
}

TEST_F(CudaTwins, ProductsOfFloat32AreNotRoundedToTf32) {
  for (const at::ScalarType type : kTypes) {
    const at::Tensor x = random({7, 73, 1031}, type), w = random({257, 1031}, type);
    expect_twins(gemm_linear(on_gpu(x), on_gpu(w)), gemm_linear(x, w));
  }
}

// --- the loss

at::Tensor some_labels(int64_t rows, int64_t vocabulary) {
  return at::randint(vocabulary, {rows}, at::kLong)
      .masked_fill(at::arange(rows) % 3 == 1, kIgnoredLabel);
}

TEST_F(CudaTwins, CrossEntropyAgrees) {
  for (const auto& [rows, vocabulary] : {std::pair{5, 1}, {7, 17}, {33, 1003}, {3, 50001}}) {
    const at::Tensor labels = some_labels(rows, vocabulary);
    const auto loss = [&](const Tensors& leaf) {
      return cross_entropy(leaf[0], labels.to(leaf[0].device())).to(at::kFloat);
    };
    for (const at::ScalarType type : kTypes) {
      SCOPED_TRACE(::testing::Message() << rows << " x " << vocabulary << " " << type);
      expect_twins(loss, {random({rows, vocabulary}, type, 3)});
    }
  }
}

TEST_F(CudaTwins, FrozenHeadAgreesInOneChunkAndInMany) {
  constexpr int64_t kRows = 61, kWidth = 96, kVocabulary = 1003;
  const at::Tensor labels = some_labels(kRows, kVocabulary);
  for (const at::ScalarType type : kTypes) {
    const at::Tensor hidden = random({kRows, kWidth}, type);
    const at::Tensor weight = random({kVocabulary, kWidth}, type, 0.2);
    for (const int64_t logits_bytes : {int64_t{0}, 5 * kVocabulary * 4}) {
      SCOPED_TRACE(::testing::Message() << type << " chunks of " << logits_bytes << " bytes");
      const auto on = [&](at::Device device, Gradient gradient) {
        return frozen_head_loss(hidden.to(device), weight.to(device), labels.to(device), gradient,
                                logits_bytes);
      };
      const XentResult cpu = on(at::kCPU, Gradient::kCompute),
                       gpu = on(at::kCUDA, Gradient::kCompute);
      expect_twins(gpu.d_hidden, cpu.d_hidden);
      const double wanted = cpu.loss_sum.item<double>();
      EXPECT_NEAR(gpu.loss_sum.item<double>(), wanted, 2 * tolerance(type) * wanted);
      EXPECT_EQ(on(at::kCUDA, Gradient::kSkip).loss_sum.item<double>(),
                gpu.loss_sum.item<double>());
    }
  }
}

// --- the optimiser

TEST_F(CudaTwins, AdamWAgreesOverMorePiecesThanALaunchTakes) {
  const AdamWConfig config{.learning_rate = 3e-3, .beta1 = 0.85, .weight_decay = 0.1};
  std::array<Tensors, 3> cpu, gpu;  // parameters, first and second moments
  std::vector<int64_t> sizes(70, 3);
  sizes.insert(sizes.end(), {1, 255, 8191, 8192, 8193, 600'001});
  for (const int64_t size : sizes) {
    for (size_t i = 0; i < 3; ++i) {
      cpu[i].push_back(i == 0 ? random({size}) : at::zeros({size}));
      gpu[i].push_back(on_gpu(cpu[i].back()));
    }
  }
  for (int64_t step = 1; step <= 3; ++step) {
    Tensors gradients, there;
    for (const int64_t size : sizes) {
      gradients.push_back(random({size}));
      there.push_back(on_gpu(gradients.back()));
    }
    adamw(cpu[0], gradients, cpu[1], cpu[2], step, config);
    adamw(gpu[0], there, gpu[1], gpu[2], step, config);
  }
  for (size_t i = 0; i < 3; ++i) {
    for (size_t j = 0; j < sizes.size(); ++j) expect_twins(gpu[i][j], cpu[i][j]);
  }
}

TEST_F(CudaTwins, AdamWIn8BitsAgreesOverMorePiecesThanALaunchTakes) {
  const AdamWConfig config{.learning_rate = 3e-3, .beta1 = 0.85, .weight_decay = 0.1};
  Tensors cpu, gpu;
  std::array<std::vector<EightBitMoment>, 2> moments, there;
  const std::vector<int64_t> sizes = {1, 255, 256, 257, 8191, 8192, 8193, 600'001};
  for (const int64_t size : sizes) {
    cpu.push_back(random({size})), gpu.push_back(on_gpu(cpu.back()));
    for (size_t i = 0; i < 2; ++i) {
      moments[i].push_back({at::zeros({size}, at::kByte), at::zeros({(size + 255) / 256})});
      there[i].push_back({on_gpu(moments[i].back().codes), on_gpu(moments[i].back().absmax)});
    }
  }
  for (int64_t step = 1; step <= 3; ++step) {
    Tensors gradients, on_device;
    for (const int64_t size : sizes) {
      gradients.push_back(random({size}));
      on_device.push_back(on_gpu(gradients.back()));
    }
    adamw_8bit(cpu, gradients, moments[0], moments[1], step, config);
    adamw_8bit(gpu, on_device, there[0], there[1], step, config);
  }
  for (size_t j = 0; j < sizes.size(); ++j) {
    for (size_t i = 0; i < 2; ++i) {
      expect_twins(there[i][j].absmax, moments[i][j].absmax);
      // The compilers contract differently, so a number at a midpoint may go either way.
      const at::Tensor apart =
          (there[i][j].codes.cpu().to(at::kInt) - moments[i][j].codes.to(at::kInt)).abs();
      EXPECT_LE(apart.max().item<int>(), 1);
      EXPECT_LE(apart.sum().item<int64_t>(), sizes[j] / 1000);
    }
    // A parameter moves by about the learning rate a step, by less of it where codes differ.
    EXPECT_LT((gpu[j].cpu() - cpu[j]).abs().mean().item<double>(), 1e-3 * 3 * 3e-3);
  }
}

TEST_F(CudaTwins, SumOfSquaresAgreesInFloat64) {
  for (const int64_t size : {0, 1, 17, 8192, 8193, 1'000'003}) {
    const at::Tensor values = random({size});
    const double wanted = sum_of_squares(values);
    EXPECT_NEAR(sum_of_squares(on_gpu(values)), wanted, 1e-13 * wanted);
  }
  EXPECT_NEAR(sum_of_squares(on_gpu(at::full({1000}, 3e38F))) / 9e79, 1, 1e-6);
}

TEST_F(CudaTwins, FirstNonFiniteIsTheSame) {
  at::Tensor values = random({400, 50});
  EXPECT_EQ(first_non_finite(on_gpu(values)), -1);
  values[310][2] = std::numeric_limits<float>::quiet_NaN();
  values[300][7] = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(first_non_finite(on_gpu(values)), 300 * 50 + 7);
}

}  // namespace
}  // namespace graft::kernels
