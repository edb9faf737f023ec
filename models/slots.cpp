// How the adapters of one slot nest. Each run() is a recursion from the outermost adapter to the
// wrapped thing.
#include "models/slots.h"

#include "configs/check.h"

namespace graft::models {
namespace {

/// What an adapter sees of a Pass.
class Passes {
 public:
  template <class A>
  Passes(const Slot<A>& slot, const Pass& pass)
      : num_frozen_(slot.num_frozen()), trained_(pass), frozen_(pass) {
    frozen_.training = false;
  }
  const Pass& of(size_t adapter) const { return adapter < num_frozen_ ? frozen_ : trained_; }

 private:
  size_t num_frozen_;
  const Pass& trained_;
  Pass frozen_;
};

/// Everything below one adapter of a linear slot, seen as a linear map.
class Below : public LinearOp {
 public:
  Below(const Slot<LinearAdapter>& slot, size_t count, const LinearOp& base, const Passes& passes)
      : slot_(slot), count_(count), base_(base), passes_(passes) {}
  Tensor operator()(const Tensor& x) const override {
    if (count_ == 0) return base_(x);
    const Below below(slot_, count_ - 1, base_, passes_);
    return slot_.adapters()[count_ - 1]->forward(x, below, passes_.of(count_ - 1));
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
  const Passes& passes_;
};

/// Nests around advice of the form advice(number of the adapter, argument, inner).
template <class Argument, class Inner, class Advice>
auto nest(size_t count, const Argument& argument, const Inner& inner, const Advice& advice)
    -> decltype(inner(argument)) {
  if (count == 0) return inner(argument);
  return advice(count - 1, argument,
                [&](const Argument& a) { return nest(count - 1, a, inner, advice); });
}

}  // namespace

Tensor LinearAdapter::merged(const Tensor&) const {
  throw Error(ExitCode::kUsage, "this adapter cannot be merged into a matrix");
}

Tensor run(const Slot<LinearAdapter>& slot, const LinearOp& base, const Tensor& x,
           const Pass& pass) {
  const Passes passes(slot, pass);
  return Below(slot, pass.adapters ? slot.size() : 0, base, passes)(x);
}

Tensor run(const Slot<SublayerAdapter>& slot, const Tensor& h_BLD,
           const SublayerAdapter::Sublayer& sublayer, const Pass& pass) {
  const Passes passes(slot, pass);
  return nest(pass.adapters ? slot.size() : 0, h_BLD, sublayer,
              [&](size_t i, const Tensor& h, const SublayerAdapter::Sublayer& inner) {
                return slot.adapters()[i]->forward(h, inner, passes.of(i));
              });
}

Tensor run(const Slot<AttentionAdapter>& slot, const Tensor& q, const Tensor& k, const Tensor& v,
           const AttentionAdapter::Core& core, const Pass& pass) {
  const Passes passes(slot, pass);
  AttentionAdapter::Core below = core;
  for (size_t i = 0; i < (pass.adapters ? slot.size() : 0); ++i) {
    below = [&adapter = *slot.adapters()[i], &here = passes.of(i), inner = std::move(below)](
                const Tensor& q2, const Tensor& k2, const Tensor& v2) {
      return adapter.forward(q2, k2, v2, inner, here);
    };
  }
  return below(q, k, v);
}

Carry run(const Slot<SequenceAdapter>& slot, Carry carry, const Pass& pass) {
  const Passes passes(slot, pass);
  for (size_t i = 0; i < (pass.adapters ? slot.size() : 0); ++i)
    carry = slot.adapters()[i]->edit(std::move(carry), passes.of(i));
  return carry;
}

Tensor run(const Slot<TensorAdapter>& slot, Tensor t, const Pass& pass) {
  const Passes passes(slot, pass);
  for (size_t i = 0; i < (pass.adapters ? slot.size() : 0); ++i)
    t = slot.adapters()[i]->forward(t, passes.of(i));
  return t;
}

Carry run(const Slot<CarryAdapter>& slot, const Carry& carry, const CarryAdapter::Stage& stage,
          const Pass& pass) {
  const Passes passes(slot, pass);
  return nest(
      pass.adapters ? slot.size() : 0, carry, [&](const Carry& c) { return stage(c); },
      [&](size_t i, const Carry& c, const CarryAdapter::Stage& inner) {
        return slot.adapters()[i]->forward(c, inner, passes.of(i));
      });
}

}  // namespace graft::models
