// What the contract and PEFT's adapters do not show of single methods of methods/reparam: a second
// formula where PEFT computes none, starts that hold up to rounding, shapes that do not fit.
#include <gtest/gtest.h>

#include "peft/projection.h"
#include "peft/rotation.h"
#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

std::shared_ptr<Method> make(const std::string& name, const std::string& options) {
  std::shared_ptr<Method> method = methods().make(name);
  read_fields(*method, options);
  return method;
}

const Tensor& value(const Tiny& tiny, const std::string& leaf) {
  for (const Param& param : tiny.params()) {
    if (param.name.ends_with(leaf)) return param.value;
  }
  throw Error(ExitCode::kUsage, "no parameter " + leaf);
}

double largest_difference(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

Tensor block_diagonal(const Tensor& blocks_NBB) {
  std::vector<Tensor> blocks = blocks_NBB.unbind();
  return at::block_diag(blocks);
}

// PEFT builds factors beyond the first only with its CUDA extension; here they are from its
// description: in runs of k 2^i elements the pieces of k / 2 with even numbers go first.
TEST(Boft, IsTheProductOfItsButterflyFactors) {
  constexpr int64_t kIn = 48, kBlock = 4, kFactors = 3;
  Tiny tiny("llama");
  tiny.attach("boft", make("boft", "{target_modules: block.0.attn.q, boft_n_butterfly_factor: 3}"));
  tiny.load();
  tiny.jitter();
  const at::NoGradGuard no_grad;
  const Tensor r = value(tiny, "boft_r"), s = value(tiny, "boft_s");
  Tensor rotation = at::eye(kIn);
  for (int64_t i = 0; i < kFactors; ++i) {
    const int64_t run = kBlock << i, pieces = 2 * run / kBlock;
    Tensor p = at::zeros({kIn, kIn});
    for (int64_t row = 0; row < kIn; ++row) {
      const int64_t piece = row % run / (kBlock / 2), begin = row - row % run;
      const int64_t from = piece < pieces / 2 ? 2 * piece : 2 * (piece - pieces / 2) + 1;
      p[row][begin + from * (kBlock / 2) + row % (kBlock / 2)] = 1;
    }
    const Tensor skew = (r[i] - r[i].transpose(1, 2)) / 2, one = at::eye(kBlock);
    const Tensor blocks = (one - skew).bmm((one + skew).inverse());
    rotation = p.mm(block_diagonal(blocks)).mm(p.t()).mm(rotation);
  }
  EXPECT_LT(largest_difference(rotation.mm(rotation.t()), at::eye(kIn)), 1e-5);
  const LinearSite* site = tiny.adapters.slots().find_linear("block.0.attn.q");
  const Tensor w = fill("w", {96, kIn}, 1);
  EXPECT_LT(largest_difference(site->slot->adapters()[0]->merged(w), w.mm(rotation.t()) * s), 1e-5);
}

TEST(Rotation, CayleysMatrixIsOrthogonalAndItsSeriesTheTranspose) {
  const Tensor q = skew_matrices(fill("q", {5, 28}, 0.02), 8), one = at::eye(8);
  const Tensor exact = one + cayley_change(q), series = one + neumann_change(q, 9);
  EXPECT_LT(largest_difference(exact.bmm(exact.transpose(1, 2)), one.expand({5, 8, 8})), 1e-6);
  EXPECT_LT(largest_difference(series, exact.transpose(1, 2)), 1e-6);
  EXPECT_TRUE(at::equal(q[0][0].slice(0, 1), fill("q", {5, 28}, 0.02)[0].slice(0, 0, 7)));
}

TEST(Rotation, TurnsEachPieceByItsOwnMatrix) {
  const Tensor r = fill("r", {3, 4, 4}, 1), x = fill("x", {2, 5, 12}, 1);
  const Tensor turned = rotate_blocks(x, r - at::eye(4));
  EXPECT_LT(largest_difference(turned, x.matmul(block_diagonal(r))), 1e-6);
}

TEST(Hra, StartsAtTheBaseUpToRounding) {
  Tiny tiny("llama");
  tiny.attach("hra", make("hra", "{target_modules: all-linear}"));
  tiny.load();
  const data::Batch batch = make_lane(0).batch;
  EXPECT_LT(largest_difference(tiny.logits(batch), tiny.logits(batch, false)), 1e-4);
}

TEST(Hira, WithoutInitialWeightsEmbeddingsAreNormalAsPeftsAre) {
  Tiny tiny("llama");
  tiny.attach("hira", make("hira", "{target_modules: embed, r: 16, init_weights: false}"));
  tiny.load();
  for (const Param& param : tiny.params()) {  // A [16, 128], B [48, 16]
    EXPECT_NEAR(param.value.std().item<double>(), 1, 0.1) << param.name;
    EXPECT_NEAR(param.value.mean().item<double>(), 0, 0.1) << param.name;
  }
}

TEST(Oft, CoftKeepsTheRotationsSmall) {
  constexpr double kEps = 0.05;
  Tiny tiny("llama");
  tiny.attach("oft", make("oft", "{coft: true, eps: 0.05, oft_block_size: 8}"));
  tiny.load();
  for (int i = 0; i < 5; ++i) tiny.step({make_lane(0)}, 1, 0.1);
  for (const Param& param : tiny.params()) {
    const Tensor norms = skew_matrices(param.value.detach(), 8).flatten(1).norm(2, 1);
    EXPECT_NEAR(norms.max().item<double>(), kEps / std::sqrt(6), 1e-6) << param.name;
  }
}

// Printed by PyTorch 2.11: PEFT's VeRA for r = 4, 48 inputs, 96 outputs, projection_prng_key = 5.
TEST(Projection, IsWhatPytorchDraws) {
  const at::Generator generator = torch_generator(5);
  const Tensor a = torch_kaiming_uniform({4, 48}, 0, generator);
  const Tensor b = torch_kaiming_uniform({96, 4}, 0, generator);
  EXPECT_EQ(a[0][0].item<double>(), 0x1.de417cp-3);
  EXPECT_EQ(a[0][1].item<double>(), -0x1.0eb98p-2);
  EXPECT_EQ(a[3][47].item<double>(), 0.008097294718027115);
  EXPECT_EQ(b[0][0].item<double>(), 1.0335944890975952);
  EXPECT_EQ(b[95][3].item<double>(), 1.075158715248108);
}

TEST(Reparam, ShapesThatDoNotFitAreRefusedWithTheNumbers) {
  const auto refused = [](const char* name, const char* options, const char* words) {
    Tiny tiny("llama");
    tiny.attach(name, make(name, options));
    models::io::expect_refused([&] { tiny.load(); }, words, ExitCode::kUsage);
  };
  refused("boft", "{boft_block_size: 5}", "48 inputs: blocks of 5 with 1 factors");
  refused("boft", "{boft_block_size: 3, boft_n_butterfly_factor: 2}", "an even size, not 3");
  refused("boft", "{boft_block_num: 4}", "set one of them");
  refused("hra", "{apply_GS: true, r: 50}", "r = 50 reflections");
  refused("oft", "{r: 4}", "set one of them");
  refused("oft", "{oft_block_size: 1}", "blocks of size 1");
  refused("psoft", "{r: 40}", "fewer than r = 40");
  refused("road", "{}", "96 outputs, no multiple of group_size = 64");
  refused("vblora", "{}", "one of the divisors of 48: 2, 3");
  refused("vblora", "{vector_length: 16, num_vectors: 2, topk: 3}", "topk = 3");
}

}  // namespace
}  // namespace graft::peft
