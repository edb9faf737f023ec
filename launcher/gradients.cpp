#include "launcher/gradients.h"

#include <ATen/ATen.h>

#include <cmath>
#include <set>

#include "configs/check.h"
#include "kernels/adamw/adamw.h"

namespace graft::launcher {
namespace {

/// The first `numel` elements of the gradients from `first` on of one stage and lane as one vector;
/// undefined ones are zero.
Tensor flatten(const std::vector<Tensor>& gradients, const std::vector<Tensor>& parameters,
               size_t first, int64_t numel) {
  Tensor flat = at::empty({numel}, parameters[first].options().requires_grad(false));
  int64_t at = 0;
  for (size_t i = first; at < numel; ++i) {
    Tensor part = flat.narrow(0, at, parameters[i].numel());
    if (gradients[i].defined()) {
      part.copy_(gradients[i].flatten());
    } else {
      part.zero_();
    }
    at += parameters[i].numel();
  }
  return flat;
}

}  // namespace

Gradients::Gradients(const peft::ParamSet& params, int num_stages, int64_t num_lanes,
                     Reduction reduction, dist::Comm* comm)
    : num_lanes_(num_lanes), reduction_(reduction), comm_(comm) {
  for (int s = 0; s < num_stages; ++s) {
    stages_.push_back(
        {{}, 0, 0, {}, dist::TreeSum(num_lanes), {}, {{}, {}, {}, dist::TreeSum(num_lanes)}});
  }
  int64_t num_replicated = 0;
  for (const peft::Param& param : params.all())
    num_replicated += param.thawed == nullptr ? param.numel() : 0;
  flat_ = at::zeros({num_replicated}, params.all().front().value.options().requires_grad(false));
  views_.resize(params.all().size());
  int64_t begin = 0;
  for (int s = 0; s < num_stages;
       ++s) {  // flat goes by stage, so that a stage's tree is one piece of it
    for (size_t i = 0; i < params.all().size(); ++i) {
      const peft::Param& param = params.all()[i];
      if (param.stage != s || param.thawed != nullptr) continue;
      Stage& stage = stages_[static_cast<size_t>(s)];
      stage.parameters.push_back(param.value);
      stage.indexes.push_back(i);
      ++stage.num_own;
      stage.numel += param.value.numel();
      views_[i] = flat_.narrow(0, begin, param.value.numel()).view(param.value.sizes());
      Tensor(param.value).mutable_grad() = views_[i];
      begins_.emplace_back(param.name, begin);
      begin += param.value.numel();
    }
  }
  for (size_t i = 0; i < params.all().size(); ++i) {
    const peft::Param& param = params.all()[i];
    if (param.thawed != nullptr) continue;
    for (int s = param.stage + 1; s <= param.last_stage; ++s) {
      stages_[static_cast<size_t>(s)].parameters.push_back(param.value);
      stages_[static_cast<size_t>(s)].indexes.push_back(i);
    }
  }
  for (size_t i = 0; i < params.all().size(); ++i) {
    if (params.all()[i].thawed != nullptr) add_thawed(params.all()[i], i);
  }
}

void Gradients::add_thawed(const peft::Param& param, size_t index) {
  GRAFT_ASSERT(comm_ != nullptr, param.name,
               " is thawed: its gradient goes to the rank that owns it");
  views_[index] = at::zeros_like(param.value);
  Tensor(param.value).mutable_grad() = views_[index];
  std::vector<dist::Slice> slices;
  for (const models::ElementRange& range : param.thawed->ranges())
    slices.push_back({range.begin, range.end});
  thawed_.push_back({param.name, {param.numel(), slices, views_[index]}});
  const auto world = static_cast<size_t>(comm_->size());
  if (slices.size() < world)
    slices.assign(world, slices.front());  // a replicated base: all have all
  for (const int s : std::set{param.stage, param.last_stage}) {
    Stage& stage = stages_[static_cast<size_t>(s)];
    int64_t begin = 0;
    for (size_t i = stage.indexes.size(); i < stage.parameters.size(); ++i)
      begin += stage.parameters[i].numel();
    stage.parameters.push_back(param.thawed->leaf());
    stage.thawed.indexes.push_back(index);
    stage.thawed.first.push_back(s == param.last_stage);
    stage.thawed.slices.resize(world);
    for (size_t r = 0; r < world; ++r)
      stage.thawed.slices[r].push_back({begin + slices[r].begin, begin + slices[r].end});
  }
}

const std::vector<Tensor>& Gradients::parameters(int stage) const {
  return stages_[static_cast<size_t>(stage)].parameters;
}

void Gradients::add(int stage_number, const models::Lane& lane, std::vector<Tensor> gradients) {
  Stage& stage = stages_[static_cast<size_t>(stage_number)];
  for (size_t i = 0; i < stage.indexes.size(); ++i) {
    const std::pair key(lane.number, stage.indexes[i]);
    if (const auto above = pending_.extract(key); !above.empty())
      gradients[i] = gradients[i].defined() ? above.mapped() + gradients[i] : above.mapped();
    if (i >= stage.num_own && gradients[i].defined()) pending_[key] = gradients[i];
  }
  if (!stage.thawed.indexes.empty()) {
    int64_t numel = 0;
    for (size_t i = stage.indexes.size(); i < stage.parameters.size(); ++i)
      numel += stage.parameters[i].numel();
    stage.thawed.tree.add(lane.number,
                          flatten(gradients, stage.parameters, stage.indexes.size(), numel));
  }
  if (stage.num_own == 0) return;
  Tensor flat = flatten(gradients, stage.parameters, 0, stage.numel);
  if (reduction_ == Reduction::kTree) {
    stage.tree.add(lane.number, std::move(flat));
  } else if (stage.sum.defined()) {
    stage.sum.add_(flat);
  } else {
    stage.sum = std::move(flat);
  }
}

/// Every rank gets the elements it owns. A weight that another stage uses too has that stage's
/// already: the tree is over lanes, stage by stage.
void Gradients::stage_done(int stage) {
  Thawed& thawed = stages_[static_cast<size_t>(stage)].thawed;
  if (thawed.indexes.empty()) return;
  const Tensor mine =
      dist::tree_reduce_scatter(*comm_, thawed.tree.finish(), num_lanes_, thawed.slices);
  int64_t at = 0;
  for (size_t k = 0; k < thawed.indexes.size(); ++k) {
    Tensor& sum = views_[thawed.indexes[k]];
    if (thawed.first[k]) sum.zero_();
    sum.add_(mine.narrow(0, at, sum.numel()));
    at += sum.numel();
  }
}

void Gradients::reduce(dist::Comm& comm, double num_targets) {
  for (auto& [name, gradient] : thawed_) gradient.mine.mul_(1 / num_targets);
  if (flat_.numel() == 0) return;
  std::vector<std::vector<Tensor>> nodes;  // of each maximal node, the pieces of the stages
  for (Stage& stage : stages_) {
    if (stage.num_own == 0) continue;
    std::vector<Tensor> parts =
        reduction_ == Reduction::kTree ? stage.tree.finish() : std::vector{stage.sum};
    stage.sum = Tensor();
    nodes.resize(std::max(nodes.size(), parts.size()));
    for (size_t n = 0; n < parts.size(); ++n) nodes[n].push_back(std::move(parts[n]));
  }
  std::vector<Tensor> flats;
  for (const auto& pieces : nodes) flats.push_back(at::cat(pieces));
  if (reduction_ == Reduction::kTree) {
    dist::tree_all_reduce(comm, flats, num_lanes_, flat_);
  } else {
    flat_.copy_(flats.front());
    comm.all_reduce(flat_, dist::Traffic::kReduced);
  }
  flat_.mul_(1 / num_targets);
}

double Gradients::norm() const {
  double sum = kernels::sum_of_squares(flat_);
  if (!thawed_.empty()) {
    std::vector<dist::CutVector> vectors;
    for (const auto& [name, gradient] : thawed_) vectors.push_back(gradient);
    sum += dist::tree_sum_of_squares(*comm_, vectors);
  }
  return std::sqrt(sum);
}

void Gradients::scale(double factor) {
  flat_.mul_(factor);
  for (auto& [name, gradient] : thawed_) gradient.mine.mul_(factor);
}

std::string Gradients::first_non_finite() const {
  const auto text = [](const std::string& name, int64_t element) {
    return name + "[" + std::to_string(element) + "]";
  };
  if (const int64_t bad = kernels::first_non_finite(flat_); bad >= 0) {
    const std::pair<std::string, int64_t>* found = &begins_.front();
    for (const auto& begin : begins_) {
      if (begin.second <= bad) found = &begin;
    }
    return text(found->first, bad - found->second);
  }
  for (const auto& [name, gradient] : thawed_) {
    const int64_t bad = kernels::first_non_finite(gradient.mine);
    const size_t rank = gradient.slices.size() > 1 ? static_cast<size_t>(comm_->rank()) : 0;
    if (bad >= 0) return text(name, gradient.slices[rank].begin + bad);
  }
  return "";
}

}  // namespace graft::launcher
