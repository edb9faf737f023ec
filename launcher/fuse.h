// Fusing: several adapters, each trained for a concept of its own, into one LoRA.
//   Gu et al. 2023, Mix-of-Show, arXiv:2305.18292, sec. 3.3 (gradient fusion)
// For every adapted matrix the change D is sought that does on each concept's inputs X_c what that
// concept's change D_c does there: the least of sum_c |(D - D_c) X_c|^2. The paper searches it with
// L-BFGS from the untouched matrix; it has a closed form, for which the Gram matrices X_c X_c^T are
// all that is needed of the inputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "launcher/run.h"
#include "launcher/world.h"

namespace graft::launcher {

/// One concept at one matrix.
struct FusionPart {
  at::Tensor update;  ///< D_c, [out, in]
  at::Tensor gram;    ///< X_c X_c^T, [in, in], over the positions of its data
};

/// D = (sum_c D_c G_c) (sum_c G_c + e I)^-1, with e = epsilon times the mean of the diagonal of
/// sum_c G_c: where no concept has inputs, the matrix stays as it is.
at::Tensor fuse(const std::vector<FusionPart>& parts, double epsilon);

/// sum_c |(D - D_c) X_c|^2 over sum_c |D_c X_c|^2: 0 if every concept is kept whole.
double lost_share(const at::Tensor& update, const std::vector<FusionPart>& parts);

struct FuseOptions {
  std::vector<std::string> adapters;  ///< folders
  std::vector<std::string> data;      ///< of each: shards, or a glob
  int rank = 0;                       ///< of the LoRA
  double epsilon = 1e-4;
  std::string output;  ///< folder to make, in PEFT's layout
};

struct FuseReport {
  size_t num_matrices = 0;
  double lost = 0;      ///< mean over matrices of lost_share of the LoRA
  double averaged = 0;  ///< the same of the plain mean of the changes, to compare with
};

/// Runs each adapter over its data, fuses and writes. The singular values beyond `rank` are cut
/// off. Collective.
/// @param run  of the base; its methods are not used
/// @throws graft::Error: kUsage for adapters that are no changes of linear layers, a rank larger
/// than a matrix, an output that exists
FuseReport fuse_adapters(World& world, const Run& run, const FuseOptions& options);

}  // namespace graft::launcher
