#include "peft/first_factors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "configs/check.h"
#include "peft/draws.h"

namespace graft::peft {
namespace {

/// B A with the singular values shared between both: sqrt(S / s) each.
FirstFactors shared_between(const Svd& svd, double s) {
  const Tensor root = (svd.s / s).sqrt();
  FirstFactors f;
  f.a = root.unsqueeze(1) * svd.vt;
  f.b = svd.u * root;
  return f;
}

FirstFactors given_up_by_the_base(FirstFactors f) {
  f.a = f.a.contiguous(), f.b = f.b.contiguous();
  f.taken_a = f.a, f.taken_b = f.b;
  return f;
}

/// `count` of 0 .. n-1, each at most once, in the order of a random key.
Tensor draw_places(int64_t n, int64_t count, kernels::Key key, at::Device device) {
  return draw_uniform({n}, 1, key, at::kCPU).argsort().slice(0, 0, count).to(device);
}

}  // namespace

Tensor residual(const Tensor& w, const Tensor& a, const Tensor& b, double s) {
  return w.to(at::kFloat) - s * b.to(w.device()).mm(a.to(w.device()));
}

Svd largest_triplets(const Tensor& w, int64_t rank, int iterations, kernels::Key key) {
  Tensor basis, projected = w;  // Halko, Martinsson and Tropp 2009, arXiv:0909.4061, alg. 4.4
  if (iterations > 0) {
    const auto orthonormal = [](const Tensor& t) { return std::get<0>(at::linalg_qr(t)); };
    basis = orthonormal(w.mm(draw_normal({w.size(1), rank}, 1, key, w.device())));
    for (int i = 0; i < iterations; ++i) basis = orthonormal(w.mm(orthonormal(w.t().mm(basis))));
    projected = basis.t().mm(w);
  }
  auto [u, s, vt] = at::linalg_svd(projected, /*full_matrices=*/false);
  if (basis.defined()) u = basis.mm(u);
  return {u.slice(1, 0, rank), s.slice(0, 0, rank), vt.slice(0, 0, rank)};
}

FirstFactors pissa(const Tensor& w, int64_t r, double s, int iterations, kernels::Key key) {
  return given_up_by_the_base(shared_between(largest_triplets(w, r, iterations, key), s));
}

FirstFactors olora(const Tensor& w, int64_t r) {
  const auto [q, upper] = at::linalg_qr(w);
  return given_up_by_the_base({upper.slice(0, 0, r), q.slice(1, 0, r), {}, {}});
}

FirstFactors mica(const Tensor& w, int64_t r) {
  const Tensor u = std::get<0>(at::linalg_svd(w, /*full_matrices=*/false));
  return {at::zeros({r, w.size(1)}, w.options()), u.slice(1, u.size(1) - r).contiguous(), {}, {}};
}

FirstFactors loftq(const Tensor& w, int64_t r, double s, int iterations,
                   const std::function<Tensor(const Tensor&)>& stored) {
  FirstFactors f;
  for (int i = 0; i < iterations; ++i) {
    f.taken_a = f.a, f.taken_b = f.b;
    const Tensor q = stored(f.a.defined() ? residual(w, f.a, f.b, s) : w);
    const FirstFactors next = shared_between(largest_triplets(w - q, r, 0, {}), s);
    f.a = next.a, f.b = next.b;
  }
  return f;
}

FirstFactors corda(const Tensor& w, const Tensor& covariance, int64_t r, double s,
                   CordaTriplets triplets) {
  const Tensor identity = at::eye(w.size(1), w.options());
  const Tensor mean = covariance.diag().mean();
  Tensor c, inverse;
  // As HF PEFT does: the smallest of these that an inverse in float32 is good for.
  for (double damp = 0.01;; damp *= 2) {
    c = covariance + identity * (mean * damp);
    inverse = at::linalg_inv(c);
    const double error = (c.mm(inverse) - identity).norm().item<double>();
    if (error < 0.05) break;
    GRAFT_CHECK(std::isfinite(error) && damp < 1e6, ExitCode::kNumerics,
                "init_lora_weights: corda: the covariance of a slot's inputs cannot be inverted");
  }
  const auto [u, values, vt] = at::linalg_svd(w.mm(c), /*full_matrices=*/false);
  const int64_t first = triplets == CordaTriplets::kLargest ? 0 : values.size(0) - r;
  const auto own = [&](const Tensor& t, int64_t dim) { return t.narrow(dim, first, r); };
  return given_up_by_the_base(
      shared_between({own(u, 1), own(values, 0), own(vt, 0).mm(inverse)}, s));
}

FirstFactors lora_ga(const Tensor& w, const Tensor& gradient, int64_t r, double s,
                     const GradientFactors& options, kernels::Key key) {
  // Exact where that is quick, else PEFT's projection, twice as wide as needed.
  const int64_t smaller = std::min(gradient.size(0), gradient.size(1));
  const int iterations = smaller <= 512 ? 0 : 4;
  const Svd svd = largest_triplets(gradient, std::min(4 * r, smaller), iterations, key);
  const Tensor all = at::arange(2 * r, at::TensorOptions().dtype(at::kLong).device(w.device()));
  Tensor of_a, of_b;
  if (options.direction == "ArBr") {
    of_a = all.slice(0, 1, 2 * r, 2), of_b = all.slice(0, 0, 2 * r, 2);
  } else if (options.direction == "A2rBr") {
    of_a = all.slice(0, r), of_b = all.slice(0, 0, r);
  } else if (options.direction == "ArB2r") {
    of_a = all.slice(0, 0, r), of_b = all.slice(0, r);
  } else {
    of_a = of_b = draw_places(2 * r, r, kernels::derive(key, 1), w.device());
  }
  Tensor a = svd.vt.index_select(0, of_a);
  const Tensor values = svd.s.index_select(0, of_b);
  Tensor b = svd.u.index_select(1, of_b) * values;
  if (options.scale == "stable") {
    b = b * (std::pow(static_cast<double>(w.size(0)), 0.25) / std::sqrt(options.stable_gamma));
  } else if (options.scale == "weight_svd") {
    const double largest =
        largest_triplets(w, r, iterations, kernels::derive(key, 2)).s[0].item<double>();
    if (const double own = values[0].item<double>(); own > 0) b = b * (largest / own);
  } else if (options.scale == "gd_scale") {
    a = a / s, b = b / s;
  }
  return given_up_by_the_base({a, b, {}, {}});
}

}  // namespace graft::peft
