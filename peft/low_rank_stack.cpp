#include "peft/low_rank_stack.h"

#include <ATen/ATen.h>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"

namespace graft::peft {

Tensor LowRankStack::forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) {
  if (!a_.defined() || a_.scalar_type() != x.scalar_type()) {
    const at::NoGradGuard constants;
    std::vector<Tensor> a, b;
    for (const auto& [adapter, weight] : parts_) {
      const models::LowRank part = *adapter->low_rank();
      a.push_back(part.a), b.push_back(part.b * (part.scale * weight));
    }
    a_ = at::cat(a).to(x.scalar_type());
    b_ = at::cat(b, 1).to(x.scalar_type());
  }
  return kernels::lowrank_add(base(x), x, a_, b_, 1);
}

Tensor LowRankStack::merged(const Tensor& w) const {
  Tensor sum = w;
  for (const auto& [adapter, weight] : parts_) {
    const models::LowRank part = *adapter->low_rank();
    sum = sum + (part.scale * weight * part.b.mm(part.a)).to(w.scalar_type());
  }
  return sum;
}

std::vector<std::shared_ptr<models::LinearAdapter>> fuse(const std::vector<Weighted>& adapters) {
  std::vector<std::shared_ptr<models::LinearAdapter>> fused;
  for (size_t i = 0; i < adapters.size();) {
    size_t end = i;
    while (end < adapters.size() && adapters[end].adapter->low_rank()) ++end;
    GRAFT_ASSERT(end > i || adapters[i].weight == 1, "a weight of no low-rank product");
    if (end > i + 1 || adapters[i].weight != 1) {
      fused.push_back(std::make_shared<LowRankStack>(
          std::vector(adapters.begin() + static_cast<std::ptrdiff_t>(i),
                      adapters.begin() + static_cast<std::ptrdiff_t>(end))));
      i = end;
    } else {
      fused.push_back(adapters[i++].adapter);
    }
  }
  return fused;
}

}  // namespace graft::peft
