// The k largest of scores that are cut over ranks, exactly: a radix-select that adds up histograms
// (kernels/select), so that only the chosen places travel.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "dist/tree_reduce.h"

namespace graft::dist {

class Comm;

/// The places of the k largest of all scores of all vectors; of equal ones those that come first,
/// in the order of the vectors and their elements. The same on every rank, however the vectors are
/// cut. Collective (Traffic::kControl: three histograms of int64, a count a slice, the places).
/// @param scores  none negative or NaN
/// @return        of each vector its chosen elements, int64, ascending
/// @throws graft::Error (kUsage) if there are fewer than k scores
std::vector<at::Tensor> global_top_k(Comm& comm, std::span<const CutVector> scores, int64_t k);

}  // namespace graft::dist
