// DeltaLinear: y = W x + D x with what LyCORIS lets every update D of a matrix have: rows of D, or
// all of it, that rest in a training pass; a trained scalar; a magnitude for each row or column of
// W + D (weight_decompose: DoRA, "DoHa", "DoKr").       Yeh et al. 2023, arXiv:2309.14859, app. B;
// formulas of lycoris-lora 4.1.3. Shared by locon, loha and lokr.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "peft/attach.h"

namespace graft::peft {

struct DeltaFields {
  double rank_dropout = 0, module_dropout = 0;
  bool rank_dropout_scale = false;
  bool rs_lora = false, use_scalar = false;
  bool weight_decompose = false, wd_on_out = true;

  void fields(configs::Fields& f);
  double scale(double alpha, int64_t r) const;
  /// Whether HF PEFT can compute the adapter: dropout is of training only.
  bool is_pefts() const { return !rs_lora && !use_scalar && !weight_decompose; }
  /// The names of the fields that PEFT does not have, but for rank_dropout_scale.
  static std::vector<std::string> ours();
  static std::vector<Leaf> leaves(std::vector<Leaf> own);
};

class DeltaLinear : public models::LinearAdapter {
 public:
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override;
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override;

 protected:
  DeltaLinear(const DeltaFields& c, const LinearSite& site, kernels::Key random, at::Device device);
  /// Magnitudes of the base's own rows or columns; of a derived class's initialize().
  void take_magnitudes(const LinearSite& site, BaseWeights& base);
  /// y + D x; `rows`, if defined, [out] or [1], multiplies the rows of D. May overwrite y.
  virtual Tensor add(const Tensor& y, const Tensor& x, const Tensor& rows) const = 0;
  virtual Tensor delta() const = 0;  ///< D [out, in], float32

 private:
  Tensor rows(const models::Pass& pass) const;
  bool rests(const models::Pass& pass) const;
  Tensor lengths(const Tensor& w) const;

  DeltaFields fields_;
  int64_t out_;
  kernels::Key random_;
  at::TensorOptions options_;
  std::vector<std::shared_ptr<models::LinearAdapter>> below_;
  Tensor scalar_, magnitude_;
};

}  // namespace graft::peft
