// Observer: what passes linear slots while a model runs, seen on the adapter seam alone: an adapter
// around a slot gets its input, a function at its output the gradient. While it lives its adapters
// are the outermost of their slots, and it is the sink of sweeps.
#pragma once

#include <functional>
#include <vector>

#include "models/trunk.h"
#include "peft/method.h"

namespace graft::peft {

class Observer : public models::GradientSink {
 public:
  struct Seen {
    const LinearSite* site;
    std::function<void(const Observation&)> see;  ///< each lane that passes
    std::string method = {}, prompts = {};  ///< for messages: who looks, and who adds positions
  };
  enum class Gradients { kNo, kYes };
  /// @param gradients  kYes: each lane is seen once, on its way down through a sweep; kNo: on its
  ///                   way up
  Observer(std::vector<Seen> sites, int num_stages, Gradients gradients);
  ~Observer() override;
  Observer(const Observer&) = delete;
  Observer& operator=(const Observer&) = delete;

  const std::vector<Tensor>& parameters(int stage) const override {
    return probes_[static_cast<size_t>(stage)];
  }
  void add(int /*stage*/, const models::Lane& /*lane*/, std::vector<Tensor> /*grads*/) override {}
  void stage_done(int /*stage*/) override {}

 private:
  std::vector<Seen> sites_;
  std::vector<std::vector<Tensor>> probes_;  ///< of each stage: they make autograd pass the slots
};

}  // namespace graft::peft
