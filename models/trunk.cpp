#include "models/trunk.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <optional>

namespace graft::models {
namespace {

/// The same values as new leaves of a graph. Integer tensors and the lowest stage's input need no
/// gradient.
Carry leaf(const Carry& carry, bool needs_grad) {
  Carry out = carry;
  for (Tensor& t : out.tensors)
    t = t.detach().set_requires_grad(needs_grad && t.is_floating_point());
  return out;
}

/// The gradients of one stage alone: returns those of its parameters; `inputs` become their own
/// gradients.
std::vector<Tensor> pull(const std::vector<Tensor>& outputs,
                         const std::vector<Tensor>& output_grads, std::vector<Tensor>& inputs,
                         const std::vector<Tensor>& parameters) {
  std::vector<Tensor> roots, root_grads, leaves = inputs;
  for (size_t t = 0; t < outputs.size(); ++t) {
    if (!outputs[t].requires_grad() || !output_grads[t].defined()) continue;
    roots.push_back(outputs[t]), root_grads.push_back(output_grads[t]);
  }
  leaves.insert(leaves.end(), parameters.begin(), parameters.end());
  std::vector<Tensor> grads(leaves.size());
  if (!roots.empty() && !leaves.empty()) {
    grads = torch::autograd::grad(roots, leaves, root_grads, std::nullopt, false, true);
  }
  const auto split = grads.begin() + static_cast<std::ptrdiff_t>(inputs.size());
  inputs.assign(grads.begin(), split);
  return {split, grads.end()};
}

}  // namespace

/// The blocks of one stage, pinned; the next stage's are fetched meanwhile. Dense copies made under
/// the pin die with it.
class Trunk::StagePin {
 public:
  enum class Share { kNo, kAcrossUses };
  StagePin(Trunk& trunk, int stage, int next_stage, Share share) : trunk_(trunk), stage_(stage) {
    const std::vector<int> blocks = trunk.model_.blocks_of(stage);
    const bool ahead = next_stage >= 0 && trunk.prefetch_blocks_ > 0;
    const int next = ahead ? trunk.model_.blocks_of(next_stage).front() : -1;
    for (size_t i = 0; i < blocks.size(); ++i) {
      trunk.store_.pin(blocks[i], i + 1 == blocks.size() ? next : -1);
    }
    if (share == Share::kAcrossUses) each_weight([](const Weight& w) { w.keep(); });
  }
  ~StagePin() {
    each_weight([](const Weight& w) { w.drop(); });
    for (const int block : trunk_.model_.blocks_of(stage_)) trunk_.store_.unpin(block);
  }
  StagePin(const StagePin&) = delete;
  StagePin& operator=(const StagePin&) = delete;

 private:
  template <class F>
  void each_weight(F f) const {
    for (const int block : trunk_.model_.blocks_of(stage_)) {
      for (const Weight* w : trunk_.weights_[static_cast<size_t>(block)]) f(*w);
    }
  }
  Trunk& trunk_;
  int stage_;
};

/// What one lane leaves behind on its way up, and the gradient it carries down.
struct Trunk::Trail {
  struct Step {
    Carry input;   ///< leaves
    Carry output;  ///< with its graph; empty when the stage will be run again
  };
  Tensor look_BTD;           ///< of the base, before all else
  Carry top;                 ///< the newest output
  std::vector<Step> steps;   ///< of the stages from the lowest trained one on
  std::vector<Tensor> grad;  ///< of the newest step's output
};

Trunk::Trunk(Model& model, dist::BlockStore& store, int prefetch_blocks)
    : model_(model), store_(store), prefetch_blocks_(prefetch_blocks) {
  struct Collect : Visitor {
    std::vector<Weight*> weights;
    void weight(const std::string&, Weight& w) override { weights.push_back(&w); }
  };
  for (int b = 0; b < model_.num_blocks(); ++b) {
    Collect collect;
    model_.visit_weights(b, collect);
    weights_.push_back(std::move(collect.weights));
  }
}

bool Trunk::is_asked_to_look() const {
  struct Ask : Visitor {
    using Visitor::slot;
    bool yes = false;
    void slot(const std::string&, Slot<SequenceAdapter>& slot) override {
      for (const auto& adapter : slot.adapters()) yes = yes || adapter->looks();
    }
  } ask;
  for (int i = 0; i < model_.num_stages(); ++i) model_.visit_slots(i, ask);
  return ask.yes;
}

/// Of each lane what the untouched base makes of it; undefined where nobody asks.
/// @param cache  of the pass that is to come: the look has seen the same tokens
std::vector<Tensor> Trunk::look(std::span<const Lane> lanes, KvCache* cache) {
  if (!is_asked_to_look()) return std::vector<Tensor>(lanes.size());
  Pass pass;
  pass.adapters = false;
  pass.want = Want::kHidden;
  if (cache != nullptr) {
    if (cache->look == nullptr) cache->look = std::make_shared<KvCache>();
    pass.cache = cache->look.get();
  }
  return forward(lanes, pass);
}

Pass Trunk::pass_of(const Lane& lane, const Tensor& look_BTD, int stage,
                    const TrunkOptions& options) {
  Pass pass;
  pass.batch = &lane.batch;
  pass.lane = lane.number;
  pass.stage = stage;
  pass.training = options.training;
  pass.random = kernels::derive(options.random, lane.number);
  pass.step_random = options.random;
  pass.look_BTD = look_BTD;
  return pass;
}

void Trunk::sweep(std::span<Lane> lanes, GradientSink& sink, const TrunkOptions& options) {
  std::vector<Trail> trail(lanes.size());
  std::vector<Tensor> looks = look(lanes);
  for (size_t l = 0; l < lanes.size(); ++l) trail[l].look_BTD = std::move(looks[l]);
  up(lanes, trail, options);
  down(lanes, trail, sink, options);
}

void Trunk::up(std::span<Lane> lanes, std::vector<Trail>& trail, const TrunkOptions& options) {
  const auto share = lanes.size() > 1 ? StagePin::Share::kAcrossUses : StagePin::Share::kNo;
  for (int i = 0; i < model_.num_stages() - 1; ++i) {
    const StagePin pin(*this, i, i + 1, share);
    const bool trained = i >= options.lowest_trained;
    const bool keeps_graph = trained && options.recompute == Recompute::kOff;
    const at::AutoGradMode grad_mode(keeps_graph);
    for (size_t l = 0; l < lanes.size(); ++l) {
      if (lanes[l].batch.empty()) continue;
      const Carry input = leaf(trail[l].top, i > options.lowest_trained);
      trail[l].top = model_.stage(i, input, pass_of(lanes[l], trail[l].look_BTD, i, options));
      if (trained) trail[l].steps.push_back({input, keeps_graph ? trail[l].top : Carry{}});
    }
  }
}

void Trunk::down(std::span<Lane> lanes, std::vector<Trail>& trail, GradientSink& sink,
                 const TrunkOptions& options) {
  const int last = model_.num_stages() - 1;
  const bool recompute = options.recompute == Recompute::kOn;
  const auto share =
      recompute || lanes.size() > 1 ? StagePin::Share::kAcrossUses : StagePin::Share::kNo;
  for (int i = last; i >= options.lowest_trained; --i) {
    const StagePin pin(*this, i, i > options.lowest_trained ? i - 1 : -1, share);
    for (size_t l = 0; l < lanes.size(); ++l) {
      if (lanes[l].batch.empty()) {
        sink.add(i, lanes[l], std::vector<Tensor>(sink.parameters(i).size()));
        continue;
      }
      if (i == last) {
        trail[l].steps.push_back({leaf(trail[l].top, i > options.lowest_trained), {}});
        trail[l].top = {};
      }
      Trail::Step step = std::move(trail[l].steps.back());
      trail[l].steps.pop_back();
      if (step.output.tensors.empty()) {
        step.output = model_.stage(i, step.input, pass_of(lanes[l], trail[l].look_BTD, i, options));
      }
      if (i == last) {
        step.output.tensors.resize(1);
        trail[l].grad = {at::ones_like(step.output.h())};
        lanes[l].loss_sum = step.output.h().item<double>();
      }
      std::vector<Tensor> inputs;
      if (i > options.lowest_trained) inputs = step.input.tensors;
      sink.add(i, lanes[l], pull(step.output.tensors, trail[l].grad, inputs, sink.parameters(i)));
      trail[l].grad = std::move(inputs);
    }
    sink.stage_done(i);
  }
}

std::vector<Tensor> Trunk::forward(std::span<const Lane> lanes, const Pass& pass) {
  const at::AutoGradMode no_grad(false);
  const auto share = lanes.size() > 1 ? StagePin::Share::kAcrossUses : StagePin::Share::kNo;
  const std::vector<Tensor> looks =
      pass.adapters ? look(lanes, pass.cache) : std::vector<Tensor>(lanes.size());
  std::vector<Carry> carries(lanes.size());
  for (int i = 0; i < model_.num_stages(); ++i) {
    const StagePin pin(*this, i, i + 1 < model_.num_stages() ? i + 1 : -1, share);
    for (size_t l = 0; l < lanes.size(); ++l) {
      if (lanes[l].batch.empty()) continue;
      Pass here = pass;
      here.batch = &lanes[l].batch;
      here.lane = lanes[l].number;
      here.stage = i;
      here.random = kernels::derive(pass.random, lanes[l].number);
      here.step_random = pass.random;
      here.look_BTD = looks[l];
      carries[l] = model_.stage(i, std::move(carries[l]), here);
    }
  }
  if (pass.cache != nullptr) pass.cache->length += lanes.front().batch.tokens_BL.size(1);
  std::vector<Tensor> out;
  out.reserve(carries.size());
  for (const Carry& carry : carries) out.push_back(carry.tensors.empty() ? Tensor() : carry.h());
  return out;
}

Trunk::NonFinite Trunk::first_non_finite(std::span<const Lane> lanes, const TrunkOptions& options) {
  const at::AutoGradMode no_grad(false);
  NonFinite first;
  const std::vector<Tensor> looks = look(lanes);
  std::vector<Carry> carries(lanes.size());
  for (int i = 0; i < model_.num_stages(); ++i) {
    const StagePin pin(*this, i, -1, StagePin::Share::kNo);
    for (size_t l = 0; l < lanes.size(); ++l) {
      if (lanes[l].batch.empty()) continue;
      carries[l] = model_.stage(i, std::move(carries[l]), pass_of(lanes[l], looks[l], i, options));
      if (first.stage < 0 && !at::isfinite(carries[l].h()).all().item<bool>())
        first = {i, what_is_not_finite(i)};
    }
  }
  return first;
}

/// A frozen weight of a pinned stage; if all are finite, its output.
std::string Trunk::what_is_not_finite(int stage) const {
  struct Search : Visitor {
    std::string first, bad;
    void weight(const std::string& name, Weight& w) override {
      if (first.empty()) first = name;
      if (bad.empty() && !at::isfinite(w.dense()).all().item<bool>()) bad = name;
    }
  } search;
  for (const int block : model_.blocks_of(stage)) model_.visit_weights(block, search);
  if (!search.bad.empty()) return "the weight " + search.bad;
  const size_t parts = search.first.starts_with("block.") ? search.first.find('.') + 1 : 0;
  return "the output of " + search.first.substr(0, search.first.find('.', parts));
}

}  // namespace graft::models
