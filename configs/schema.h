// A config struct lists its fields once and gets a strict reader, a dump, help and an editor schema
// from it:
//
//   struct LoraConfig {
//     int r = 8;                                                    // the initialiser is the
//     default void fields(configs::Fields& f) { f("r", r, f.range(1, 4096), "inner size"); }
//   };
//
// Members: bool, int, int64_t, double, std::string, StringOrList, structs with `fields`, and
// std::optional, Auto, std::vector, std::map<std::string, T> of these. Reading reports every
// mistake of a file in one error.
#pragma once

#include <concepts>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "configs/yaml.h"

namespace graft::configs {

class Fields;

template <class T>
concept Section = requires(T section, Fields& f) {
  section.fields(f);
};

/// `auto` in the file (nothing set) or a value.
template <class T>
struct Auto {
  std::optional<T> value;
};

/// A list of strings that may be written as one string; it is dumped as it was written.
struct StringOrList {
  std::vector<std::string> values;
  bool is_single = false;

  StringOrList() = default;
  StringOrList(const char* value) : values{value}, is_single(true) {}
  StringOrList(std::initializer_list<std::string> list) : values(list) {}
};

/// What a value may be. Limits apply to numbers, choices to strings; of a list or map, to each
/// element.
struct Bound {
  std::optional<double> low, high;
  bool low_is_open = false, high_is_open = false;
  std::vector<std::string> choices;

  Bound at_least(double limit) const;
  Bound at_most(double limit) const;
  Bound above(double limit) const;
  Bound below(double limit) const;

  bool allows(double value) const;
  std::string text() const;  ///< "from 1 to 4096", "greater than 0", "one of a, b"; empty: no bound
};

enum class Type { kBoolean, kInteger, kNumber, kString, kSection, kList, kMap };

/// What is known of one field, with its value (the default, in a struct just made).
struct FieldDoc {
  std::string name;
  std::string doc;
  Bound bound;
  Type type = Type::kSection;
  bool may_be_null = false;
  bool may_be_auto = false;
  bool may_be_single = false;     ///< a list that may be written as one string
  bool has_more_keys = false;     ///< a section with keys that depend on others
  std::vector<FieldDoc> members;  ///< of a section; of a list or map: one, the element
  Node value;

  std::string type_text() const;  ///< "integer from 1 to 64 or auto", "list of string"
};

/// The visitor that `fields` of a config struct talks to. A key is read as soon as it is visited,
/// so the next line may depend on it.
class Fields {
 public:
  template <class T>
  void operator()(std::string_view name, T& value, const Bound& bound, std::string_view doc) {
    field(name, Section<T>, bound, doc, [&] { visit(value); });
  }
  template <class T>
  void operator()(std::string_view name, T& value, std::string_view doc) {
    (*this)(name, value, Bound(), doc);
  }

  static Bound range(double low, double high) { return Bound().at_least(low).at_most(high); }
  static Bound at_least(double low) { return Bound().at_least(low); }
  static Bound positive() { return Bound().above(0); }
  static Bound one_of(std::vector<std::string> choices);

  bool reading() const { return problems_ != nullptr; }

  /// True if this section of the file holds the key.
  bool given(std::string_view key) const;

  /// A rule across fields, while reading: unless `holds`, or the key (`a.b` for one below, `a.0`
  /// for an element of a list) is known to be wrong already, the message is reported at it.
  void require(bool holds, std::string_view key, std::string_view message);

  /// The value of `key` is unusable, and so what other keys this section may have is unknown: they
  /// are not reported. While reading only.
  void fail(std::string_view key, std::string_view message);

  /// Tells editors that this section has keys beside those visited on a struct with its defaults.
  void more_keys();

 private:
  friend void read_section(const Node&, Problems&, const std::function<void(Fields&)>&);
  friend FieldDoc describe_section(const std::function<void(Fields&)>&);

  struct Frame {  // a section being read
    const Node* node;
    Place place;
    std::vector<std::string> known;
    bool is_open;  // unknown keys are not reported
  };
  using Action = std::function<void()>;

  Fields(const Node* root, Problems* problems, FieldDoc* doc)
      : problems_(problems), node_(root), doc_(doc) {}

  void visit(bool& value);
  void visit(int& value);
  void visit(int64_t& value);
  void visit(double& value);
  void visit(std::string& value);
  void visit(StringOrList& value);
  template <Section T>
  void visit(T& value) {
    section([&] { value.fields(*this); });
  }
  template <class T>
  void visit(std::optional<T>& value) {
    visit_special("null", value, &FieldDoc::may_be_null);
  }
  template <class T>
  void visit(Auto<T>& value) {
    visit_special("auto", value.value, &FieldDoc::may_be_auto);
  }
  template <class T>
  void visit(std::vector<T>& values);
  template <class T>
  void visit(std::map<std::string, T>& values);
  template <class T>
  void visit_special(const char* word, std::optional<T>& value, bool FieldDoc::*may_be);

  void field(std::string_view name, bool is_section, const Bound& bound, std::string_view doc,
             const Action& visit_value);
  void section(const Action& visit_members);
  void read_items(Node::Kind kind, const std::function<void(const std::string& key)>& visit_item);
  void describe_items(Type type, const Action& visit_blank);
  void write_item(const std::string& key, const Action& visit_item);
  void write_scalar(Type type, std::string text);

  bool is_word(std::string_view word) const;
  void report(Place place, const std::string& key, std::string_view message);
  void expected(const std::string& what, const std::string& hint = "");
  Place place_of(const Frame& frame, std::string_view key) const;
  std::string path(std::string_view key = "") const;

  Problems* problems_;  // null: writing
  const Node* node_;    // reading: what the visited member is read from
  FieldDoc* doc_;       // writing: what is known of the visited member
  Bound bound_;
  std::string alternative_;  // " or null" for messages
  std::vector<std::string> path_;
  std::vector<Frame> frames_;
};

// --- whole structs
// ------------------------------------------------------------------------------------------------

Node parse_with_overrides(std::string_view text, const std::string& source,
                          const std::vector<std::string>& overrides, Problems& problems);
void read_section(const Node& root, Problems& problems, const std::function<void(Fields&)>& fields);
FieldDoc describe_section(const std::function<void(Fields&)>& fields);
std::string read_file(const std::string& path);

/// A further look at a struct as it was read. What it finds wrong it reports at a key, as rules do:
/// by Fields::require.
template <class T>
using Check = std::function<void(T& config, Fields& f)>;

/// Reads a struct from YAML text with overrides `section.key=value` (a number indexes a list).
/// @param source what the text is called in messages
/// @param check  may be empty; fields that are wrong have their defaults
/// @throws graft::Error (kUsage) with every mistake, one a line: `source:line:col: key.path:
/// message`
template <class T>
T read_text(std::string_view text, const std::string& source,
            const std::vector<std::string>& overrides = {}, const Check<T>& check = {}) {
  Problems problems;
  const Node root = parse_with_overrides(text, source, overrides, problems);
  T result;
  read_section(root, problems, [&](Fields& f) {
    result.fields(f);
    if (check) check(result, f);
  });
  problems.throw_if_any(source);
  return result;
}

template <class T>
T load_config(const std::string& path, const std::vector<std::string>& overrides = {},
              const Check<T>& check = {}) {
  return read_text<T>(read_file(path), path, overrides, check);
}

/// The fields of a struct as one section, with the values it holds.
template <class T>
FieldDoc describe(const T& config) {
  // Writing only looks at the members; `fields` is not const because the same lines also read.
  return describe_section([&](Fields& f) { const_cast<T&>(config).fields(f); });
}

/// The resolved struct as YAML, in the order of its fields; reads back to the same struct, bit for
/// bit.
template <class T>
std::string dump(const T& config) {
  return to_yaml(describe(config).value);
}

/// One line a key: dotted name, type with bound, default, doc. For help texts.
std::string describe_text(const FieldDoc& section);

/// JSON Schema (draft 2020-12) of a section, for editors.
nlohmann::ordered_json json_schema(const FieldDoc& section);

// --- templates
// ----------------------------------------------------------------------------------------------------

template <class T>
void Fields::visit_special(const char* word, std::optional<T>& value, bool FieldDoc::*may_be) {
  if (reading()) {
    value.reset();
    if (is_word(word)) return;
    alternative_ = std::string(" or ") + word;
    visit(value.emplace());
    return;
  }
  if (value) {
    visit(*value);
  } else {
    T blank{};
    visit(blank);  // for what there is to know of it
    write_scalar(doc_->type, word);
  }
  doc_->*may_be = true;
}

template <class T>
void Fields::visit(std::vector<T>& values) {
  if (reading()) {
    values.clear();
    read_items(Node::Kind::kList, [&](const std::string&) { visit(values.emplace_back()); });
    return;
  }
  describe_items(Type::kList, [&] {
    T blank{};
    visit(blank);
  });
  for (T& value : values) write_item("", [&] { visit(value); });
}

template <class T>
void Fields::visit(std::map<std::string, T>& values) {
  if (reading()) {
    values.clear();
    read_items(Node::Kind::kMap, [&](const std::string& key) { visit(values[key]); });
    return;
  }
  describe_items(Type::kMap, [&] {
    T blank{};
    visit(blank);
  });
  for (auto& entry : values) write_item(entry.first, [&] { visit(entry.second); });
}

}  // namespace graft::configs
