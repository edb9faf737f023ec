// WaveFT: y = W x + s R^T S C x: S holds n wavelet coefficients of the update, R and C synthesise
// its rows and columns (one level, orthogonal wavelets).
//   Bilican et al. 2025, arXiv:2505.12532
// Trains the n values. Places: the first n of torch.randperm(out in) with seed random_loc_seed, of
// which the file holds the seed only. Init: zeros, so the model is unchanged at step 0. Mergeable.
// On a CPU and with n up to in + out, S acts on transformed activations, n products a token; else
// the update is built in every pass. Fields and files are those of HF PEFT's WaveFTConfig. As
// there, S is padded by the filter's length less two, the places are in its middle, and rows and
// columns swap their filters in the two mixed bands. Of PEFT's wavelets db1 to db4 are supported.
#include <ATen/ATen.h>

#include <cmath>

#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct WaveftConfig {
  Targets targets;
  int n_frequency = 2592;
  double scaling = 25;
  std::string wavelet_family = "db1";
  bool use_idwt = true;
  int random_loc_seed = 777;
  bool proportional_parameters = false;
  bool init_weights = true;
  std::map<std::string, int> n_frequency_pattern;
  int64_t all_places = 0, num_slots = 0;  ///< of the adapted slots

  void fields(configs::Fields& f) {
    f("n_frequency", n_frequency, f.at_least(1), "n, the trained values of a slot");
    f("scaling", scaling, f.positive().at_most(1e30), "s");
    f("wavelet_family", wavelet_family, f.one_of({"db1", "db2", "db3", "db4"}),
      "Daubechies wavelet of 2, 4, 6 or 8 numbers");
    f("use_idwt", use_idwt, "false: the values stand in the update itself");
    f("random_loc_seed", random_loc_seed, f.at_least(0), "of the places");
    f("proportional_parameters", proportional_parameters,
      "n_frequency is the mean: a slot gets its share by size");
    f("init_weights", init_weights, "false: small normal numbers, not as the base");
    f("n_frequency_pattern", n_frequency_pattern, f.at_least(1), "other n by slot, suffix or glob");
  }
  static PeftForm peft_form() { return {.type = "WAVEFT", .bias_only = "waveft_only"}; }
  bool starts_as_base() const { return init_weights; }
  int64_t count(const LinearSite& site) const {
    if (!proportional_parameters) return pattern_value(n_frequency_pattern, site, n_frequency);
    const double share = static_cast<double>(site.info.in * site.info.out) /
                         static_cast<double>(all_places);  // rounded as Python does
    return std::max<int64_t>(1, std::llrint(share * static_cast<double>(n_frequency * num_slots)));
  }
};

/// The synthesis filters [2, 1, L], low and high: Daubechies 1992, table 6.1.
Tensor waveft_filters(const std::string& family) {
  const std::map<std::string, std::vector<double>> low = {
      {"db1", {M_SQRT1_2, M_SQRT1_2}},
      {"db2",
       {0.48296291314453416, 0.83651630373780794, 0.22414386804201339, -0.12940952255126037}},
      {"db3",
       {0.33267055295008263, 0.80689150931333875, 0.45987750211933132, -0.13501102001039084,
        -0.085441273882241486, 0.035226291882100656}},
      {"db4",
       {0.23037781330885523, 0.71484657055254153, 0.63088076792959036, -0.02798376941698385,
        -0.18703481171888114, 0.030841381835986965, 0.032883011666982945, -0.010597401784997278}}};
  const Tensor l = at::tensor(low.at(family), at::kFloat);
  const Tensor signs = 1 - 2 * at::arange(l.size(0), at::kFloat).remainder(2);
  return at::stack({l, l.flip(0) * signs}).unsqueeze(1);
}

class WaveftLinear : public models::LinearAdapter {
 public:
  WaveftLinear(const WaveftConfig& c, const LinearSite& site, kernels::Key random,
               at::Device device)
      : in_(site.info.in), out_(site.info.out), scaling_(c.scaling) {
    const int64_t n = c.count(site);
    GRAFT_CHECK(n <= in_ * out_, "peft: ", site.name, ": n_frequency = ", n, ", the matrix has ",
                in_ * out_, " places");
    const Tensor places = first_of_randperm(in_ * out_, n, c.random_loc_seed).to(device);
    rows_ = places.div(in_, "floor"), columns_ = places.remainder(in_);
    width_ = in_, height_ = out_;
    if (c.use_idwt) {
      filters_ = waveft_filters(c.wavelet_family).to(device);
      length_ = filters_.size(2);  // synthesis returns L - 2 numbers less; an even number
      width_ = (in_ + length_ - 1) / 2 * 2, height_ = (out_ + length_ - 1) / 2 * 2;
      rows_ += (height_ - out_) / 2, columns_ += (width_ - in_) / 2;
      const Tensor row_band = rows_.div(height_ / 2, "floor") * (width_ / 2);
      const Tensor column_band = columns_.div(width_ / 2, "floor") * (height_ / 2);
      rows_ = rows_.remainder(height_ / 2) + column_band;
      columns_ = columns_.remainder(width_ / 2) + row_band;
    }
    const Tensor values = draw_normal({n}, c.init_weights ? 0 : 0.01, random, device);
    values_ = register_parameter("waveft_spectrum", values);
  }
  static std::vector<Leaf> leaves() { return {{"waveft_spectrum", "waveft_spectrum"}}; }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x);
    if (values_.size(0) > in_ + out_ || x.is_cuda())  // CUDA's index_add has no fixed order
      return y + at::linear(x, delta().to(x.scalar_type())).to(y.scalar_type());
    Tensor t = analyse(x.reshape({-1, in_}).to(at::kFloat)).index_select(1, columns_) * values_;
    t = at::zeros({t.size(0), height_}, t.options()).index_add(1, rows_, t);
    return y + (synthesise(t, out_) * scaling_).view_as(y).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override { return w + delta().to(w.scalar_type()); }

 private:
  /// [N, coefficients] to [N, n].
  Tensor synthesise(const Tensor& t, int64_t n) const {
    if (length_ == 0) return t;
    const Tensor full =
        at::conv_transpose1d(t.view({t.size(0), 2, -1}), filters_.to(t.scalar_type()), {}, 2);
    return full.squeeze(1).slice(1, length_ - 2, length_ - 2 + n);
  }
  /// The transpose of synthesise.
  Tensor analyse(const Tensor& x) const {
    if (length_ == 0) return x;
    const Tensor padded = at::constant_pad_nd(x, {length_ - 2, width_ - x.size(1)});
    return at::conv1d(padded.unsqueeze(1), filters_, {}, 2).flatten(1);
  }
  Tensor delta() const {
    Tensor t = at::zeros({height_ * width_}, values_.options());
    t = t.scatter(0, rows_ * width_ + columns_, values_).view({height_, width_});
    t = synthesise(t, in_).t().contiguous();
    return synthesise(t, out_).t() * scaling_;
  }

  int64_t in_, out_, width_, height_, length_ = 0;
  double scaling_;
  Tensor filters_, rows_, columns_, values_;
};

class Waveft : public LinearMethod<WaveftConfig, WaveftLinear> {
  void before_slots(AttachContext&) override {
    config_.all_places = 0;
    config_.num_slots = static_cast<int64_t>(sites_.size());
    for (const LinearSite* s : sites_) config_.all_places += s->info.in * s->info.out;
  }
};

}  // namespace

void register_waveft(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Waveft>(); }});
}

}  // namespace graft::peft
