#include "peft/vera_fields.h"

#include <ATen/ATen.h>

#include "peft/projection.h"

namespace graft::peft {

void VeraFields::fields(configs::Fields& f, const std::string& prefix) {
  f("r", r, f.range(1, 65536), "rank, the inner size");
  f("projection_prng_key", projection_prng_key, f.at_least(0), "seed of the shared matrices");
  f("save_projection", save_projection, "save the shared matrices too, not only their seed");
  f(prefix + "_dropout", dropout, f.at_least(0).below(1), "probability, on the adapter's input");
  f("d_initial", d_initial, "first value of " + prefix + "_lambda_d");
}

void VeraFields::draw(AttachContext& context, const std::vector<const LinearSite*>& sites,
                      int64_t rows, const std::string& prefix) {
  const Widths width = widest(sites);
  const auto generator = torch_generator(static_cast<uint64_t>(projection_prng_key));
  a = torch_kaiming_uniform({rows, width.in}, 0, generator).to(context.device);
  b = torch_kaiming_uniform({width.out, r}, 0, generator).to(context.device);
  if (!save_projection) return;
  add_projection(context, prefix + "_A", a);
  add_projection(context, prefix + "_B", b);
}

}  // namespace graft::peft
