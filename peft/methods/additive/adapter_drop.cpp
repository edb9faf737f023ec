// AdapterDrop: y = o + U f(D o + b) + c, in a step not in the first n layers, n uniform in 0 .. 11.
//       Ruckle et al. 2020, arXiv:2010.11918, the robust form: any n may be left out afterwards
// It is the bottleneck adapter (bottleneck.cpp: what is trained, its other forms) with drop_up_to
// set: all ranks and lanes of a step draw the same n. auto is the paper's 11, of its 12 layers, and
// of fewer layers all but one, so that every step trains some. Left out afterwards: init_from with
// skip_layers: [0, 1, 2, 3, 4]. The specialised form of the paper is leave_out: [0, 1, 2, 3, 4]
// with drop_up_to: 0; nothing is then computed backwards below layer 5. HF PEFT has no such method.
#include "peft/compound.h"

namespace graft::peft {

void register_adapter_drop(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add(
      {facts.name, facts.summary, [] { return method_with("bottleneck", "{drop_up_to: auto}"); }});
}

}  // namespace graft::peft
