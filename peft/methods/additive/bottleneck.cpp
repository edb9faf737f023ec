// Bottleneck adapters: y = o + s A(a), A(a) = U f(D a + b) + c, o = the sublayer's output.
//   Houlsby et al. 2019, arXiv:1902.00751:    a = o, sites attn and mlp (the default)
//   Pfeiffer et al. 2020, arXiv:2005.00247:   a = o + residual: sites block, since in a pre-norm
//                                             model the block's output is just that
//   He et al. 2021, arXiv:2110.04366:         parallel: a = the sublayer's input, sites mlp, s = 4
//   Ruckle et al. 2020, arXiv:2010.11918:     AdapterDrop: leave_out and drop_up_to
// Trains D [r, d], b [r], U [d, r], c [d], and s [1] if learned; r = d / reduction_factor. init
// lora: D Kaiming-uniform (a = sqrt 5), the rest zeros: the model is unchanged at step 0; bert: D
// and U N(0, 0.02^2). Not mergeable. A sublayer's input is its norm's output; that of a block is
// the residual stream, so the raw tap of the `adapters` library is there for blocks only. HF PEFT
// has no such method.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "configs/check.h"
#include "kernels/random/random.h"
#include "peft/attach.h"
#include "peft/peft_config.h"
#include "peft/peft_form.h"

namespace graft::peft {
namespace {

struct BottleneckConfig {
  std::vector<std::string> sites = {"attn", "mlp"};
  std::string form = "sequential";
  double reduction_factor = 16;
  std::string non_linearity = "silu";
  double scaling = 1;
  bool learn_scaling = false;
  std::string init_weights = "lora";
  std::vector<int> leave_out = {};
  int drop_up_to = 0;

  void fields(configs::Fields& f) {
    f("sites", sites, f.one_of({"attn", "mlp", "block"}),
      "what the adapters stand behind or beside");
    f("form", form, f.one_of({"sequential", "parallel"}),
      "the adapter reads the output of the site, or its input");
    f("reduction_factor", reduction_factor, f.range(1, 4096), "width of the model / inner width");
    f("non_linearity", non_linearity, f.one_of({"relu", "gelu", "silu", "tanh", "identity"}),
      "between the two matrices");
    f("scaling", scaling, f.range(-1e6, 1e6), "the adapter's output is multiplied by it");
    f("learn_scaling", learn_scaling, "train the scaling, from that value");
    f("init_weights", init_weights, f.one_of({"lora", "bert"}),
      "lora: start as the base; bert: near it, all matrices N(0, 0.02^2)");
    f("leave_out", leave_out, f.at_least(0), "layers without adapters, from 0");
    f("drop_up_to", drop_up_to, f.range(0, 65536),
      "each step n is drawn from 0 to this and the first n layers' adapters rest");
  }
};

class BottleneckAdapter : public models::SublayerAdapter {
 public:
  BottleneckAdapter(const BottleneckConfig& c, int layer, int64_t width, kernels::Key random,
                    at::Device device)
      : config_(c), layer_(layer) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    const auto inner = static_cast<int64_t>(static_cast<double>(width) / c.reduction_factor);
    GRAFT_CHECK(inner >= 1, "peft: bottleneck: reduction_factor = ", c.reduction_factor,
                ", at most the model's width ", width);
    const Tensor down = at::empty({inner, width}, options), up = at::zeros({width, inner}, options);
    if (c.init_weights == "bert") {
      kernels::normal(down, random);
      kernels::normal(up, kernels::derive(random, 1));
      down.mul_(0.02), up.mul_(0.02);
    } else {
      kernels::uniform(down, random);
      down.mul_(2).sub_(1).mul_(1 / std::sqrt(static_cast<double>(width)));
    }
    down_ = register_parameter("down_weight", down);
    down_bias_ = register_parameter("down_bias", at::zeros({inner}, options));
    up_ = register_parameter("up_weight", up);
    up_bias_ = register_parameter("up_bias", at::zeros({width}, options));
    if (c.learn_scaling) scale_ = register_parameter("scaling", at::full({1}, c.scaling, options));
  }

  Tensor forward(const Tensor& h_BLD, const Sublayer& sublayer, const models::Pass& pass) override {
    Tensor o = sublayer(h_BLD);
    if (pass.training && layer_ < num_resting(pass)) return o;
    const Tensor a = config_.form == "parallel" ? h_BLD : o;
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
    return static_cast<int>(u.item<double>() * (config_.drop_up_to + 1));
  }
  Tensor activation(const Tensor& x) const {
    const std::string& f = config_.non_linearity;
    if (f == "relu") return at::relu(x);
    return f == "gelu" ? at::gelu(x) : f == "silu" ? at::silu(x) : f == "tanh" ? at::tanh(x) : x;
  }

  BottleneckConfig config_;
  int layer_;
  Tensor down_, down_bias_, up_, up_bias_, scale_;
};

class Bottleneck : public Method {
 public:
  void fields(configs::Fields& f) override { config_.fields(f); }
  bool starts_as_base() const override { return config_.init_weights == "lora"; }
  void attach(AttachContext& context) override {
    check_slots(context, context.slots.sublayers.size(), "sublayers");
    const auto holds = [](const auto& list, const auto& value) {
      return std::find(list.begin(), list.end(), value) != list.end();
    };
    for (const int layer : config_.leave_out) {
      GRAFT_CHECK(layer < context.info.num_layers,
                  "peft: bottleneck: leave_out: this model has no layer ", layer);
    }
    const size_t before = context.params.all().size();
    for (const auto& site : context.slots.sublayers) {
      const int layer = std::atoi(site.name.c_str() + site.name.find('.') + 1);  // block.3.attn
      if (!holds(config_.sites, site.role) || holds(config_.leave_out, layer)) continue;
      auto adapter = std::make_shared<BottleneckAdapter>(
          config_, layer, context.info.hidden_size, site_key(context, site.name), context.device);
      site.slot->push(adapter);
      list_tensors(context, *adapter, {site.name, site.name, site.stage}, {});
    }
    GRAFT_CHECK(context.params.all().size() > before,
                "peft: bottleneck: leave_out leaves nothing to adapt");
  }
  nlohmann::json to_peft_config(const SlotMap&) const override {
    return write_peft_entries({}, configs::describe(config_));
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    PeftConfigReader config(adapter);
    read_peft_entries({}, config, nullptr, [&](configs::Fields& f) { config_.fields(f); });
  }

 private:
  BottleneckConfig config_;
};

}  // namespace

void register_bottleneck(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Bottleneck>(); }});
}

}  // namespace graft::peft
