// Node -> text. Quotes whatever this reader, or another YAML tool, could take for something else
// than a string.
#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>

#include "configs/yaml.h"

namespace graft::configs {
namespace {

bool is_plain_character(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
         std::string_view("_./-+*@=%").find(c) != std::string_view::npos;
}

// A string that every YAML reader takes for this very string.
bool is_plain(const std::string& text) {
  constexpr std::array kWords = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"};
  if (text.empty() || text.front() == '-' || text.front() == '*' || text.front() == '@' ||
      text.front() == '%' || text.front() == '=') {
    return false;
  }
  if (!std::all_of(text.begin(), text.end(), is_plain_character)) return false;
  const bool starts_a_number = std::string_view("0123456789.+").find(text[0]) != std::string::npos;
  if (starts_a_number && text.find_first_not_of("0123456789abcdefABCDEFxXoO_.+-") == text.npos) {
    return false;  // numbers of any base, dates
  }
  std::string lower = text;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return lower != ".nan" && lower != ".inf" && lower != "+.inf" &&
         std::find(kWords.begin(), kWords.end(), lower) == kWords.end();
}

std::string quote(const std::string& text) {
  std::string result = "\"";
  for (size_t i = 0; i < text.size(); ++i) {
    const unsigned char c = text[i];
    const unsigned char next = i + 1 < text.size() ? text[i + 1] : 0;
    const bool is_wide_control = c == 0xc2 && next < 0xa0;  // U+0080 to U+009F, two bytes
    char escape[8];
    if (c == '"' || c == '\\') {
      result += {'\\', text[i]};
    } else if (c == '\n') {
      result += "\\n";
    } else if (c < 0x20 || c == 0x7f || is_wide_control) {
      std::snprintf(escape, sizeof escape, "\\x%02X", is_wide_control ? next : c);
      result += escape;
      i += is_wide_control ? 1 : 0;
    } else {
      result += text[i];
    }
  }
  return result + "\"";
}

std::string string_text(const std::string& text) { return is_plain(text) ? text : quote(text); }

bool is_block(const Node& node) {
  if (node.kind == Node::Kind::kMap) return !node.items.empty();
  return node.kind == Node::Kind::kList &&
         std::any_of(node.items.begin(), node.items.end(), is_block);
}

void write_block(const Node& node, const std::string& indent, std::string& out);

// After "key:" or "-": what fits on the line goes there, a block below.
void write_value(const Node& node, const std::string& indent, std::string& out) {
  if (!is_block(node)) {
    out += " " + to_flow(node) + "\n";
  } else {
    out += "\n";
    write_block(node, indent + "  ", out);
  }
}

void write_block(const Node& node, const std::string& indent, std::string& out) {
  for (const Node& item : node.items) {
    if (node.kind == Node::Kind::kMap) {
      out += indent + string_text(item.key) + ":";
      write_value(item, indent, out);
    } else if (is_block(item) && item.kind == Node::Kind::kMap) {
      std::string members;
      write_block(item, indent + "  ", members);
      out += indent + "- " + members.substr(indent.size() + 2);  // the first key beside the dash
    } else {
      out += indent + "-";
      write_value(item, indent, out);
    }
  }
}

}  // namespace

std::string to_flow(const Node& node) {
  if (node.kind == Node::Kind::kNull) return "null";
  if (node.kind == Node::Kind::kScalar) return node.quoted ? string_text(node.text) : node.text;
  const bool is_list = node.kind == Node::Kind::kList;
  std::string result;
  for (const Node& item : node.items) {
    if (!result.empty()) result += ", ";
    result += (is_list ? "" : string_text(item.key) + ": ") + to_flow(item);
  }
  return is_list ? "[" + result + "]" : "{" + result + "}";
}

std::string to_yaml(const Node& root) {
  if (!is_block(root)) return to_flow(root) + "\n";
  std::string out;
  write_block(root, "", out);
  return out;
}

}  // namespace graft::configs
