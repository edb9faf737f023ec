#include "peft/peft_form.h"

#include <algorithm>

#include "configs/check.h"
#include "peft/peft_config.h"

namespace graft::peft {
namespace {

using configs::FieldDoc;
using configs::Node;
using OrderedJson = nlohmann::ordered_json;

nlohmann::json to_json(const FieldDoc& field, const Node& value) {
  if (value.kind == Node::Kind::kNull || (field.may_be_null && value.text == "null") ||
      (field.may_be_auto && value.text == "auto"))
    return nullptr;
  switch (field.type) {
    case configs::Type::kList: {
      nlohmann::json list = nlohmann::json::array();
      for (const Node& item : value.items) list.push_back(to_json(field.members.front(), item));
      return list;
    }
    case configs::Type::kSection: {
      nlohmann::json section = nlohmann::json::object();
      for (const FieldDoc& member : field.members)
        section[member.name] = to_json(member, member.value);
      return section;
    }
    case configs::Type::kString:  // PEFT's init_weights is a word or a boolean
      if (!field.bound.choices.empty() && (value.text == "true" || value.text == "false"))
        return value.text == "true";
      return value.text;
    default:
      return nlohmann::json::parse(value.text);
  }
}

/// PEFT's patterns match module paths in their own way, so each slot gets its line.
nlohmann::json to_pattern(const FieldDoc& field, const std::vector<const LinearSite*>& sites) {
  nlohmann::json pattern = nlohmann::json::object();
  std::map<std::string, nlohmann::json> values;
  for (const Node& item : field.value.items)
    values[item.key] = to_json(field.members.front(), item);
  for (const LinearSite* site : sites) {
    const auto value = pattern_value(values, *site, nlohmann::json());
    if (!value.is_null()) pattern[site->hf_path] = value;
  }
  return pattern;
}

Node to_node(const std::string& key, const OrderedJson& value) {
  Node node;
  node.key = key;
  if (value.is_structured()) {
    node.kind = value.is_array() ? Node::Kind::kList : Node::Kind::kMap;
    for (const auto& [name, item] : value.items())
      node.items.push_back(to_node(value.is_array() ? "" : name, item));
  } else {
    node.kind = Node::Kind::kScalar;
    node.quoted = value.is_string();
    node.text = value.is_string() ? value.get<std::string>() : value.dump();
  }
  return node;
}

bool is_ours(const PeftForm& form, const std::string& name) {
  return std::find(form.ours.begin(), form.ours.end(), name) != form.ours.end();
}

}  // namespace

void check_patterns(const FieldDoc& fields, const std::vector<const LinearSite*>& sites) {
  for (const FieldDoc& field : fields.members) {
    if (field.type != configs::Type::kMap) continue;
    std::vector<std::string> keys;
    for (const Node& item : field.value.items) keys.push_back(item.key);
    check_pattern(keys, sites, field.name.c_str());
  }
}

nlohmann::json write_peft_entries(const PeftForm& form, const FieldDoc& fields) {
  nlohmann::json config = form.fixed;
  for (const FieldDoc& field : fields.members) {
    if (field.type == configs::Type::kMap) continue;
    nlohmann::json& entries = is_ours(form, field.name) ? config[kOwnEntries] : config;
    entries[field.name] = to_json(field, field.value);
  }
  return config;
}

nlohmann::json write_peft_form(const PeftForm& form, const FieldDoc& fields,
                               const std::vector<const LinearSite*>& sites,
                               const WholeTensors& whole, const SlotMap& slots) {
  nlohmann::json config = write_peft_entries(form, fields);
  for (const FieldDoc& field : fields.members) {
    if (field.type == configs::Type::kMap) config[field.name] = to_pattern(field, sites);
  }
  config["target_modules"] = hf_targets(sites, slots);
  config.update(whole.to_peft_config(slots));
  return config;
}

void read_peft_form(const PeftForm& form, const SavedAdapter& adapter,
                    const std::vector<Leaf>& leaves, Targets& targets, WholeTensors& whole,
                    const std::function<void(configs::Fields&)>& fields) {
  PeftConfigReader config(adapter);
  std::vector<std::string_view> names;
  for (const auto& leaf : leaves) names.push_back(leaf.second);
  config.get_targets(names, targets);
  whole.from_peft_config(config);
  read_peft_entries(form, config, &targets, fields);
}

void read_peft_entries(const PeftForm& form, PeftConfigReader& config, const Targets* targets,
                       const std::function<void(configs::Fields&)>& fields) {
  Node root;
  root.kind = Node::Kind::kMap;
  for (const FieldDoc& field : configs::describe_section(fields).members) {
    OrderedJson value =
        is_ours(form, field.name) ? config.own_entry(field.name) : config.entry(field.name);
    if (field.type == configs::Type::kMap) {
      std::map<std::string, OrderedJson> pattern;
      config.get_pattern(field.name, *targets, pattern);
      value = pattern;
    }
    if (!value.is_null()) root.items.push_back(to_node(field.name, value));
  }
  for (const auto& [name, value] : form.fixed.items()) {
    const OrderedJson& found = config.entry(name);
    GRAFT_CHECK(found.is_null() || found == OrderedJson(value), ExitCode::kData,
                "adapter_config.json: ", name, " = ", found.dump(), " is not supported, only ",
                value.dump(), " is");
  }
  config.ignore(form.inert);
  config.refuse_the_rest();
  configs::Problems problems;
  configs::read_section(root, problems, fields);
  GRAFT_CHECK(problems.empty(), ExitCode::kData, "adapter_config.json: ", problems.first_path(),
              ": ", problems.first());
}

}  // namespace graft::peft
