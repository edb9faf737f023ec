#include "models/nn/sequence.h"

#include <ATen/ATen.h>

namespace graft::models {

Sequence make_sequence(const data::Batch& batch) {
  Sequence sequence;
  const Tensor documents_BL = batch.documents_BL.cpu().contiguous();
  const int64_t rows = documents_BL.size(0), length = documents_BL.size(1);
  const auto* number = documents_BL.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row, number += length) {
    for (int64_t begin = 0; begin < length;) {
      int64_t end = begin + 1;
      while (end < length && number[end] == number[begin]) ++end;
      if (number[begin] >= 0) sequence.documents.push_back({row, begin, end});
      begin = end;
    }
  }
  sequence.whole_rows = static_cast<int64_t>(sequence.documents.size()) == rows;
  for (const Document& d : sequence.documents) {
    sequence.whole_rows = sequence.whole_rows && d.begin == 0 && d.end == length;
  }
  return sequence;
}

}  // namespace graft::models
