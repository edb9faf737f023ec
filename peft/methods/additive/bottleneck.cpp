// Bottleneck adapters: y = o + s A(a), A(a) = U f(D a + b) + c, o = the sublayer's output.
//   Houlsby et al. 2019, arXiv:1902.00751:    a = o, sites attn and mlp (the default)
//   Pfeiffer et al. 2020, arXiv:2005.00247:   a = o + residual: sites block, since in a pre-norm
//                                             model the block's output is just that
//   He et al. 2021, arXiv:2110.04366:         parallel: a = the sublayer's input, sites mlp, s = 4
//   Ruckle et al. 2020, arXiv:2010.11918:     AdapterDrop: leave_out and drop_up_to
// Trains D [r, d], b [r], U [d, r], c [d], and s [1] if learned; r = d / reduction_factor. init
// lora: D Kaiming-uniform (a = sqrt 5), the rest zeros: the model is unchanged at step 0; else D
// and U alike: bert N(0, 0.02^2), houlsby N(0, 0.01^2) cut at 0.02. Not mergeable. He et al.'s
// models are post-norm, where the sublayer reads the residual stream; here it reads a norm of that.
// tap: normed, the default, reads what the sublayer reads, as theirs: with f = identity it is LoRA
// beside it. tap: raw is the `adapters` library's, the stream itself, which is a block's input.
// Layers of skip_layers rest when nothing is trained: a saved adapter, with init_from, without its
// lowest. HF PEFT has no such method; against `adapters`: tests/peft/adapter_hub_test.cpp.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "configs/check.h"
#include "kernels/random/random.h"
#include "peft/draws.h"
#include "peft/sublayer_method.h"

namespace graft::peft {
namespace {

struct BottleneckConfig {
  static constexpr const char* kName = "bottleneck";
  std::vector<std::string> sites = {"attn", "mlp"};
  std::string form = "sequential", tap = "normed";
  double reduction_factor = 16;
  std::string non_linearity = "silu";
  double scaling = 1;
  bool learn_scaling = false;
  std::string init_weights = "lora";
  std::vector<int> leave_out = {}, skip_layers = {};
  configs::Auto<int> drop_up_to = {0};

  void fields(configs::Fields& f) {
    f("sites", sites, f.one_of({"attn", "mlp", "block"}),
      "what the adapters stand behind or beside");
    f("form", form, f.one_of({"sequential", "parallel"}),
      "the adapter reads the output of the site, or its input");
    f("tap", tap, f.one_of({"normed", "raw"}),
      "parallel beside attn, mlp: the input is the norm's output, or the residual stream");
    f("reduction_factor", reduction_factor, f.range(1, 4096), "width of the model / inner width");
    f("non_linearity", non_linearity, f.one_of({"relu", "gelu", "silu", "tanh", "identity"}),
      "between the two matrices");
    f("scaling", scaling, f.range(-1e6, 1e6), "the adapter's output is multiplied by it");
    f("learn_scaling", learn_scaling, "train the scaling, from that value");
    f("init_weights", init_weights, f.one_of({"lora", "bert", "houlsby"}),
      "lora: start as the base; near it, all matrices: bert N(0, 0.02^2), houlsby N(0, 0.01^2) cut "
      "at 0.02");
    f("leave_out", leave_out, f.at_least(0), "layers without adapters, from 0");
    f("drop_up_to", drop_up_to, f.range(0, 65536),
      "each step n is drawn from 0 to this and the first n layers' adapters rest; auto: 11, or all "
      "layers but one");
    f("skip_layers", skip_layers, f.at_least(0),
      "layers whose adapters rest when nothing is trained, of a saved adapter too");
  }
  bool starts_as_base() const { return init_weights == "lora"; }
  bool adapts(int layer) const { return !holds(leave_out, layer); }
  void resolve(const AttachContext& context) {
    const int layers = static_cast<int>(context.info.num_layers);
    for (const auto& [name, list] :
         {std::pair{"leave_out", leave_out}, std::pair{"skip_layers", skip_layers}}) {
      for (const int layer : list)
        GRAFT_CHECK(layer < layers, "peft: bottleneck: ", name, ": this model has no layer ",
                    layer);
    }
    const int most = drop_up_to.value.value_or(std::min(11, layers - 1));
    GRAFT_CHECK(context.from_file || most < layers, "peft: bottleneck: drop_up_to = ", most,
                ": this model has ", layers, " layers, and without all of them a step trains ",
                "nothing; at most ", layers - 1);
    drop_up_to.value = most;
    GRAFT_CHECK(tap == "normed" || form == "parallel",
                "peft: bottleneck: tap: raw is of form: parallel; what reads the residual stream ",
                "behind a sublayer is sites: [block]");
  }
  static bool holds(const std::vector<int>& list, int layer) {
    return std::find(list.begin(), list.end(), layer) != list.end();
  }
};

class BottleneckAdapter : public models::SublayerAdapter {
 public:
  BottleneckAdapter(const BottleneckConfig& c, const SublayerPlace& place, kernels::Key random,
                    at::Device device)
      : config_(c),
        layer_(place.layer),
        skipped_(BottleneckConfig::holds(c.skip_layers, place.layer)),
        reads_residual_(c.tap == "raw" && place.role != "block") {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    const int64_t width = place.width;
    const auto inner = static_cast<int64_t>(static_cast<double>(width) / c.reduction_factor);
    GRAFT_CHECK(inner >= 1, "peft: bottleneck: reduction_factor = ", c.reduction_factor,
                ", at most the model's width ", width);
    const auto draw = [&](at::IntArrayRef shape, kernels::Key key) {
      if (c.init_weights == "bert") return draw_normal(shape, 0.02, key, device);
      if (c.init_weights == "houlsby") return draw_truncated_normal(shape, 0.01, key, device);
      return draw_kaiming(shape, key, device);
    };
    const Tensor up = c.starts_as_base() ? at::zeros({width, inner}, options)
                                         : draw({width, inner}, kernels::derive(random, 1));
    down_ = register_parameter("down_weight", draw({inner, width}, random));
    down_bias_ = register_parameter("down_bias", at::zeros({inner}, options));
    up_ = register_parameter("up_weight", up);
    up_bias_ = register_parameter("up_bias", at::zeros({width}, options));
    if (c.learn_scaling) scale_ = register_parameter("scaling", at::full({1}, c.scaling, options));
  }

  Tensor forward(const Tensor& h_BLD, const Sublayer& sublayer, const models::Pass& pass) override {
    Tensor o = sublayer(h_BLD);
    if (pass.training ? layer_ < num_resting(pass) : skipped_) return o;
    const Tensor& a = config_.form == "sequential" ? o
                      : reads_residual_            ? pass.residual_BLD
                                                   : h_BLD;
    const auto type = o.scalar_type();
    const Tensor inner = activation(at::linear(a, down_.to(type), down_bias_.to(type)));
    const Tensor added = at::linear(inner, up_.to(type), up_bias_.to(type));
    return o + (scale_.defined() ? added * scale_.to(type) : added * config_.scaling);
  }

 private:
  /// The same on all ranks and in all lanes of a step.
  int num_resting(const models::Pass& pass) const {
    const Tensor u = at::empty({1}, at::kFloat);
    kernels::uniform(u, kernels::derive(pass.step_random, 0xAD0));
    return static_cast<int>(u.item<double>() * (*config_.drop_up_to.value + 1));
  }
  Tensor activation(const Tensor& x) const {
    const std::string& f = config_.non_linearity;
    if (f == "relu") return at::relu(x);
    return f == "gelu" ? at::gelu(x) : f == "silu" ? at::silu(x) : f == "tanh" ? at::tanh(x) : x;
  }

  BottleneckConfig config_;
  int layer_;
  bool skipped_, reads_residual_;
  Tensor down_, down_bias_, up_, up_bias_, scale_;
};

using Bottleneck = SublayerMethod<BottleneckConfig, BottleneckAdapter>;

}  // namespace

void register_bottleneck(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Bottleneck>(); }});
}

}  // namespace graft::peft
