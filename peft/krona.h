// KronA under the names of its papers: one method (methods/reparam/krona.cpp), other defaults.
#pragma once

#include <memory>
#include <string>

#include "peft/method.h"

namespace graft::peft {

/// @param layout, init_weights  defaults of these fields
std::unique_ptr<Method> make_krona(const std::string& layout, const std::string& init_weights);

}  // namespace graft::peft
