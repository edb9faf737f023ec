// P-tuning v2: softmax(q [P_k; k]^T / sqrt(K)) [P_v; v] in every layer, for classification with a
// head.          Liu et al. 2021, arXiv:2110.07602
// It is prefix tuning (prefix_tuning.cpp: what is trained, PEFT's files) with the prefix itself
// trained; the head comes with train.task: sequence_classification or token_classification. The
// paper's dropout of 0.1 on the prefix is left out, as in HF PEFT, whose type is PREFIX_TUNING.
#include "peft/compound.h"

namespace graft::peft {

void register_p_tuning_v2(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return method_with("prefix_tuning", "{prefix_projection: false}"); }});
}

}  // namespace graft::peft
