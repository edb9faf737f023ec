// Help with misspelt names, shared by the schema (unknown keys), the registries and whoever looks
// names up.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace graft::configs {

/// The known name closest to `word` by edit distance (a swap of neighbours counts once), or an
/// empty string when none is close enough to be a slip of the finger: a third of the word, at least
/// one letter.
std::string nearest(std::string_view word, const std::vector<std::string>& known);

/// The end of an "unknown name" message: "; did you mean 'lora'?", else "; known: a, b, c".
std::string suggest(std::string_view word, const std::vector<std::string>& known);

std::string join(const std::vector<std::string>& words, std::string_view separator);

}  // namespace graft::configs
