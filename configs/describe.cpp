// What is known of a struct's fields, for people (help texts) and for editors (JSON Schema).
#include <algorithm>
#include <nlohmann/json.hpp>

#include "configs/schema.h"

namespace graft::configs {
namespace {

using Json = nlohmann::ordered_json;

const char* type_name(Type type) {
  switch (type) {
    case Type::kBoolean:
      return "boolean";
    case Type::kInteger:
      return "integer";
    case Type::kNumber:
      return "number";
    case Type::kString:
      return "string";
    case Type::kSection:
      return "object";
    case Type::kList:
      return "array";
    case Type::kMap:
      return "object";
  }
  return "";
}

// Values written by Fields: strings are quoted, numbers and booleans are JSON as they stand.
Json value_json(const Node& node) {
  if (node.kind == Node::Kind::kScalar) {
    if (node.quoted || node.text == "auto") return node.text;
    return Json::parse(node.text);
  }
  Json result = node.kind == Node::Kind::kList ? Json::array() : Json::object();
  for (const Node& item : node.items) {
    if (node.kind == Node::Kind::kList) {
      result.push_back(value_json(item));
    } else {
      result[item.key] = value_json(item);
    }
  }
  return result;
}

Json limit_json(Type type, double limit) {
  return type == Type::kInteger ? Json(static_cast<int64_t>(limit)) : Json(limit);
}

// The value alone, without what surrounds it: null, auto, doc, default.
Json type_json(const FieldDoc& field) {
  Json result{{"type", type_name(field.type)}};
  const bool is_number = field.type == Type::kInteger || field.type == Type::kNumber;
  const Bound& bound = field.bound;
  if (is_number && bound.low) {
    result[bound.low_is_open ? "exclusiveMinimum" : "minimum"] = limit_json(field.type, *bound.low);
  }
  if (is_number && bound.high) {
    result[bound.high_is_open ? "exclusiveMaximum" : "maximum"] =
        limit_json(field.type, *bound.high);
  }
  if (field.type == Type::kString && !bound.choices.empty()) result["enum"] = bound.choices;
  if (field.type == Type::kList) result["items"] = json_schema(field.members.front());
  if (field.type == Type::kMap) {
    result["additionalProperties"] = json_schema(field.members.front());
  }
  if (field.type == Type::kSection) {
    result["additionalProperties"] = field.has_more_keys;
    result["properties"] = Json::object();
    for (const FieldDoc& member : field.members) {
      result["properties"][member.name] = json_schema(member);
    }
  }
  return result;
}

struct Row {
  std::string name, type, value, doc;
};

void add_rows(const FieldDoc& section, const std::string& prefix, std::vector<Row>& rows) {
  for (const FieldDoc& field : section.members) {
    const std::string name = prefix + field.name;
    if (field.type == Type::kSection && !field.may_be_null) {
      add_rows(field, name + ".", rows);
      continue;
    }
    rows.push_back({name, field.type_text(), to_flow(field.value), field.doc});
    const bool of_sections = (field.type == Type::kList || field.type == Type::kMap) &&
                             field.members.front().type == Type::kSection;
    if (of_sections) add_rows(field.members.front(), name + "[].", rows);
    if (field.type == Type::kSection) add_rows(field, name + ".", rows);
  }
}

}  // namespace

std::string FieldDoc::type_text() const {
  std::string result = type == Type::kSection ? "section" : type_name(type);
  if (type == Type::kList) {
    result = "list of " + members.front().type_text();
  } else if (type == Type::kMap) {
    result = "map of name to " + members.front().type_text();
  } else if (!bound.choices.empty()) {
    result = bound.text();
  } else if (!bound.text().empty()) {
    result += " " + bound.text();
  }
  if (may_be_single) result = "string or " + result;
  if (may_be_auto) result += " or auto";
  if (may_be_null) result += " or null";
  return result;
}

std::string describe_text(const FieldDoc& section) {
  std::vector<Row> rows;
  add_rows(section, "", rows);
  size_t name_width = 0;
  for (const Row& row : rows) name_width = std::max(name_width, row.name.size());
  std::string result;
  for (const Row& row : rows) {
    result += row.name + std::string(name_width - row.name.size() + 2, ' ') + row.doc + " (" +
              row.type + "; default " + row.value + ")\n";
  }
  return result;
}

Json json_schema(const FieldDoc& section) {
  Json alternatives = Json::array();
  alternatives.push_back(type_json(section));
  if (section.may_be_single) alternatives.push_back(type_json(section.members.front()));
  if (section.may_be_auto) alternatives.push_back({{"const", "auto"}});
  if (section.may_be_null) alternatives.push_back({{"type", "null"}});
  Json result = alternatives.size() == 1 ? alternatives[0] : Json{{"anyOf", alternatives}};
  if (!section.doc.empty()) result["description"] = section.doc;
  const bool has_default = !section.name.empty() && section.type != Type::kSection;
  if (has_default) result["default"] = value_json(section.value);
  return result;
}

}  // namespace graft::configs
