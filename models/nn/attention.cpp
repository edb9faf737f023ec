#include "models/nn/attention.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "configs/check.h"

namespace graft::models {
namespace {

/// One head of keys serves a group of query heads.
Tensor repeat_heads(const Tensor& x, int64_t heads) {
  if (x.size(1) == heads) return x;
  const int64_t group = heads / x.size(1);
  return x.unsqueeze(2)
      .expand({x.size(0), x.size(1), group, x.size(2), x.size(3)})
      .reshape({x.size(0), heads, x.size(2), x.size(3)});
}

/// Does this processor multiply bfloat16 itself?
bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported;
#else
  return false;
#endif
}

/// LibTorch's fused attention on a CPU takes MKL's products, which widen bfloat16 on other vendors'
/// processors: three times the time of plain ones by oneDNN (forward and backward of 9 heads of 512
/// x 64: 15.1 against 5.5 ms on two cores of an AMD EPYC). These hold the scores, so short rows
/// only.
bool plain_is_faster(const Tensor& q_BHLK) {
  constexpr int64_t kMaxScores = 1 << 24;
  return q_BHLK.is_cpu() && q_BHLK.scalar_type() == at::kBFloat16 && multiplies_bfloat16() &&
         q_BHLK.size(0) * q_BHLK.size(1) * q_BHLK.size(2) * q_BHLK.size(2) <= kMaxScores;
}

Tensor plain_causal_attention(const Tensor& q_BHLK, const Tensor& k, const Tensor& v) {
  const int64_t length = q_BHLK.size(2);
  const double scale = 1 / std::sqrt(static_cast<double>(q_BHLK.size(3)));
  const Tensor q = q_BHLK.flatten(0, 1), keys = k.flatten(0, 1), values = v.flatten(0, 1);
  const Tensor future =
      at::full({length, length}, -std::numeric_limits<double>::infinity(), q.options()).triu(1);
  const Tensor scores = at::baddbmm(future, q, keys.transpose(1, 2), 1, scale);
  return at::bmm(scores.softmax(-1), values).unflatten(0, q_BHLK.sizes().slice(0, 2));
}

/// All queries are the last positions of the keys' document.
Tensor one_document(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window) {
  const int64_t length = q.size(2), keys = k.size(2);
  const bool clipped = window > 0 && keys > window;
  if (!clipped && length == keys) {
    return plain_is_faster(q) ? plain_causal_attention(q, k, v)
                              : at::scaled_dot_product_attention(q, k, v, {}, 0.0, true);
  }
  if (!clipped && length == 1) return at::scaled_dot_product_attention(q, k, v);
  const auto options = at::TensorOptions().dtype(at::kLong).device(q.device());
  const Tensor distance = at::arange(keys - length, keys, options).unsqueeze(1) -
                          at::arange(keys, options).unsqueeze(0);
  Tensor visible = distance.ge(0);
  if (clipped) visible = visible.logical_and(distance.lt(window));
  return at::scaled_dot_product_attention(q, k, v, visible);
}

/// Each document by itself: no work is spent between documents. split and unbind have cheap
/// gradients (cat, stack).
Tensor by_document(const Tensor& q, const Tensor& k, const Tensor& v, const Sequence& sequence,
                   int64_t window) {
  const int64_t prefix = k.size(2) - q.size(2);
  const auto q_rows = q.unbind(0), k_rows = k.unbind(0), v_rows = v.unbind(0);
  std::vector<Tensor> rows;
  auto document = sequence.documents.begin();
  for (int64_t row = 0; row < q.size(0); ++row) {
    std::vector<int64_t> sizes;
    std::vector<bool> real;
    int64_t at = 0;
    const auto extend = [&](int64_t to, bool is_real) {
      if (to > at) sizes.push_back(to - at), real.push_back(is_real);
      at = to;
    };
    for (; document != sequence.documents.end() && document->row == row; ++document) {
      extend(document->begin, false);
      extend(document->end, true);
    }
    extend(q.size(2), false);
    const auto i = static_cast<size_t>(row);
    const auto qs = q_rows[i].split_with_sizes(sizes, 1);
    sizes.insert(sizes.begin(), prefix);
    const auto ks = k_rows[i].split_with_sizes(sizes, 1), vs = v_rows[i].split_with_sizes(sizes, 1);
    const auto own = [&](const std::vector<Tensor>& pieces, size_t s) {
      return (prefix == 0 ? pieces[s + 1] : at::cat({pieces[0], pieces[s + 1]}, 1)).unsqueeze(0);
    };
    std::vector<Tensor> parts;
    for (size_t s = 0; s < qs.size(); ++s) {
      parts.push_back(
          real[s] ? one_document(qs[s].unsqueeze(0), own(ks, s), own(vs, s), window).squeeze(0)
                  : at::zeros_like(vs[s + 1]));
    }
    rows.push_back(parts.size() == 1 ? parts.front() : at::cat(parts, 1));
  }
  return at::stack(rows);
}

/// One call for all documents: queries see keys of the same number, not younger, not outside the
/// window.
Tensor by_mask(const Tensor& q, const Tensor& k, const Tensor& v, const Sequence& sequence,
               int64_t window) {
  const int64_t length = q.size(2);
  Tensor number = at::full({q.size(0), length}, -1, at::kLong);
  for (size_t d = 0; d < sequence.documents.size(); ++d) {
    const Document& document = sequence.documents[d];
    number.select(0, document.row)
        .slice(0, document.begin, document.end)
        .fill_(static_cast<int64_t>(d));
  }
  const Tensor at_length = at::arange(length, at::kLong);
  const Tensor distance = at_length.unsqueeze(1) - at_length.unsqueeze(0);
  Tensor visible = number.unsqueeze(2).eq(number.unsqueeze(1)).logical_and(distance.ge(0));
  if (window > 0) visible = visible.logical_and(distance.lt(window));
  visible =
      visible.logical_or(at::eye(length).to(at::kBool));  // padding sees itself: no empty softmax
  visible = at::cat({at::ones({q.size(0), length, k.size(2) - length}, at::kBool), visible}, 2);
  const Tensor real = number.ge(0).to(q.device()).unsqueeze(1).unsqueeze(3);
  return at::scaled_dot_product_attention(q, k, v, visible.unsqueeze(1).to(q.device())) * real;
}

}  // namespace

Tensor causal_attention(const Tensor& q_BHLK, const Tensor& k, const Tensor& v,
                        const Sequence& sequence, int64_t window) {
  const Tensor keys = repeat_heads(k, q_BHLK.size(1)), values = repeat_heads(v, q_BHLK.size(1));
  if (sequence.whole_rows) return one_document(q_BHLK, keys, values, window);
  const bool clipped_prefix = window > 0 && k.size(2) > q_BHLK.size(2);
  return q_BHLK.is_cuda() && !clipped_prefix ? by_mask(q_BHLK, keys, values, sequence, window)
                                             : by_document(q_BHLK, keys, values, sequence, window);
}

}  // namespace graft::models
