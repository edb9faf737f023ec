// FRoD: y = (W + U (S + diag(l - l0)) V^T) x + b, with W = U diag(l0) V^T: V [in, in] is shared by
// all slots of a kind (a joint decomposition of their matrices), U = W V^-T with columns of length
// one.
//                                                          AAAI 2026, 10.1609/aaai.v40i31.39813
// Trains l [in] (l0) and in^2 sparse_rate values of S off its diagonal (zeros): the model is
// unchanged at step 0. V and the places of S are saved, or found again (save_projection: false); U,
// as large as W, is not. Mergeable. Fields and files are those of HF PEFT's FrodConfig. PEFT
// computes U (S + diag(l)) V^T x, which is W x up to the rounding of U.
#include <ATen/ATen.h>

#include <map>

#include "peft/draws.h"
#include "peft/joint_frame.h"
#include "peft/linear_method.h"
#include "peft/projection.h"

namespace graft::peft {
namespace {

struct FrodConfig {
  Targets targets;
  int projection_prng_key = 0;
  bool save_projection = true;
  double frod_dropout = 0;
  bool init_weights = true;
  double sparse_rate = 0.01;
  double regularization_alpha = 0.001;
  std::shared_ptr<JointFrame> frame;  ///< no field: the next slot's

  void fields(configs::Fields& f) {
    f("projection_prng_key", projection_prng_key, f.at_least(0), "seed of the places of S");
    f("save_projection", save_projection, "save V and the places too");
    f("frod_dropout", frod_dropout, f.at_least(0).below(1), "probability, on the adapter's input");
    f("init_weights", init_weights, "false: l and S from random values, not as the base");
    f("sparse_rate", sparse_rate, f.positive().at_most(1), "share of S that is trained");
    f("regularization_alpha", regularization_alpha, f.positive(), "ridge of the decomposition");
  }
  static PeftForm peft_form() {
    return {.type = "FROD",
            .bias_only = "frod_only",
            .inert = {"progressbar", "runtime_offload_base_weight"}};
  }
  bool starts_as_base() const { return init_weights; }
};

class FrodLinear : public models::LinearAdapter {
 public:
  FrodLinear(const FrodConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : name_(site.name),
        in_(site.info.in),
        dropout_(c.frod_dropout),
        random_(random),
        frame_(c.frame),
        places_(frame_->places, in_, name_ + ": frod_s_indices") {
    const double deviation = c.init_weights ? 0 : 0.1;
    const auto draw = [&](int64_t n, int number) {
      return draw_normal({n}, deviation, kernels::derive(random, number), device);
    };
    s_ = register_parameter("lambda_s", draw(frame_->places.size(1), 0));
    l_ = register_parameter("lambda_l", draw(in_, 1));
    l0_ = at::zeros({in_}, frame_->v.options());
    u_ = at::zeros({site.info.out, in_}, frame_->v.options());
  }
  static std::vector<Leaf> leaves() {
    return {{"lambda_l", "frod_lambda_l"}, {"lambda_s", "frod_lambda_s_values"}};
  }
  void set_base(const Tensor& w) {
    const Tensor v = frame_->v.cpu().to(at::kDouble), wide = w.cpu().to(at::kDouble);
    auto [solved, info] = at::linalg_solve_ex(v, wide.t());
    Tensor b = solved.t();
    if (info.item<int>() != 0) b = wide.mm(at::linalg_pinv(v, 1e-6).t());
    const Tensor size = b.norm(2, 0);
    l0_.copy_(size);
    l_.add_(l0_);
    u_.copy_(at::where(size > 1e-12, b / size, at::zeros_like(b)));
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const auto type = x.scalar_type();
    const Tensor y = base(x);
    const Tensor z = dropout(x, dropout_, pass, random_).matmul(frame_->checked_v().to(type));
    return y + at::linear(at::linear(z, change().to(type)), u_.to(type)).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const auto type = s_.scalar_type();
    const Tensor v = frame_->checked_v().to(type);
    return w + u_.to(type).mm(change()).mm(v.t()).to(w.scalar_type());
  }

 private:
  /// S + diag(l - l0).
  Tensor change() const {
    const Tensor& places = places_.checked();
    const Tensor s =
        at::zeros({in_ * in_}, s_.options()).scatter(0, places[0] * in_ + places[1], s_);
    return s.view({in_, in_}) + at::diag_embed(l_ - l0_);
  }

  std::string name_;
  int64_t in_;
  double dropout_;
  kernels::Key random_;
  std::shared_ptr<JointFrame> frame_;
  Places places_;
  Tensor s_, l_, l0_, u_;
};

class Frod : public LinearMethod<FrodConfig, FrodLinear> {
 public:
  void initialize(BaseWeights& base) override {
    const at::NoGradGuard no_grad;
    for (const auto& [kind, frame] : frames_) {
      std::vector<Tensor> matrices;
      for (const size_t slot : frame->slots) matrices.push_back(base.weight(*sites_[slot]).cpu());
      frame->set_v(joint_basis(matrices, config_.regularization_alpha));
      for (size_t i = 0; i < matrices.size(); ++i)
        adapters_[frame->slots[i]]->set_base(matrices[i]);
    }
    whole_.initialize(base);
  }

 protected:
  void attach_to(AttachContext& context, const LinearSite& site) override {
    config_.frame = frames_.at(module_kind(site));
    LinearMethod::attach_to(context, site);
  }
  void before_slots(AttachContext& context) override {
    frames_.clear();
    for (size_t i = 0; i < sites_.size(); ++i) {
      auto& frame = frames_[module_kind(*sites_[i])];
      if (frame == nullptr) frame = std::make_shared<JointFrame>();
      frame->slots.push_back(i);
    }
    const auto generator = torch_generator(static_cast<uint64_t>(config_.projection_prng_key));
    const auto options = at::TensorOptions().dtype(at::kFloat).device(context.device);
    for (auto& [kind, frame] : frames_) {  // in the order of their names, as in PEFT
      const int64_t in = sites_[frame->slots[0]]->info.in, all = in * (in - 1);
      const double share = static_cast<double>(in * in) * config_.sparse_rate;
      const int64_t n = std::max<int64_t>(1, std::min(static_cast<int64_t>(share), all));
      const Tensor number = at::randperm(all, generator, at::kLong).slice(0, 0, n);
      const Tensor row = number.div(in - 1, "floor"), column = number.remainder(in - 1);
      frame->places = at::stack({row, column + column.ge(row)}).to(context.device);
      frame->v = at::zeros({in, in}, options);
      if (!config_.save_projection) continue;
      add_projection(context, "frod_V." + kind, frame->v);
      add_projection(context, "frod_s_indices." + kind, frame->places);
      add_projection(context, "frod_s_size." + kind, at::tensor({in, in}, at::kLong));
    }
  }

 private:
  std::map<std::string, std::shared_ptr<JointFrame>> frames_;
};

}  // namespace

void register_frod(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Frod>(); }});
}

}  // namespace graft::peft
