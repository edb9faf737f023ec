// Help with misspelt names, shared by the schema (unknown keys), the registries and whoever looks
// names up; and names that strangers wrote, made fit to print.
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

/// Text that may come from a file, for a terminal: '?' for each control character (ASCII's and the
/// C1 of UTF-8) but newlines and tabs.
std::string printable(std::string_view text);

std::string join(const std::vector<std::string>& words, std::string_view separator);

}  // namespace graft::configs
