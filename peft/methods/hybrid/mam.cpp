// MAM adapter: a prefix in attention beside a scaled parallel adapter at the MLP.
//       He et al. 2021, arXiv:2110.04366, sec. 4.6
// Trains what its two parts train (prefix_tuning.cpp, bottleneck.cpp), with the paper's choices: a
// prefix of 30 through an MLP of width 512, and y = MLP(x) + 4 U relu(D x + b) + c, x the MLP's own
// input. The paper's inner width is 512 of 1024; reduction_factor 2 says the same of any width, as
// the `adapters` library has it; that reads the raw tap (bottleneck: {tap: raw}) and counts tokens
// from 0 (prefix_tuning: {shift_positions: false}), neither the default here: see there. U is
// zeros, so at step 0 it is prefix tuning alone: not the base. Not mergeable. HF PEFT has no such
// method.
#include "peft/compound.h"

namespace graft::peft {

void register_mam(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] {
                  const char* prefix =
                      "{num_virtual_tokens: 30, prefix_projection: true, encoder_hidden_size: 512}";
                  const char* parallel =
                      "{sites: [mlp], form: parallel, reduction_factor: 2, non_linearity: relu, "
                      "scaling: 4}";
                  return std::make_unique<CompoundMethod>(std::vector<CompoundMethod::Child>{
                      {"prefix_tuning", method_with("prefix_tuning", prefix)},
                      {"bottleneck", method_with("bottleneck", parallel)}});
                }});
}

}  // namespace graft::peft
