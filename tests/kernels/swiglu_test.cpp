// swiglu against silu(gate) * up of LibTorch's autograd in float64.
#include "kernels/swiglu/swiglu.h"

#include "configs/check.h"
#include "tests/kernels/near.h"

namespace graft::kernels {
namespace {

void expect_agreement(at::ScalarType type) {
  at::manual_seed(1);
  for (int64_t size : {1, 15, 16, 100, 40000}) {
    const at::Tensor gate = leaf(at::randn({size}) * 4, type), up = leaf(at::randn({size}), type);
    const at::Tensor d_y = at::randn({size}).to(type);
    const at::Tensor y = swiglu(gate, up);
    y.backward(d_y);
    const at::Tensor g = leaf(gate, at::kDouble), u = leaf(up, at::kDouble);
    const at::Tensor expected = at::silu(g) * u;
    expected.backward(d_y.to(at::kDouble));
    expect_near(y.detach(), expected.detach());
    expect_near(gate.grad(), g.grad());
    expect_near(up.grad(), u.grad());
  }
}

TEST(Swiglu, AgreesWithFloat64InFloat32) { expect_agreement(at::kFloat); }
TEST(Swiglu, AgreesWithFloat64InBfloat16) { expect_agreement(at::kBFloat16); }

TEST(Swiglu, KeepsItsRelativeErrorInTheTail) {  // that is, the exponential does
  const at::Tensor gate = at::linspace(-87, 87, 100000);
  const at::Tensor exact = at::silu(gate.to(at::kDouble));
  const at::Tensor error = (swiglu(gate, at::ones_like(gate)).to(at::kDouble) - exact) / exact;
  EXPECT_LE(error.abs().max().item<double>(), 4e-7);
}

TEST(Swiglu, SaturatesWithoutOverflow) {
  const at::Tensor gate = at::tensor({-1e4F, -100.0F, -88.5F, 0.0F, 88.5F, 100.0F, 1e4F});
  const at::Tensor leaf_gate = leaf(gate, at::kFloat);
  const at::Tensor y = swiglu(leaf_gate, at::ones_like(gate));
  y.backward(at::ones_like(gate));
  EXPECT_TRUE(at::allclose(y, at::silu(gate)));
  EXPECT_TRUE(at::isfinite(leaf_gate.grad()).all().item<bool>());
}

TEST(Swiglu, RoundsBfloat16LikeLibTorch) {
  const at::Tensor gate = at::randn({999}).to(at::kBFloat16),
                   up = at::randn({999}).to(at::kBFloat16);
  const at::Tensor exact = at::silu(gate.to(at::kDouble)) * up.to(at::kDouble);
  const at::Tensor differs = swiglu(gate, up) != exact.to(at::kBFloat16);
  EXPECT_LE(differs.sum().item<int64_t>(), 2);  // ties that float32 arithmetic tips over
}

TEST(Swiglu, HasTheSameBitsAtAnyThreadCount) {
  const at::Tensor gate = at::randn({7, 9999}), up = at::randn({7, 9999});
  expect_same_bits_at_any_thread_count([&] {
    const at::Tensor g = leaf(gate, at::kFloat);
    const at::Tensor y = swiglu(g, up);
    y.backward(up);
    return std::vector<at::Tensor>{y.detach(), g.grad()};
  });
}

TEST(Swiglu, TakesEmptyTensorsAndRefusesUnequalOnes) {
  EXPECT_EQ(swiglu(at::empty({0, 4}), at::empty({0, 4})).numel(), 0);
  EXPECT_THROW(swiglu(at::empty({2}), at::empty({3})), Error);
  EXPECT_THROW(swiglu(at::empty({2}, at::kHalf), at::empty({2}, at::kHalf)), Error);
}

}  // namespace
}  // namespace graft::kernels
