// Text -> Node, from yaml-cpp's events: its own tree builder follows aliases (a 430-byte file can
// unfold to 345 million nodes) and keeps duplicate keys silently, so no YAML::Node is ever built.
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <cstdio>
#include <sstream>
#include <unordered_map>

#include "configs/yaml.h"

namespace graft::configs {
namespace {

constexpr size_t kMaxBytes = size_t{1} << 20;
constexpr size_t kMaxDepth = 32;

Place place_of(const YAML::Mark& mark) { return {mark.line + 1, mark.column + 1}; }

std::string join_path(const std::string& parent, const std::string& key) {
  return parent.empty() ? key : parent + "." + key;
}

// Builds the tree and records what we refuse. What leaves no sensible tree ends the parse by an
// exception.
class Builder : public YAML::EventHandler {
 public:
  explicit Builder(Problems& problems) : problems_(problems) {}

  Node take_root() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++num_documents_ > 1) {
      throw YAML::ParserException(mark, "a second document; one file holds one document");
    }
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    if (expecting_key()) throw YAML::ParserException(mark, "a key must not be empty");
    Node node;
    node.place = place_of(mark);
    refuse_anchor(node.place, anchor);
    attach(std::move(node));
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    if (expecting_key()) throw YAML::ParserException(mark, "aliases (*name) are not supported");
    problems_.add(place_of(mark), path(), "aliases (*name) are not supported: repeat the value");
    Node node;
    node.place = place_of(mark);
    attach(std::move(node));
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    const Place place = place_of(mark);
    if (value.find('\0') != std::string::npos) {
      throw YAML::ParserException(mark, "a text must not hold the character NUL");
    }
    if (expecting_key()) {
      start_member(place, value, tag);
      refuse_anchor(place, anchor);
      return;
    }
    refuse_anchor(place, anchor);
    refuse_tag(place, tag);
    Node node;
    node.kind = Node::Kind::kScalar;
    node.place = place;
    node.text = value;
    node.quoted = tag == "!";  // yaml-cpp's mark of text that is not plain
    attach(std::move(node));
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, Node::Kind::kList);
  }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, Node::Kind::kMap);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapEnd() override { close(); }

 private:
  struct Container {
    Node node;
    std::string path;
    bool has_key = false;      // a mapping: the next event is the value of `key`
    bool drop_member = false;  // its value is read and forgotten: the key was refused
    std::string key;
    Place key_place;
    std::unordered_map<std::string, int> first_line;
  };

  bool expecting_key() const {
    return !open_.empty() && open_.back().node.kind == Node::Kind::kMap && !open_.back().has_key;
  }

  std::string path() const {
    if (open_.empty()) return "";
    const Container& top = open_.back();
    return join_path(top.path, top.has_key ? top.key : std::to_string(top.node.items.size()));
  }

  void refuse_anchor(Place place, YAML::anchor_t anchor) {
    if (anchor != 0) {
      problems_.add(place, path(), "anchors (&name) are not supported: repeat the value");
    }
  }

  void refuse_tag(Place place, const std::string& tag) {
    if (tag.empty() || tag == "?" || tag == "!") return;
    problems_.add(place, path(), "tags (!" + tag + ") are not supported: remove it");
  }

  void start_member(Place place, const std::string& key, const std::string& tag) {
    Container& map = open_.back();
    map.has_key = true;
    map.key = key;
    map.key_place = place;
    refuse_tag(place, tag);
    const auto [first, is_new] = map.first_line.emplace(key, place.line);
    const bool is_merge = key == "<<" && tag != "!";
    map.drop_member = is_merge || !is_new;
    if (is_merge) {
      problems_.add(place, path(), "merge keys are not supported: write the keys out");
    } else if (!is_new) {
      problems_.add(place, path(), "duplicate key; first on line " + std::to_string(first->second));
    }
  }

  void open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
            Node::Kind kind) {
    if (expecting_key())
      throw YAML::ParserException(mark, "a key must be plain text; or is a bracket not closed?");
    if (open_.size() == kMaxDepth) {
      throw YAML::ParserException(mark, "nested deeper than " + std::to_string(kMaxDepth));
    }
    refuse_anchor(place_of(mark), anchor);
    refuse_tag(place_of(mark), tag);
    Container container;
    container.path = path();
    container.node.kind = kind;
    container.node.place = place_of(mark);
    open_.push_back(std::move(container));
  }

  void close() {
    Node node = std::move(open_.back().node);
    open_.pop_back();
    attach(std::move(node));
  }

  void attach(Node node) {
    if (open_.empty()) {
      root_ = std::move(node);
      return;
    }
    Container& parent = open_.back();
    if (parent.has_key) {
      node.key = std::move(parent.key);
      node.key_place = parent.key_place;
    }
    if (!parent.drop_member) parent.node.items.push_back(std::move(node));
    parent.has_key = parent.drop_member = false;
  }

  Problems& problems_;
  std::vector<Container> open_;
  Node root_;
  int num_documents_ = 0;
};

// Length of the UTF-8 sequence at the start of `text` if it encodes a character YAML allows, else
// 0.
size_t character_bytes(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) {
    return (lead >= 0x20 && lead != 0x7f) || lead == '\t' || lead == '\n' || lead == '\r' ? 1 : 0;
  }
  const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || text.size() < length) return 0;
  unsigned code = lead & (0x7f >> length);
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
    code = code << 6 | (byte(i) & 0x3f);
  }
  const bool overlong = (length == 3 && code < 0x800) || (length == 4 && code < 0x10000);
  const bool surrogate = code >= 0xd800 && code <= 0xdfff;
  const bool control = code < 0xa0 && code != 0x85;
  return overlong || surrogate || control || code > 0x10ffff ? 0 : length;
}

// yaml-cpp takes NUL and invalid UTF-8 as they come, and ends the file at the byte 4.
bool is_text(std::string_view text, Problems& problems) {
  if (text.size() > kMaxBytes) {
    problems.add({1, 1}, "", "larger than 1 MiB: this is not a configuration");
    return false;
  }
  Place place{1, 1};
  for (size_t i = 0; i < text.size();) {
    const size_t length = character_bytes(text.substr(i));
    if (length == 0) {
      char hex[8];
      std::snprintf(hex, sizeof hex, "0x%02x", static_cast<unsigned char>(text[i]));
      problems.add(place, "", std::string("the byte ") + hex + " is not text (UTF-8 expected)");
      return false;
    }
    place = text[i] == '\n' ? Place{place.line + 1, 1}
                            : Place{place.line, place.column + static_cast<int>(length)};
    i += length;
  }
  return true;
}

}  // namespace

const Node* Node::find(std::string_view name) const {
  for (const Node& item : items) {
    if (kind == Kind::kMap && item.key == name) return &item;
  }
  return nullptr;
}

std::optional<Node> parse_yaml(std::string_view text, Problems& problems) {
  if (!is_text(text, problems)) return std::nullopt;
  Builder builder(problems);
  try {
    std::istringstream stream{std::string(text)};
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::Exception& failure) {
    const Place place = failure.mark.is_null() ? Place{1, 1} : place_of(failure.mark);
    problems.add(place, "", failure.msg);
    return std::nullopt;
  }
  return builder.take_root();
}

}  // namespace graft::configs
