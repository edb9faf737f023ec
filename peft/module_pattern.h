// ModulePattern: a key of PEFT's rank_pattern or alpha_pattern. PEFT hands it to Python,
// re.match(r"(.*\.)?(key)$", module). Here is the same language but for what has no place in the
// name of a module (lookaround, back references, flags). The set of all positions reached moves
// through the pattern; what repetitions in repetitions cost nevertheless is counted.
#pragma once

#include <cstddef>
#include <functional>
#include <set>
#include <string>
#include <string_view>

namespace graft::peft {

class ModulePattern {
 public:
  /// @throws graft::Error (kData) for a key that Python refuses or that uses what is not known here
  explicit ModulePattern(std::string_view key);
  static constexpr size_t kMostWork = 50'000'000;  ///< positions looked at: some seconds
  /// @param module  "model.layers.3.self_attn.q_proj"
  /// @param work  what may still be done; falls by what was
  /// @throws graft::Error (kData) naming the key if that is not enough
  bool matches(std::string_view module, size_t& work) const;

  using Positions = std::set<size_t>;
  struct Text {
    std::string_view characters, key;
    size_t& work;
    void spend(size_t positions) const;
  };
  /// From where a part of the pattern may begin in a text to where it may end.
  using Step = std::function<Positions(const Text& text, const Positions& begins)>;

 private:
  std::string key_;
  Step step_;
};

}  // namespace graft::peft
