// DiffuseKronA: y = W x + s P (A (x) B) x, P numbers the outputs with B's rows first.
//   Marjit et al. 2024, "DiffuseKronA: A Parameter Efficient Fine-tuning Method for Personalized
//   Diffusion Models", arXiv:2402.17412
// KronA (krona.cpp) with the defaults of the paper's code: its order of the outputs, which is the
// one of its forward pass and not that of kron(A, B), and A normal with deviation 1 / o1, B zero.
// The model is unchanged at step 0. Mergeable, with the same order. The code's a_out 64 and a_in 8
// fit Stable Diffusion's widths; auto fits any.
#include "peft/krona.h"

namespace graft::peft {

void register_diffusekrona(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return make_krona("diffusekrona", "normal"); }});
}

}  // namespace graft::peft
