// FourierFT: y = W x + s Re(F^-1(S)) x, F the two-dimensional Fourier transform, S [out, in] zero
// but for n places that all slots of one shape share.
//   Gao et al. 2024, arXiv:2405.03003, eq. 2-4
// Trains the n values c. Places: the first n of torch.randperm(out in) with seed random_loc_seed,
// of which the file holds the seed only. Init: c normal, so the model is NOT the base at step 0
// unless init_weights is true (zeros). Mergeable. Builds Re(F^-1(S)) in every pass: as products of
// activations it has 2 n columns, as many numbers as the matrix at the default n. Fields and files
// are those of HF PEFT's FourierFTConfig; it divides by out in (the paper leaves that open), hence
// scaling 150.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct FourierftConfig {
  Targets targets;
  int n_frequency = 1000;
  double scaling = 150;
  int random_loc_seed = 777;
  bool init_weights = false;
  std::map<std::string, int> n_frequency_pattern;

  void fields(configs::Fields& f) {
    f("n_frequency", n_frequency, f.at_least(1), "n, the trained values of a slot");
    f("scaling", scaling, f.positive().at_most(1e30), "s");
    f("random_loc_seed", random_loc_seed, f.at_least(0), "of the places");
    f("init_weights", init_weights, "true: zeros, the base; false: normal numbers");
    f("n_frequency_pattern", n_frequency_pattern, f.at_least(1), "other n by slot, suffix or glob");
  }
  static PeftForm peft_form() { return {.type = "FOURIERFT", .bias_only = "fourier_only"}; }
  bool starts_as_base() const { return init_weights; }
};

class FourierftLinear : public models::LinearAdapter {
 public:
  FourierftLinear(const FourierftConfig& c, const LinearSite& site, kernels::Key random,
                  at::Device device)
      : in_(site.info.in), out_(site.info.out), scaling_(c.scaling) {
    const int64_t n = pattern_value(c.n_frequency_pattern, site, c.n_frequency);
    GRAFT_CHECK(n <= in_ * out_, "peft: ", site.name, ": n_frequency = ", n, ", the matrix has ",
                in_ * out_, " places");
    places_ = first_of_randperm(in_ * out_, n, c.random_loc_seed).to(device);
    const Tensor values = draw_normal({n}, c.init_weights ? 0 : 1, random, device);
    values_ = register_parameter("fourierft_spectrum", values);
  }
  static std::vector<Leaf> leaves() { return {{"fourierft_spectrum", "fourierft_spectrum"}}; }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x);
    return y + at::linear(x, delta().to(x.scalar_type())).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override { return w + delta().to(w.scalar_type()); }

 private:
  Tensor delta() const {
    const Tensor spectrum = at::zeros({out_ * in_}, values_.options()).scatter(0, places_, values_);
    return at::real(at::fft_ifft2(spectrum.view({out_, in_}))) * scaling_;
  }

  int64_t in_, out_;
  double scaling_;
  Tensor places_, values_;
};

}  // namespace

void register_fourierft(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<FourierftConfig, FourierftLinear>>(); }});
}

}  // namespace graft::peft
