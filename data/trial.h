// A trial: work that a damaged file may make die, done in a copy of the process.
#pragma once

#include <functional>
#include <string>

namespace graft::data {

/// What `work` returns in a forked child, which does it silently; this process stays untouched.
/// @param max_computing_s  seconds on the processor after which the child dies: damage makes loops
/// @param death            how the child died; empty: it did not
/// @throws graft::Error (kData) that the work threw in the child
std::string in_trial(unsigned max_computing_s, const std::function<std::string()>& work,
                     std::string& death);

}  // namespace graft::data
