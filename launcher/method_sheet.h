// The sheet of a method: what `graft methods NAME` shows. Nothing is said of a method here: it is
// put on models without weights, once with its defaults and once with each of its other choices,
// and looked at.
#pragma once

#include <string>

#include "configs/schema.h"
#include "launcher/facts.h"
#include "peft/method.h"

namespace graft::launcher {

/// The shape that is counted on when no model is named: the quickstart's.
std::string default_shape();

/// @param model  Hugging Face folder, GGUF file or shape, of which only the shape is read
/// @throws graft::Error if the method with its defaults does not fit a model that is not
/// default_shape(), for which the sheet says so
Facts method_sheet(const peft::MethodFacts& method, const std::string& model);

/// All keys of an entry of the `peft` list with this method.
configs::FieldDoc method_fields(const std::string& method);

}  // namespace graft::launcher
