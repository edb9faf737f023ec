// JointFrame: what FRoD's slots of a kind share: one basis of the inputs of all their matrices, and
// the places of the sparse part.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "peft/places.h"
#include "peft/slot_map.h"

namespace graft::peft {

class JointFrame {
 public:
  std::vector<size_t> slots;  ///< their numbers among those adapted
  Tensor v;                   ///< [in, in], the basis; a file may set it
  Tensor places;              ///< [2, n], rows and columns; a file may set them

  /// Sets v to what the base gives.
  void set_v(const Tensor& basis);
  /// v, which only goes with the base that it was taken from: the other half, U, is in no file.
  /// @throws graft::Error (kData) if a file's is another one
  const Tensor& checked_v();

 private:
  Tensor found_;  ///< v as the base gives it
  uint32_t version_ = 0;
};

/// The kind of a module, as PEFT names it: "self_attn_q_proj".
std::string module_kind(const LinearSite& site);

/// A basis [in, in] that makes matrices [out, in] of a kind as like to each other as can be: a
/// higher-order generalised singular value decomposition.
/// @param alpha  ridge
Tensor joint_basis(const std::vector<Tensor>& matrices, double alpha);

}  // namespace graft::peft
