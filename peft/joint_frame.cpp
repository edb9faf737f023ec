#include "peft/joint_frame.h"

#include <ATen/ATen.h>

#include "configs/check.h"

namespace graft::peft {

void JointFrame::set_v(const Tensor& basis) {
  found_ = basis.to(v.device());
  v.copy_(found_);
  version_ = v._version();
}

const Tensor& JointFrame::checked_v() {
  if (version_ == v._version()) return v;
  const double error = (v - found_).abs().max().item<double>();
  const double most = found_.abs().max().item<double>();
  GRAFT_CHECK(error <= 1e-3 * most, ExitCode::kData,
              "peft: frod_V in the file is not that of this base: largest difference ", error,
              ", largest number ", most);
  version_ = v._version();
  return v;
}

std::string module_kind(const LinearSite& site) {
  const std::string& path = site.hf_path;
  const size_t last = path.rfind('.');
  if (last == std::string::npos) return path;
  const size_t before = path.rfind('.', last - 1) + 1;  // 0 where there is none
  return path.substr(before, last - before) + "_" + path.substr(last + 1);
}

Tensor joint_basis(const std::vector<Tensor>& matrices, double alpha) {
  const Tensor stacked = at::cat(matrices);
  if (stacked.size(0) < stacked.size(1)) return std::get<2>(at::linalg_svd(stacked)).t();
  const auto [q, r] = at::linalg_qr(stacked);
  const Tensor identity = at::eye(r.size(1), r.options());
  Tensor mean = at::zeros_like(identity);
  int64_t begin = 0;
  for (const Tensor& matrix : matrices) {
    const Tensor part = q.slice(0, begin, begin + matrix.size(0));
    mean += at::linalg_inv(part.t().mm(part) + alpha * identity);
    begin += matrix.size(0);
  }
  mean /= static_cast<int64_t>(matrices.size());
  return r.t().mm(std::get<1>(at::linalg_eigh(mean)));
}

}  // namespace graft::peft
