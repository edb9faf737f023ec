// LyCORIS's files: one safetensors file for adapters of several kinds, a module's tensors named
// "lycoris_model_layers_3_self_attn_q_proj.lora_up.weight" with a scalar `alpha` beside them. Read
// into the adapters of the methods that compute the same, and written from them.
//   Yeh et al. 2023, arXiv:2309.14859; names and formulas of lycoris-lora 4.1.3, modules/*.py
#pragma once

#include <string>
#include <vector>

#include "models/io/safetensors.h"
#include "peft/peft.h"

namespace graft::peft {

/// The adapters of a file: one for every method, and for every setting that a method has once only
/// (sizes of blocks, how sizes are factored). What LyCORIS's `constraint` bounds is stored as it is
/// used; it does not bound what is trained on.
/// @param base  asked for the gains of norms: LyCORIS stores their change
/// @throws graft::Error (kData) for modules that the model does not have, tensors of convolutions,
/// and kinds that no method here computes, all in one message
std::vector<Peft::Saved> read_lycoris(const std::string& path, const SlotMap& slots,
                                      BaseWeights& base);

/// The tensors of an adapter as LyCORIS names them, with what it has no place for (rsLoRA, scalars,
/// scales) multiplied in.
/// @param adapter  as Peft::save gives it: patterns hold whole module paths
/// @throws graft::Error (kUsage) for what LyCORIS has no kind for
models::io::NamedTensors write_lycoris(const Peft::Saved& adapter, const SlotMap& slots,
                                       BaseWeights& base);

}  // namespace graft::peft
