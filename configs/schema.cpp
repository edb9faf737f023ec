// Fields: the walk over a config struct and a Node tree side by side, reading or writing; places
// and messages.
#include "configs/schema.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>

#include "configs/check.h"
#include "configs/names.h"

namespace graft::configs {
namespace {

constexpr size_t kMaxFileBytes = size_t{1} << 20;

std::string got(const Node& node) {
  constexpr size_t kMaxShown = 60;
  switch (node.kind) {
    case Node::Kind::kNull:
      return "null";
    case Node::Kind::kList:
      return "a list";
    case Node::Kind::kMap:
      return "a mapping";
    case Node::Kind::kScalar:
      break;
  }
  std::string text = node.text.substr(0, kMaxShown);
  if (node.text.size() > kMaxShown) text += "...";
  return node.quoted ? "the text \"" + text + "\"" : "'" + text + "'";
}

/// The member of a mapping, or the element of a list, that one step of a path names; or null.
const Node* child(const Node& node, std::string_view step) {
  if (node.kind != Node::Kind::kList) return node.find(step);
  size_t index = node.items.size();
  std::from_chars(step.data(), step.data() + step.size(), index);
  return index < node.items.size() ? &node.items[index] : nullptr;
}

}  // namespace

// --- the walk
// -----------------------------------------------------------------------------------------------------

void Fields::field(std::string_view name, bool is_section, const Bound& bound, std::string_view doc,
                   const Action& visit_value) {
  const Bound outer_bound = std::exchange(bound_, bound);
  if (reading()) {
    static const Node kAbsent = [] {
      Node node;
      node.kind = Node::Kind::kMap;
      return node;
    }();
    Frame& frame = frames_.back();
    frame.known.emplace_back(name);
    const Node* node = frame.node->find(name);
    if (node != nullptr || is_section) {  // rules and required keys of an absent section count too
      const Node* outer = std::exchange(node_, node != nullptr ? node : &kAbsent);
      path_.emplace_back(name);
      alternative_.clear();
      visit_value();
      path_.pop_back();
      node_ = outer;
    }
  } else {
    FieldDoc member;
    member.name = name;
    member.doc = doc;
    member.bound = bound;
    FieldDoc* outer = std::exchange(doc_, &member);
    visit_value();
    doc_ = outer;
    member.value.key = name;
    outer->value.items.push_back(member.value);
    outer->members.push_back(std::move(member));
  }
  bound_ = outer_bound;
}

void Fields::section(const Action& visit_members) {
  if (!reading()) {
    doc_->type = Type::kSection;
    doc_->value.kind = Node::Kind::kMap;
    visit_members();
    return;
  }
  if (node_->kind != Node::Kind::kMap) {
    expected("a mapping of keys to values");
    return;
  }
  const bool is_absent = node_->place.line == 0 && node_->key_place.line == 0 && !frames_.empty();
  Place place = node_->key_place.line != 0 ? node_->key_place : node_->place;
  if (is_absent) place = frames_.back().place;
  frames_.push_back({node_, place, {}, false});
  visit_members();
  const Frame frame = std::move(frames_.back());
  frames_.pop_back();
  if (frame.is_open) return;
  for (const Node& item : frame.node->items) {
    if (std::find(frame.known.begin(), frame.known.end(), item.key) != frame.known.end()) continue;
    report(item.key_place, item.key, "unknown key" + suggest(item.key, frame.known));
  }
}

void Fields::read_items(Node::Kind kind,
                        const std::function<void(const std::string& key)>& visit_item) {
  if (node_->kind != kind) {
    expected(kind == Node::Kind::kList ? "a list" : "a mapping of names to values");
    return;
  }
  alternative_.clear();
  const Node* outer = node_;
  for (size_t i = 0; i < outer->items.size(); ++i) {
    node_ = &outer->items[i];
    const std::string key = kind == Node::Kind::kList ? std::to_string(i) : node_->key;
    path_.push_back(key);
    visit_item(key);
    path_.pop_back();
  }
  node_ = outer;
}

void Fields::describe_items(Type type, const Action& visit_blank) {
  FieldDoc element;
  element.bound = bound_;
  FieldDoc* outer = std::exchange(doc_, &element);
  visit_blank();
  doc_ = outer;
  doc_->type = type;
  doc_->value.kind = type == Type::kMap ? Node::Kind::kMap : Node::Kind::kList;
  doc_->members.push_back(std::move(element));
}

void Fields::write_item(const std::string& key, const Action& visit_item) {
  FieldDoc item;
  FieldDoc* outer = std::exchange(doc_, &item);
  visit_item();
  doc_ = outer;
  item.value.key = key;
  doc_->value.items.push_back(std::move(item.value));
}

void Fields::write_scalar(Type type, std::string text) {
  doc_->type = type;
  doc_->value = Node{};
  doc_->value.kind = Node::Kind::kScalar;
  doc_->value.text = std::move(text);
}

// --- messages
// -----------------------------------------------------------------------------------------------------

bool Fields::is_word(std::string_view word) const {
  if (word == "null") return node_->kind == Node::Kind::kNull;
  return node_->kind == Node::Kind::kScalar && !node_->quoted && node_->text == word;
}

std::string Fields::path(std::string_view key) const {
  std::string result = join(path_, ".");
  if (!result.empty() && !key.empty()) result += ".";
  return result += key;
}

void Fields::report(Place place, const std::string& key, std::string_view message) {
  problems_->add(place, path(key), message);
}

void Fields::expected(const std::string& what, const std::string& hint) {
  report(node_->place, "", "expected " + what + alternative_ + ", got " + got(*node_) + hint);
}

bool Fields::given(std::string_view key) const {
  return reading() && frames_.back().node->find(key) != nullptr;
}

Place Fields::place_of(const Frame& frame, std::string_view key) const {
  const Node* node = frame.node;
  Place place = frame.place;
  while (node != nullptr && !key.empty()) {
    const size_t dot = std::min(key.find('.'), key.size());
    const bool is_element = node->kind == Node::Kind::kList;
    node = child(*node, key.substr(0, dot));
    if (node != nullptr) place = dot == key.size() || is_element ? node->place : node->key_place;
    key.remove_prefix(std::min(dot + 1, key.size()));
  }
  return place;
}

void Fields::require(bool holds, std::string_view key, std::string_view message) {
  if (!reading() || holds || problems_->any_under(path(key))) return;
  problems_->add(place_of(frames_.back(), key), path(key), message);
}

void Fields::fail(std::string_view key, std::string_view message) {
  GRAFT_ASSERT(reading(), "fail(", key, ") outside reading: ", message);
  frames_.back().is_open = true;
  if (problems_->any_under(path(key))) return;
  problems_->add(place_of(frames_.back(), key), path(key), message);
}

void Fields::more_keys() {
  if (!reading()) doc_->has_more_keys = true;
}

// --- whole structs
// ------------------------------------------------------------------------------------------------

Node parse_with_overrides(std::string_view text, const std::string& source,
                          const std::vector<std::string>& overrides, Problems& problems) {
  std::optional<Node> root = parse_yaml(text, problems);
  if (!root) problems.throw_if_any(source);
  for (const std::string& assignment : overrides) apply_override(assignment, *root, problems);
  if (root->place.line == 0) root->place = {1, 1};
  return std::move(*root);
}

void read_section(const Node& root, Problems& problems,
                  const std::function<void(Fields&)>& fields) {
  Fields f(&root, &problems, nullptr);
  f.section([&] { fields(f); });
}

FieldDoc describe_section(const std::function<void(Fields&)>& fields) {
  FieldDoc result;
  Fields f(nullptr, nullptr, &result);
  f.section([&] { fields(f); });
  return result;
}

std::string read_file(const std::string& path) {
  std::error_code unknown;  // opening says more; but opening a pipe would wait for its writer
  GRAFT_CHECK(!std::filesystem::is_fifo(path, unknown), "the config file '", path,
              "' is a pipe: name a file");
  std::ifstream file(path, std::ios::binary);
  GRAFT_CHECK(file.is_open(), "cannot open the config file '", path, "': is the path right?");
  std::string text(kMaxFileBytes + 1, '\0');  // one more than the parser takes
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  GRAFT_CHECK(!file.bad(), "cannot read the config file '", path, "': it is not a readable file");
  text.resize(static_cast<size_t>(file.gcount()));
  return text;
}

}  // namespace graft::configs
