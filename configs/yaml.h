// YAML as a plain tree with places: what the schema reads from and writes to. The parser refuses
// what a configuration has no use for and what makes YAML dangerous or surprising: anchors,
// aliases, merge keys, tags, duplicate keys, several documents, deep nesting, control characters,
// invalid UTF-8, more than 1 MiB.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace graft::configs {

/// Where something was written, 1-based, columns in bytes; line 0 is the command line.
struct Place {
  int line = 0;
  int column = 0;
};

struct Node {
  enum class Kind { kNull, kScalar, kList, kMap };

  Kind kind = Kind::kNull;
  Place place;
  std::string text;         ///< of a scalar
  bool quoted = false;      ///< a scalar in quotes (or a block of text) is always a string
  std::string key;          ///< its name, if it is a member of a mapping
  Place key_place;          ///< where that name was written
  std::vector<Node> items;  ///< of a list or a mapping, in order

  const Node* find(std::string_view name) const;  ///< member of a mapping, or null
};

/// Mistakes found so far; one error is thrown at the end, with all of them.
class Problems {
 public:
  /// Records a mistake, unless the same place and path have one already.
  void add(Place place, std::string_view path, std::string_view message);

  bool any_under(std::string_view path) const;  ///< at the path itself or at a key below it

  bool empty() const { return problems_.empty(); }
  const std::string& first() const { return problems_.front().message; }
  const std::string& first_path() const { return problems_.front().path; }

  /// Throws graft::Error (kUsage), one line each: `source:line:col: key.path: message`, in file
  /// order and then `command line: key.path: message`; does nothing if there are none.
  void throw_if_any(std::string_view source) const;

 private:
  struct Problem {
    Place place;
    std::string path;
    std::string message;
  };
  std::vector<Problem> problems_;
  size_t num_unlisted_ = 0;  // past the first hundred they are only counted
};

/// Parses one document. Mistakes go to `problems`; nothing is returned if they leave no sensible
/// tree.
std::optional<Node> parse_yaml(std::string_view text, Problems& problems);

/// Applies `section.key=value` to a tree. A number is an index into a list (one past the end
/// appends); the value is YAML; what it writes has its place on the command line.
void apply_override(std::string_view assignment, Node& root, Problems& problems);

/// Text that parses to the same tree: mappings in block style, lists of scalars on one line.
std::string to_yaml(const Node& root);

/// The same on one line, for messages and tables.
std::string to_flow(const Node& node);

}  // namespace graft::configs
