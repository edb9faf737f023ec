#include "peft/delta_linear.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "configs/check.h"
#include "kernels/random/random.h"

namespace graft::peft {

void DeltaFields::fields(configs::Fields& f) {
  f("rank_dropout", rank_dropout, f.at_least(0).below(1),
    "in training, probability of each row of the update to rest");
  f("rank_dropout_scale", rank_dropout_scale, "scale the other rows up by the share that rests");
  f("module_dropout", module_dropout, f.at_least(0).below(1),
    "in training, probability of the whole update to rest");
  f("rs_lora", rs_lora, "scale by alpha / sqrt(r) instead of alpha / r");
  f("use_scalar", use_scalar, "start from random factors times a trained scalar of 0");
  f("weight_decompose", weight_decompose, "train the lengths of the rows of W + D too, as DoRA");
  f("wd_on_out", wd_on_out, "lengths of rows; false: of columns, as LyCORIS before 3.0");
}

double DeltaFields::scale(double alpha, int64_t r) const {
  return alpha / (rs_lora ? std::sqrt(static_cast<double>(r)) : static_cast<double>(r));
}

std::vector<std::string> DeltaFields::ours() {
  return {"rs_lora", "use_scalar", "weight_decompose", "wd_on_out"};
}

std::vector<Leaf> DeltaFields::leaves(std::vector<Leaf> own) {
  own.emplace_back("scalar", "scalar");
  own.emplace_back("dora_scale", "dora_scale");
  return own;
}

DeltaLinear::DeltaLinear(const DeltaFields& c, const LinearSite& site, kernels::Key random,
                         at::Device device)
    : fields_(c),
      out_(site.info.out),
      random_(random),
      options_(at::TensorOptions().dtype(at::kFloat).device(device)) {
  if (c.use_scalar) scalar_ = register_parameter("scalar", at::zeros({1}, options_));
  if (!c.weight_decompose) return;
  below_ = site.slot->adapters();
  magnitude_ =
      register_parameter("dora_scale", c.wd_on_out ? at::ones({out_, 1}, options_)
                                                   : at::ones({1, site.info.in}, options_));
}

void DeltaLinear::take_magnitudes(const LinearSite& site, BaseWeights& base) {
  if (!magnitude_.defined()) return;
  Tensor w = base.weight(site).to(magnitude_.device());
  for (const auto& adapter : below_) w = adapter->merged(w);
  magnitude_.copy_(lengths(w));
}

Tensor DeltaLinear::forward(const Tensor& x, const models::LinearOp& base,
                            const models::Pass& pass) {
  Tensor y = base(x);
  if (rests(pass)) return y;
  const Tensor rows = this->rows(pass);
  if (!magnitude_.defined()) return add(y, x, rows);
  const Tensor w = base.weight().to(at::kFloat), d = delta();
  const Tensor v = w + (rows.defined() ? d * rows.unsqueeze(1) : d);
  const Tensor change = v * (magnitude_ / lengths(v)) - w;
  return y + at::linear(x, change.to(x.scalar_type())).to(y.scalar_type());
}

Tensor DeltaLinear::merged(const Tensor& w) const {
  const Tensor d = scalar_.defined() ? delta() * scalar_ : delta();
  if (!magnitude_.defined()) return w + d.to(w.scalar_type());
  const Tensor v = w.to(at::kFloat) + d;
  return (v * (magnitude_ / lengths(v))).to(w.scalar_type());
}

/// A row of zeros has no direction.
Tensor DeltaLinear::lengths(const Tensor& w) const {
  return w.norm(2, fields_.wd_on_out ? 1 : 0, /*keepdim=*/true) +
         std::numeric_limits<float>::epsilon();
}

/// The same draws when a stage is recomputed, others in each lane.
Tensor DeltaLinear::rows(const models::Pass& pass) const {
  if (fields_.rank_dropout == 0 || !pass.training) return scalar_;
  const Tensor u = at::empty({out_}, options_);
  kernels::uniform(u, kernels::derive(pass.random, random_.stream, 1));
  Tensor mask = u.ge(fields_.rank_dropout).to(at::kFloat);
  if (fields_.rank_dropout_scale) mask = mask / mask.mean().clamp_min(1.0 / out_);
  return scalar_.defined() ? mask * scalar_ : mask;
}

bool DeltaLinear::rests(const models::Pass& pass) const {
  if (fields_.module_dropout == 0 || !pass.training) return false;
  const Tensor u = at::empty({1}, at::kFloat);
  kernels::uniform(u, kernels::derive(pass.random, random_.stream, 2));
  return u.item<double>() < fields_.module_dropout;
}

}  // namespace graft::peft
