// What VeRA and PVeRA share: fields, and the two random matrices all slots take parts of.
#pragma once

#include <string>
#include <vector>

#include "peft/attach.h"
#include "peft/targets.h"

namespace graft::peft {

struct VeraFields {
  Targets targets;
  int r = 256;
  int projection_prng_key = 0;
  bool save_projection = true;
  double dropout = 0;
  double d_initial = 0.1;
  Tensor a, b;  ///< no fields: A [rows, widest in], B [widest out, r]

  /// @param prefix  of the names of fields and tensors: "vera"
  void fields(configs::Fields& f, const std::string& prefix);
  /// Draws A and B as PyTorch does and lists them, if they are saved.
  void draw(AttachContext& context, const std::vector<const LinearSite*>& sites, int64_t rows,
            const std::string& prefix);
  Tensor a_of(const LinearSite& site) const { return a.slice(1, 0, site.info.in); }
  Tensor b_of(const LinearSite& site) const { return b.slice(0, 0, site.info.out); }
};

}  // namespace graft::peft
