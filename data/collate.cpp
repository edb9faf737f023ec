#include "data/collate.h"

#include <ATen/ATen.h>

#include <vector>

#include "configs/check.h"

namespace graft::data {
namespace {

/// What is to be predicted at token `t`.
int64_t label_at(const Piece& piece, int64_t t) {
  const int64_t next = t + 1, length = std::ssize(piece.tokens);
  if (piece.label != kNoLabel) return next == length ? piece.label : kNoLabel;
  if (!piece.token_labels.empty())
    return piece.loss_mask[t] ? int64_t{piece.token_labels[t]} : kNoLabel;
  return next < length && piece.loss_mask[next] ? int64_t{piece.tokens[next]} : kNoLabel;
}

}  // namespace

Batch collate(std::span<const Piece> pieces, int64_t rows, int64_t columns) {
  Batch batch{.tokens_BL = at::zeros({rows, columns}, at::kLong),
              .positions_BL = at::zeros({rows, columns}, at::kLong),
              .documents_BL = at::full({rows, columns}, -1, at::kLong),
              .labels_BL = at::full({rows, columns}, kNoLabel, at::kLong)};
  std::vector<int64_t> documents_in_row(rows, 0);
  for (const Piece& piece : pieces) {
    const int64_t length = static_cast<int64_t>(piece.tokens.size());
    GRAFT_ASSERT(piece.row >= 0 && piece.row < rows && piece.column >= 0 &&
                     piece.column + length <= columns &&
                     piece.loss_mask.size() == piece.tokens.size() &&
                     (piece.token_labels.empty() || std::ssize(piece.token_labels) == length),
                 "a document of ", length, " at row ", piece.row, ", column ", piece.column,
                 " of [", rows, ", ", columns, "]");
    const int64_t start = piece.row * columns + piece.column;
    int64_t* tokens = batch.tokens_BL.data_ptr<int64_t>() + start;
    int64_t* positions = batch.positions_BL.data_ptr<int64_t>() + start;
    int64_t* documents = batch.documents_BL.data_ptr<int64_t>() + start;
    int64_t* labels = batch.labels_BL.data_ptr<int64_t>() + start;
    const int64_t document = documents_in_row[piece.row]++;
    for (int64_t t = 0; t < length; ++t) {
      tokens[t] = piece.tokens[t];
      positions[t] = t;
      documents[t] = document;
      labels[t] = label_at(piece, t);
      batch.num_targets += labels[t] != kNoLabel ? 1 : 0;
    }
    batch.num_tokens += length;
  }
  return batch;
}

}  // namespace graft::data
