#include "configs/names.h"

#include <algorithm>

namespace graft::configs {
namespace {

// Damerau-Levenshtein distance in its restricted form (optimal string alignment).
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> before_last(b.size() + 1), last(b.size() + 1), row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) last[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      row[j] =
          std::min({last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] == b[j - 1] ? 0u : 1u)});
      const bool swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
      if (swapped) row[j] = std::min(row[j], before_last[j - 2] + 1);
    }
    std::swap(before_last, last);
    std::swap(last, row);
  }
  return last[b.size()];
}

}  // namespace

std::string nearest(std::string_view word, const std::vector<std::string>& known) {
  const size_t limit = std::max<size_t>(1, word.size() / 3);
  size_t best = limit + 1;
  std::string result;
  for (const std::string& name : known) {
    const size_t gap = std::max(name.size(), word.size()) - std::min(name.size(), word.size());
    if (gap >= best) continue;  // the distance is at least the gap; keeps huge words cheap
    const size_t distance = edit_distance(word, name);
    if (distance < best && distance < word.size()) {
      best = distance;
      result = name;
    }
  }
  return result;
}

std::string suggest(std::string_view word, const std::vector<std::string>& known) {
  const std::string close = nearest(word, known);
  if (!close.empty()) return "; did you mean '" + close + "'?";
  return known.empty() ? std::string() : "; known: " + join(known, ", ");
}

std::string printable(std::string_view text) {
  std::string result(text);
  for (size_t i = 0; i < result.size(); ++i) {
    const auto byte = static_cast<unsigned char>(result[i]);
    const auto next = static_cast<unsigned char>(i + 1 < result.size() ? result[i + 1] : 0);
    if (byte == 0xC2 && next >= 0x80 && next < 0xA0) result.erase(i + 1, 1), result[i] = '?';
    if ((byte < ' ' && byte != '\n' && byte != '\t') || byte == 0x7F) result[i] = '?';
  }
  return result;
}

std::string join(const std::vector<std::string>& words, std::string_view separator) {
  std::string result;
  for (const std::string& word : words) {
    if (!result.empty()) result += separator;
    result += word;
  }
  return result;
}

}  // namespace graft::configs
