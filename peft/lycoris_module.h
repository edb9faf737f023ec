// One module of a LyCORIS file: what reading and writing share.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <string>

#include "configs/check.h"
#include "peft/slot_map.h"

namespace graft::peft {

/// A module's path as LyCORIS writes it.
inline std::string underscored(std::string path) {
  std::replace(path.begin(), path.end(), '.', '_');
  return path;
}

/// The tensors of one module, taken one by one, so that what is left is what nobody knows.
class LycorisModule {
 public:
  explicit LycorisModule(const LinearSite& site) : site(site) {}
  bool has(const std::string& leaf) const { return left_.contains(leaf); }
  Tensor take(const std::string& leaf) {
    const auto found = left_.find(leaf);
    if (found == left_.end()) return {};
    Tensor value = found->second;
    left_.erase(found);
    return value;
  }
  Tensor need(const std::string& leaf) {
    GRAFT_CHECK(has(leaf), ExitCode::kData, site.hf_path, ": ", leaf, " is missing");
    return take(leaf);
  }
  Tensor need_matrix(const std::string& leaf) {
    Tensor t = need(leaf);
    GRAFT_CHECK(t.dim() == 2, ExitCode::kData, site.hf_path, ": ", leaf, " is ", t.sizes(),
                ", expected a matrix; convolutions are not supported");
    return t;
  }
  /// A scalar, or the value if there is none.
  double number(const std::string& leaf, double otherwise) {
    const Tensor t = take(leaf);
    GRAFT_CHECK(!t.defined() || t.numel() == 1, ExitCode::kData, site.hf_path, ": ", leaf, " is ",
                t.sizes(), ", expected one number");
    return t.defined() ? t.to(at::kDouble).item<double>() : otherwise;
  }
  /// @return whether there was none
  bool put(const std::string& leaf, const Tensor& value) {
    return left_.try_emplace(leaf, value).second;
  }
  const std::map<std::string, Tensor>& left() const { return left_; }

  const LinearSite& site;

 private:
  std::map<std::string, Tensor> left_;
};

/// The order of a block's elements in LyCORIS's boft, where those of its two halves alternate.
inline Tensor halves_together(int64_t k) {
  return at::arange(k).view({k / 2, 2}).t().flatten();  // 0 2 4 ... 1 3 5 ...
}

}  // namespace graft::peft
