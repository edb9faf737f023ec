// KronA under the names of its papers: one method (methods/reparam/krona.cpp), other defaults; and
// the product that all of them add.
#pragma once

#include <memory>
#include <string>

#include "peft/method.h"

namespace graft::peft {

/// @param layout, init_weights  defaults of these fields
std::unique_ptr<Method> make_krona(const std::string& layout, const std::string& init_weights);

/// The rows or columns of A for a size of the matrix: near its square root, if auto.
/// @param field, where  whose it is, for the message about one that does not divide
int64_t krona_factor(const configs::Auto<int>& wanted, int64_t size, const char* field,
                     const std::string& where);

/// (A (x) B) x with x as [i1, i2]: A x B^T, [..., o1, o2].
Tensor krona_product(const Tensor& x, const Tensor& a, const Tensor& b);

}  // namespace graft::peft
