// KronA against its definition, element by element, in both layouts.
#include <gtest/gtest.h>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

/// Element (row, column) of the update: A at the first digits of both numbers, B at the second
/// ones.
double element(const Tensor& a, const Tensor& b, int64_t row, int64_t column, bool b_rows_first) {
  const int64_t i2 = b.size(1), o1 = a.size(0), o2 = b.size(0);
  const int64_t row_a = b_rows_first ? row % o1 : row / o2;
  const int64_t row_b = b_rows_first ? row / o1 : row % o2;
  return a[row_a][column / i2].item<double>() * b[row_b][column % i2].item<double>();
}

void expect_definition(const std::string& method, const std::string& options, double scale,
                       bool b_rows_first) {
  const OneSlot slot(method, options);
  const Tensor a = slot.value("krona_a"), b = slot.value("krona_b");
  const Tensor x = fill("x", {2, 3, slot.site().info.in}, 1);
  const int64_t out = slot.site().info.out, in = slot.site().info.in;
  Tensor w = slot.weight();
  for (int64_t row = 0; row < out; ++row) {
    for (int64_t column = 0; column < in; ++column)
      w[row][column] += scale * element(a, b, row, column, b_rows_first);
  }
  EXPECT_TRUE(at::allclose(slot.forward(x), at::linear(x, w), 1e-4, 1e-5));
  EXPECT_TRUE(at::allclose(slot.adapter().merged(slot.weight()), w, 1e-5, 1e-6));
}

TEST(Krona, IsItsDefinition) { expect_definition("krona", "{scale: 3}", 3, false); }

TEST(Krona, DiffuseKronaNumbersTheOutputsByBFirst) {
  expect_definition("diffusekrona", "{a_out: 4, a_in: 6}", 1, true);
  expect_definition("krona", "{layout: diffusekrona, a_out: 4, a_in: 6}", 1, true);
}

TEST(Krona, TheUpdateHasFullRank) {
  const OneSlot slot("krona", "{}");
  const Tensor update =
      slot.adapter().merged(at::zeros({slot.site().info.out, slot.site().info.in})).detach();
  EXPECT_EQ(at::linalg_matrix_rank(update).item<int64_t>(), slot.site().info.in);
}

TEST(Krona, SizesThatDoNotDivideAreRefusedWithSomeThatDo) {
  models::io::expect_refused([] { OneSlot("krona", "{a_in: 5}"); },
                             "a_in = 5 does not divide 48; 6 and 8 do", ExitCode::kUsage);
}

}  // namespace
}  // namespace graft::peft
