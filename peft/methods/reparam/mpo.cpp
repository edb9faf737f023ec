// MPO: y = W x + (M(T) - M(T0)) x, M(T) the matrix product operator T_1 ... T_n: the element at row
// (i_1 ... i_n) and column (j_1 ... j_n) is the product of the matrices T_k[:, i_k, j_k, :].
//   Liu et al. 2021, arXiv:2106.02205, sec. 3; the decomposition: Gao et al. 2020, arXiv:1904.06194
// Trains the auxiliary tensors T_k [D_k-1, i_k, j_k, D_k], all but the central one, which holds
// most numbers and is frozen. Init: T = T0, the decomposition of W with bonds D_k cut at `bond`,
// from the outside to the centre, so the model is unchanged at step 0. T0 and the centre are saved.
// Mergeable. The paper puts M(T) in the place of W, which a 4-bit base does not allow: here the
// difference is added, the same at full bonds, and nothing is compressed (no dimension squeezing).
#include <ATen/ATen.h>

#include <numeric>

#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct MpoConfig {
  Targets targets;
  int sites = 5;
  int bond = 16;

  void fields(configs::Fields& f) {
    f("sites", sites, f.range(3, 7), "n, tensors of the operator; the middle one is frozen");
    f("bond", bond, f.range(1, 4096), "the largest D_k");
  }
};

/// n factors of a size, as equal as its primes allow.
std::vector<int64_t> mpo_factors(int64_t size, int n) {
  std::vector<int64_t> primes, factors(static_cast<size_t>(n), 1);
  for (int64_t p = 2; size > 1; p = p * p > size ? size : p + 1) {
    for (; size % p == 0; size /= p) primes.push_back(p);
  }
  for (size_t i = primes.size(); i-- > 0;)
    *std::min_element(factors.begin(), factors.end()) *= primes[i];
  return factors;
}

/// The r columns that hold most of `m`, orthonormal; the largest number of each is positive.
Tensor mpo_basis(const Tensor& m, int64_t r) {
  const Tensor vectors = std::get<1>(at::linalg_eigh(m.mm(m.t()))).flip(1).slice(1, 0, r);
  return vectors * vectors.gather(0, vectors.abs().argmax(0, true)).sign();
}

class MpoLinear : public models::LinearAdapter {
 public:
  MpoLinear(const MpoConfig& c, const LinearSite& site, kernels::Key /*random*/, at::Device device)
      : rows_(mpo_factors(site.info.out, c.sites)), columns_(mpo_factors(site.info.in, c.sites)) {
    std::vector<int64_t> bonds(rows_.size() + 1, 1);
    for (size_t k = 0; k < rows_.size() / 2; ++k) bonds[k + 1] = next_bond(bonds[k], k, c.bond);
    for (size_t k = rows_.size() - 1; k > rows_.size() / 2; --k)
      bonds[k] = next_bond(bonds[k + 1], k, c.bond);
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    for (size_t k = 0; k < rows_.size(); ++k) {
      const auto zeros = [&] {
        return at::zeros({bonds[k], rows_[k], columns_[k], bonds[k + 1]}, options);
      };
      const std::string number = std::to_string(k);
      start_.push_back(register_buffer("mpo_start_" + number, zeros()));
      const bool is_centre = k == rows_.size() / 2;
      cores_.push_back(is_centre ? start_[k] : register_parameter("mpo_core_" + number, zeros()));
    }
  }
  static std::vector<Leaf> leaves() {
    return {{"mpo_core_0", "mpo_core_0"},   {"mpo_start_0", "mpo_start_0"},
            {"mpo_start_1", "mpo_start_1"}, {"mpo_start_2", "mpo_start_2"},
            {"mpo_start_3", "mpo_start_3"}, {"mpo_start_4", "mpo_start_4"},
            {"mpo_start_5", "mpo_start_5"}, {"mpo_start_6", "mpo_start_6"}};
  }
  /// Cuts W as (i_1 j_1) (i_2 j_2) ... from both ends; what is left is the centre.
  void initialize(const MpoConfig&, const LinearSite& site, BaseWeights& base) {
    const auto n = static_cast<int64_t>(rows_.size());
    std::vector<int64_t> shape = rows_, order;
    shape.insert(shape.end(), columns_.begin(), columns_.end());
    for (int64_t k = 0; k < n; ++k) order.insert(order.end(), {k, n + k});
    Tensor rest =
        base.weight(site).to(start_[0].device(), at::kDouble).reshape(shape).permute(order);
    for (size_t k = 0; k < rows_.size() / 2; ++k) {  // rest: [D_k, (i_k j_k), ...]
      const Tensor m = rest.reshape({start_[k].numel() / start_[k].size(3), -1});
      const Tensor basis = mpo_basis(m, start_[k].size(3));
      start_[k].copy_(basis.view(start_[k].sizes()));
      rest = basis.t().mm(m);
    }
    for (size_t k = rows_.size() - 1; k > rows_.size() / 2; --k) {
      const Tensor m = rest.reshape({-1, start_[k].numel() / start_[k].size(0)});
      const Tensor basis = mpo_basis(m.t(), start_[k].size(0));
      start_[k].copy_(basis.t().reshape(start_[k].sizes()));
      rest = m.mm(basis);
    }
    const Tensor& centre = start_[rows_.size() / 2];
    centre.copy_(rest.reshape(centre.sizes()));
    for (size_t k = 0; k < rows_.size(); ++k) cores_[k].copy_(start_[k]);
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x);
    return y + (apply(cores_, x) - apply(start_, x)).view_as(y).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const Tensor eye = at::eye(w.size(1), cores_[0].options().requires_grad(false));
    return w + (apply(cores_, eye) - apply(start_, eye)).t().to(w.scalar_type());
  }

 private:
  int64_t next_bond(int64_t bond, size_t k, int64_t most) const {
    return std::min(most, bond * rows_[k] * columns_[k]);
  }
  /// [N, out]: one tensor after the other; p numbers the outputs made, r the inputs still there.
  Tensor apply(const std::vector<Tensor>& tensors, const Tensor& x) const {
    const int64_t in = x.size(-1), rows = x.numel() / in;
    Tensor t = x.reshape({rows, 1, 1, in});
    for (const Tensor& core : tensors) {
      t = t.reshape({rows, -1, core.size(0), core.size(2), t.size(3) / core.size(2)});
      t = at::einsum("npdjr,doje->npoer", {t, core.to(x.scalar_type())}).flatten(1, 2);
    }
    return t.reshape({rows, -1});
  }

  std::vector<int64_t> rows_, columns_;  // i_k, j_k
  std::vector<Tensor> cores_, start_;    // T, T0; the same centre
};

}  // namespace

void register_mpo(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<MpoConfig, MpoLinear>>(); }});
}

}  // namespace graft::peft
