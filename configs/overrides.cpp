// Overrides from the command line: `section.key=value` applied to a tree before it is read.
#include <algorithm>
#include <charconv>
#include <sstream>

#include "configs/check.h"
#include "configs/yaml.h"

namespace graft::configs {
namespace {

constexpr size_t kMaxSteps = 31;  // no deeper than a file may nest

void put_on_command_line(Node& node) {
  node.place = node.key_place = Place{};
  for (Node& item : node.items) put_on_command_line(item);
}

bool is_index(const std::string& step) {
  return !step.empty() && step.size() < 8 &&
         std::all_of(step.begin(), step.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// The child of `parent` that one step of an override's path names, made if it may be; null: `why`
// says why not.
Node* descend(Node& parent, const std::string& step, std::string& why) {
  if (parent.kind == Node::Kind::kNull) {
    parent.kind = is_index(step) ? Node::Kind::kList : Node::Kind::kMap;
  }
  if (parent.kind == Node::Kind::kScalar) {
    why = "is a single value, '" + parent.text + "': it has no '" + step + "'";
    return nullptr;
  }
  if (parent.kind == Node::Kind::kMap) {
    for (Node& item : parent.items) {
      if (item.key == step) return &item;
    }
    Node& made = parent.items.emplace_back();
    made.key = step;
    return &made;
  }
  size_t index = 0;
  if (is_index(step)) std::from_chars(step.data(), step.data() + step.size(), index);
  if (!is_index(step) || index > parent.items.size()) {
    why = detail::concat("is a list of ", parent.items.size(), ": '", step,
                         "' is not an index into it (the first is 0)");
    return nullptr;
  }
  return index == parent.items.size() ? &parent.items.emplace_back() : &parent.items[index];
}

}  // namespace

void apply_override(std::string_view assignment, Node& root, Problems& problems) {
  const size_t equals = assignment.find('=');
  const std::string path(assignment.substr(0, equals));
  std::vector<std::string> steps;
  std::istringstream stream(path);
  for (std::string step; std::getline(stream, step, '.');) steps.push_back(step);
  const bool well_formed = equals != std::string_view::npos && !steps.empty() &&
                           path.back() != '.' && steps.size() <= kMaxSteps &&
                           std::find(steps.begin(), steps.end(), "") == steps.end();
  if (!well_formed) {
    problems.add({}, path, "expected section.key=value, got '" + std::string(assignment) + "'");
    return;
  }
  Problems value_problems;
  std::optional<Node> value = parse_yaml(assignment.substr(equals + 1), value_problems);
  if (!value_problems.empty()) {
    problems.add({}, path, value_problems.first());
    return;
  }
  put_on_command_line(*value);
  Node* target = &root;
  std::string walked;
  for (const std::string& step : steps) {
    std::string why;
    target = descend(*target, step, why);
    if (target == nullptr) {
      problems.add({}, path, (walked.empty() ? "the file" : walked) + " " + why);
      return;
    }
    walked += (walked.empty() ? "" : ".") + step;
  }
  value->key = target->key;
  *target = std::move(*value);
}

}  // namespace graft::configs
