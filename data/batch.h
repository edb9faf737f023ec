// Batch: the only type of the data side that models see. One micro-batch of rows on the CPU or the
// device. Shape letters: B rows, L tokens of a row.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace graft::data {

struct Batch {
  at::Tensor tokens_BL;     ///< int64; padding holds token 0 and belongs to no document
  at::Tensor positions_BL;  ///< int64, restarting at 0 with each document
  at::Tensor documents_BL;  ///< int64, number of the document inside its row, -1 for padding
  at::Tensor labels_BL;  ///< int64, what to predict at this position, or -100: the token AFTER it
                         ///< (already shifted), or a classifier's label
  int64_t num_targets = 0;  ///< labels that are not -100
  int64_t num_tokens = 0;   ///< tokens that are not padding

  bool empty() const { return num_tokens == 0; }
};

}  // namespace graft::data
