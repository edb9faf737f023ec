#include "launcher/gradients.h"

#include <ATen/ATen.h>

#include "configs/check.h"

namespace graft::launcher {
namespace {

/// The first `numel` elements of the gradients of one stage and lane as one vector; undefined ones
/// are zero.
Tensor flatten(const std::vector<Tensor>& gradients, const std::vector<Tensor>& parameters,
               int64_t numel) {
  Tensor flat = at::empty({numel}, parameters.front().options().requires_grad(false));
  int64_t at = 0;
  for (size_t i = 0; at < numel; ++i) {
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
                     Reduction reduction)
    : num_lanes_(num_lanes), reduction_(reduction) {
  for (int s = 0; s < num_stages; ++s)
    stages_.push_back({{}, 0, 0, {}, dist::TreeSum(num_lanes), {}});
  flat_ = at::zeros({params.numel()}, params.all().front().value.options().requires_grad(false));
  views_.resize(params.all().size());
  int64_t begin = 0;
  for (int s = 0; s < num_stages;
       ++s) {  // flat goes by stage, so that a stage's tree is one piece of it
    for (size_t i = 0; i < params.all().size(); ++i) {
      const peft::Param& param = params.all()[i];
      if (param.stage != s) continue;
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
    for (int s = param.stage + 1; s <= param.last_stage; ++s) {
      stages_[static_cast<size_t>(s)].parameters.push_back(param.value);
      stages_[static_cast<size_t>(s)].indexes.push_back(i);
    }
  }
}

const std::vector<Tensor>& Gradients::parameters(int stage) const {
  return stages_[static_cast<size_t>(stage)].parameters;
}

void Gradients::add(int stage_number, const models::Lane& lane, std::vector<Tensor> gradients) {
  Stage& stage = stages_[static_cast<size_t>(stage_number)];
  for (size_t i = 0; i < stage.parameters.size(); ++i) {
    const std::pair key(lane.number, stage.indexes[i]);
    if (const auto above = pending_.extract(key); !above.empty())
      gradients[i] = gradients[i].defined() ? above.mapped() + gradients[i] : above.mapped();
    if (i >= stage.num_own && gradients[i].defined()) pending_[key] = gradients[i];
  }
  if (stage.num_own == 0) return;
  Tensor flat = flatten(gradients, stage.parameters, stage.numel);
  if (reduction_ == Reduction::kTree) {
    stage.tree.add(lane.number, std::move(flat));
  } else if (stage.sum.defined()) {
    stage.sum.add_(flat);
  } else {
    stage.sum = std::move(flat);
  }
}

void Gradients::reduce(dist::Comm& comm, double num_targets) {
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

std::string Gradients::where(int64_t index) const {
  const std::pair<std::string, int64_t>* found = &begins_.front();
  for (const auto& begin : begins_) {
    if (begin.second <= index) found = &begin;
  }
  return found->first + "[" + std::to_string(index - found->second) + "]";
}

}  // namespace graft::launcher
