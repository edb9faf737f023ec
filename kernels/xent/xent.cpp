#include "kernels/xent/xent.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/device.h"
#include "kernels/element.h"
#include "kernels/gemm/gemm.h"

namespace graft::kernels {
namespace cpu {
template <class T>
void softmax_loss(const T* logits, const int64_t* labels, int64_t ignored, float* losses,
                  T* d_logits, int64_t rows, int64_t vocabulary);
}  // namespace cpu
namespace cuda {
template <class T>
void softmax_loss(const T* logits, const int64_t* labels, int64_t ignored, float* losses,
                  T* d_logits, int64_t rows, int64_t vocabulary, Stream stream);
}  // namespace cuda
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check_labels(const at::Tensor& labels, int64_t rows, int64_t vocabulary) {
  GRAFT_CHECK(labels.scalar_type() == at::kLong && labels.dim() == 1 && labels.size(0) == rows,
              "cross-entropy of ", rows, " rows needs int64 labels [", rows, "], got ",
              labels.scalar_type(), labels.sizes());
  if (rows == 0) return;
  const at::Tensor bad = (labels != kIgnoredLabel) & ((labels < 0) | (labels >= vocabulary));
  GRAFT_CHECK(!bad.any().item<bool>(), ExitCode::kData, "label ",
              labels.masked_select(bad)[0].item<int64_t>(), " in row ",
              bad.nonzero()[0].item<int64_t>(), " is outside the vocabulary [0, ", vocabulary,
              ") and not ", kIgnoredLabel, "; was the data prepared with another tokenizer?");
}

/// Losses [rows] float32 and, where d_logits [rows, V] is defined, softmax - onehot; d_logits may
/// be logits itself.
void softmax_loss(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& losses,
                  const at::Tensor& d_logits) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  float* loss = losses.mutable_data_ptr<float>();
  with_element(logits, "cross-entropy", [&](auto element) {
    using T = decltype(element);
    const T* in = elements<T>(logits);
    T* out = d_logits.defined() ? mutable_elements<T>(d_logits) : nullptr;
    on_device(
        logits,
        [&] {
          at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * vocabulary;
            cpu::softmax_loss(in + first, label + begin, kIgnoredLabel, loss + begin,
                              out == nullptr ? nullptr : out + first, end - begin, vocabulary);
          });
        },
        GRAFT_CUDA([&](Stream stream) {
          cuda::softmax_loss(in, label, kIgnoredLabel, loss, out, rows, vocabulary, stream);
        }));
  });
}

/// Rows a chunk, so that its logits stay below the bound and the last chunk is not a small one.
int64_t rows_a_chunk(int64_t rows, int64_t row_bytes, int64_t logits_bytes) {
  const int64_t most = std::max<int64_t>(1, logits_bytes / row_bytes);
  const int64_t num_chunks = (rows + most - 1) / most;
  return (rows + num_chunks - 1) / num_chunks;
}

struct FrozenHead : torch::autograd::Function<FrozenHead> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden,
                            const at::Tensor& weight, const at::Tensor& labels) {
    const XentResult result = frozen_head_loss(hidden, weight, labels, Gradient::kCompute);
    ctx->save_for_backward({result.d_hidden});
    return result.loss_sum;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {ctx->get_saved_variables()[0] * grads[0], at::Tensor(), at::Tensor()};
  }
};

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits,
                            const at::Tensor& labels) {
    ctx->save_for_backward({logits, labels});
    const at::Tensor losses = at::empty(labels.sizes(), logits.options().dtype(at::kFloat));
    softmax_loss(logits, labels, losses, at::Tensor());
    return losses.sum(at::kDouble);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &logits = saved[0], &labels = saved[1];
    const at::Tensor losses = at::empty(labels.sizes(), logits.options().dtype(at::kFloat));
    const at::Tensor d_logits = at::empty_like(logits);
    softmax_loss(logits, labels, losses, d_logits);
    return {d_logits.mul_(grads[0]), at::Tensor()};
  }
};

}  // namespace

XentResult frozen_head_loss(const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& labels, Gradient gradient, int64_t logits_bytes) {
  GRAFT_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
              "the head needs hidden [N, D] and weight [V, D], got ", hidden.sizes(), " and ",
              weight.sizes());
  check_labels(labels, hidden.size(0), weight.size(0));
  if (logits_bytes == 0) logits_bytes = weight.is_cpu() ? kLogitsBytesCpu : kLogitsBytesCuda;

  const at::Tensor labelled = (labels != kIgnoredLabel).nonzero().squeeze(1);
  const int64_t rows = labelled.size(0);
  const at::Tensor losses = at::empty({rows}, hidden.options().dtype(at::kFloat));
  XentResult result;
  if (gradient == Gradient::kCompute) result.d_hidden = at::zeros(hidden.sizes(), hidden.options());
  if (rows > 0) {
    const int64_t row_bytes = weight.size(0) * static_cast<int64_t>(weight.element_size());
    const int64_t chunk = rows_a_chunk(rows, row_bytes, logits_bytes);
    for (int64_t first = 0; first < rows; first += chunk) {
      const int64_t count = std::min(chunk, rows - first);
      const at::Tensor at_rows = labelled.narrow(0, first, count);
      const at::Tensor logits =
          gemm(hidden.index_select(0, at_rows).to(weight.scalar_type()), weight.t());
      softmax_loss(logits, labels.index_select(0, at_rows), losses.narrow(0, first, count),
                   gradient == Gradient::kCompute ? logits : at::Tensor());
      if (gradient == Gradient::kSkip) continue;
      result.d_hidden.index_copy_(0, at_rows, gemm(logits, weight).to(hidden.scalar_type()));
    }
  }
  result.loss_sum = losses.sum(at::kDouble);
  return result;
}

at::Tensor frozen_head_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                     const at::Tensor& labels) {
  if (at::GradMode::is_enabled() && hidden.requires_grad()) {
    return FrozenHead::apply(hidden, weight, labels);
  }
  return frozen_head_loss(hidden, weight, labels, Gradient::kSkip).loss_sum;
}

at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& labels) {
  GRAFT_CHECK(logits.dim() == 2, "cross-entropy needs logits [N, V], got ", logits.sizes());
  check_labels(labels, logits.size(0), logits.size(1));
  return CrossEntropy::apply(logits.contiguous(), labels.contiguous());
}

}  // namespace graft::kernels
