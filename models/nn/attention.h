// Causal attention over packed documents: softmax(q k^T / sqrt(K)) v where a position sees its own
// document only.
#pragma once

#include "models/pass.h"

namespace graft::models {

/// @param q_BHLK  queries
/// @param k, v    [B, heads, L', K]; `heads` divides H and each is used H / heads times (grouped
/// queries)
/// @param window  a query sees the newest `window` keys; 0: all
/// @return        [B, H, L, K]; zero at padding
/// With L' > L the first L' - L keys stand in front of every document (a prefix, or what a
/// key/value cache holds of the only one).
Tensor causal_attention(const Tensor& q_BHLK, const Tensor& k, const Tensor& v,
                        const Sequence& sequence, int64_t window);

}  // namespace graft::models
