// ModulePattern: a key of PEFT's rank_pattern or alpha_pattern. PEFT hands it to Python,
// re.match(r"(.*\.)?(key)$", module). Here is the same language but for what has no place in the
// name of a module (lookaround, back references, flags). The set of all positions reached moves
// through the pattern, so no key takes more than polynomial time.
#pragma once

#include <cstddef>
#include <functional>
#include <set>
#include <string_view>

namespace graft::peft {

class ModulePattern {
 public:
  /// @throws graft::Error (kData) for a key that Python refuses or that uses what is not known here
  explicit ModulePattern(std::string_view key);
  /// @param module  "model.layers.3.self_attn.q_proj"
  bool matches(std::string_view module) const;

  using Positions = std::set<size_t>;
  /// From where a part of the pattern may begin in a text to where it may end.
  using Step = std::function<Positions(std::string_view text, const Positions& begins)>;

 private:
  Step step_;
};

}  // namespace graft::peft
