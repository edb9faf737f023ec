// How the adapters of one slot nest. Each run() is a recursion from the outermost adapter to the
// wrapped thing.
#include "models/slots.h"

#include "configs/check.h"

namespace graft::models {
namespace {

/// Everything below one adapter of a linear slot, seen as a linear map.
class Below : public LinearOp {
 public:
  Below(const Slot<LinearAdapter>& slot, size_t count, const LinearOp& base, const Pass& pass)
      : slot_(slot), count_(count), base_(base), pass_(pass) {}
  Tensor operator()(const Tensor& x) const override {
    if (count_ == 0) return base_(x);
    const Below below(slot_, count_ - 1, base_, pass_);
    return slot_.adapters()[count_ - 1]->forward(x, below, pass_);
  }
  Tensor weight() const override {
    Tensor w = base_.weight();
    for (size_t i = 0; i < count_; ++i) w = slot_.adapters()[i]->merged(w);
    return w;
  }

 private:
  const Slot<LinearAdapter>& slot_;
  size_t count_;
  const LinearOp& base_;
  const Pass& pass_;
};

/// Nests around advice of the form advice(adapter, argument, inner).
template <class A, class Argument, class Inner, class Advice>
auto nest(const Slot<A>& slot, size_t count, const Argument& argument, const Inner& inner,
          const Advice& advice) -> decltype(inner(argument)) {
  if (count == 0) return inner(argument);
  return advice(*slot.adapters()[count - 1], argument,
                [&](const Argument& a) { return nest(slot, count - 1, a, inner, advice); });
}

}  // namespace

Tensor LinearAdapter::merged(const Tensor&) const {
  throw Error(ExitCode::kUsage, "this adapter cannot be merged into a matrix");
}

Tensor run(const Slot<LinearAdapter>& slot, const LinearOp& base, const Tensor& x,
           const Pass& pass) {
  return Below(slot, pass.adapters ? slot.adapters().size() : 0, base, pass)(x);
}

Tensor run(const Slot<SublayerAdapter>& slot, const Tensor& h_BLD,
           const SublayerAdapter::Sublayer& sublayer, const Pass& pass) {
  return nest(slot, pass.adapters ? slot.adapters().size() : 0, h_BLD, sublayer,
              [&](SublayerAdapter& a, const Tensor& h, const SublayerAdapter::Sublayer& inner) {
                return a.forward(h, inner, pass);
              });
}

Tensor run(const Slot<AttentionAdapter>& slot, const Tensor& q, const Tensor& k, const Tensor& v,
           const AttentionAdapter::Core& core, const Pass& pass) {
  AttentionAdapter::Core below = core;
  if (pass.adapters) {
    for (const auto& adapter : slot.adapters()) {
      below = [adapter, inner = std::move(below), &pass](const Tensor& q2, const Tensor& k2,
                                                         const Tensor& v2) {
        return adapter->forward(q2, k2, v2, inner, pass);
      };
    }
  }
  return below(q, k, v);
}

Carry run(const Slot<SequenceAdapter>& slot, Carry carry, const Pass& pass) {
  if (!pass.adapters) return carry;
  for (const auto& adapter : slot.adapters()) carry = adapter->edit(std::move(carry), pass);
  return carry;
}

Tensor run(const Slot<TensorAdapter>& slot, Tensor t, const Pass& pass) {
  if (!pass.adapters) return t;
  for (const auto& adapter : slot.adapters()) t = adapter->forward(t, pass);
  return t;
}

Carry run(const Slot<CarryAdapter>& slot, const Carry& carry, const CarryAdapter::Stage& stage,
          const Pass& pass) {
  return nest(
      slot, pass.adapters ? slot.adapters().size() : 0, carry,
      [&](const Carry& c) { return stage(c); },
      [&](CarryAdapter& a, const Carry& c, const CarryAdapter::Stage& inner) {
        return a.forward(c, inner, pass);
      });
}

}  // namespace graft::models
