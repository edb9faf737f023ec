// Problems (configs/yaml.h): collecting mistakes and printing them as one error.
#include <algorithm>

#include "configs/check.h"
#include "configs/yaml.h"

namespace graft::configs {
namespace {

constexpr size_t kMaxListed = 100;
constexpr size_t kMaxText = 300;

// What a file holds is untrusted: no control character reaches the terminal, no line is endless.
std::string one_line(std::string_view text) {
  std::string result(text.substr(0, kMaxText));
  for (char& c : result) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return text.size() > kMaxText ? result + "..." : result;
}

bool is_under(std::string_view path, std::string_view parent) {
  return path.substr(0, parent.size()) == parent &&
         (path.size() == parent.size() || parent.empty() || path[parent.size()] == '.');
}

}  // namespace

void Problems::add(Place place, std::string_view path, std::string_view message) {
  if (problems_.size() == kMaxListed) {
    ++num_unlisted_;
    return;
  }
  for (const Problem& known : problems_) {
    if (known.path == path && known.place.line == place.line &&
        known.place.column == place.column) {
      return;
    }
  }
  problems_.push_back({place, std::string(path), std::string(message)});
}

bool Problems::any_under(std::string_view path) const {
  return std::any_of(problems_.begin(), problems_.end(),
                     [&](const Problem& problem) { return is_under(problem.path, path); });
}

void Problems::throw_if_any(std::string_view source) const {
  if (problems_.empty()) return;
  std::vector<Problem> sorted = problems_;
  std::stable_sort(sorted.begin(), sorted.end(), [](const Problem& a, const Problem& b) {
    const bool a_on_command_line = a.place.line == 0, b_on_command_line = b.place.line == 0;
    if (a_on_command_line != b_on_command_line) return b_on_command_line;
    return std::pair(a.place.line, a.place.column) < std::pair(b.place.line, b.place.column);
  });
  std::string text;
  for (const Problem& problem : sorted) {
    if (!text.empty()) text += "\n";
    text += problem.place.line == 0
                ? "command line"
                : detail::concat(source, ":", problem.place.line, ":", problem.place.column);
    if (!problem.path.empty()) text += ": " + one_line(problem.path);
    text += ": " + one_line(problem.message);
  }
  if (num_unlisted_ > 0) text += detail::concat("\n... and ", num_unlisted_, " more");
  throw Error(ExitCode::kUsage, text);
}

}  // namespace graft::configs
