#include "models/nn/sequence.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace graft::models {

Sequence make_sequence(const data::Batch& batch) {
  Sequence sequence;
  sequence.positions_BL = batch.positions_BL;
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

Carry put_before_documents(const Carry& carry, const Tensor& rows_PD) {
  const Sequence& old = *carry.sequence;
  const Tensor& h_BLD = carry.h();
  const int64_t num_rows = h_BLD.size(0), length = h_BLD.size(1), added = rows_PD.size(0);
  std::vector<int64_t> documents_of(static_cast<size_t>(num_rows));
  for (const Document& d : old.documents) ++documents_of[static_cast<size_t>(d.row)];
  const int64_t most = *std::max_element(documents_of.begin(), documents_of.end());
  const int64_t new_length = length + added * most;

  // Of each new place the old one it is filled from; behind the old row: the added ones, and zeros.
  const Tensor source = at::full({num_rows, new_length}, length + added, at::kLong);
  const Tensor new_place = at::empty({num_rows, length}, at::kLong);
  const Tensor position = at::zeros({num_rows, new_length}, at::kLong);
  const Tensor old_position = old.positions_BL.cpu();
  auto sequence = std::make_shared<Sequence>();
  sequence->whole_rows = old.whole_rows;
  auto from = source.accessor<int64_t, 2>(), to = new_place.accessor<int64_t, 2>(),
       at = position.accessor<int64_t, 2>();
  const auto was = old_position.accessor<int64_t, 2>();
  auto document = old.documents.begin();
  for (int64_t row = 0; row < num_rows; ++row) {
    int64_t place = 0;
    for (int64_t i = 0; i < length; ++i, ++place) {
      if (document != old.documents.end() && document->row == row && document->begin == i) {
        sequence->documents.push_back({row, place, place + added + document->end - i});
        for (int64_t j = 0; j < added; ++j, ++place)
          from[row][place] = length + j, at[row][place] = was[row][i] + j;
        ++document;
      }
      from[row][place] = i, to[row][i] = place, at[row][place] = was[row][i] + added;
    }
  }
  const at::Device device = h_BLD.device();
  sequence->positions_BL = position.to(device);
  sequence->token_places_BT = new_place.to(device);
  if (old.token_places_BT.defined())
    sequence->token_places_BT = sequence->token_places_BT.gather(1, old.token_places_BT);

  const auto rows = rows_PD.to(h_BLD.scalar_type()).unsqueeze(0).expand({num_rows, -1, -1});
  const Tensor all = at::cat({h_BLD, rows, at::zeros_like(h_BLD.slice(1, 0, 1))}, 1);
  const Tensor index = source.to(device).unsqueeze(-1).expand({-1, -1, h_BLD.size(2)});
  Carry out = carry.with(all.gather(1, index));
  out.sequence = std::move(sequence);
  return out;
}

Carry shift_positions(const Carry& carry, int64_t count) {
  auto sequence = std::make_shared<Sequence>(*carry.sequence);
  sequence->positions_BL = sequence->positions_BL + count;
  Carry out = carry;
  out.sequence = std::move(sequence);
  return out;
}

Tensor at_tokens(const Carry& carry) {
  const Tensor& places = carry.sequence->token_places_BT;
  if (!places.defined()) return carry.h();
  return carry.h().gather(1, places.unsqueeze(-1).expand({-1, -1, carry.h().size(2)}));
}

}  // namespace graft::models
