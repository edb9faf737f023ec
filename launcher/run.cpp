#include "launcher/run.h"

#include <map>

#include "configs/check.h"
#include "configs/yaml.h"
#include "peft/peft.h"

namespace graft::launcher {
namespace {

/// "train.learning_rate" -> "0.0002", for every scalar and empty value of a tree.
void flatten(const configs::Node& node, const std::string& path,
             std::map<std::string, std::string>& out) {
  using Kind = configs::Node::Kind;
  if ((node.kind != Kind::kMap && node.kind != Kind::kList) || node.items.empty()) {
    out[path] = configs::to_flow(node);
    return;
  }
  for (size_t i = 0; i < node.items.size(); ++i) {
    const std::string name = node.kind == Kind::kMap ? node.items[i].key : std::to_string(i);
    flatten(node.items[i], path.empty() ? name : path + "." + name, out);
  }
}

std::map<std::string, std::string> flatten_text(const std::string& yaml) {
  configs::Problems problems;
  const auto root = configs::parse_yaml(yaml, problems);
  problems.throw_if_any("config.yaml of the run");
  std::map<std::string, std::string> out;
  flatten(*root, "", out);
  return out;
}

/// What a resumed run may change. Lanes per step are compared where the world size is known; a
/// larger max_steps restates the schedule.
bool may_differ(const std::string& key) {
  for (const char* section : {"log.", "eval.", "checkpoint.", "parallel."}) {
    if (key.starts_with(section)) return true;
  }
  return key == "train.gradient_accumulation_steps" || key == "train.max_steps" ||
         key == "train.num_train_epochs";
}

}  // namespace

void Run::fields(Fields& f) {
  RunConfig::fields(f);
  f("peft", peft, "what is trained; methods stack in order");
  f.require(data.train.values.empty() || !peft.empty(), "peft",
            "is missing: name a method, such as [{method: lora}]");
}

Run load_run(const std::string& path, const std::vector<std::string>& overrides) {
  auto run = configs::load_config<Run>(path, overrides);
  for (peft::MethodEntry& entry : run.peft) {
    if (entry.method == nullptr)
      entry.method = peft::method_of_directory(*entry.init_from, entry.name);
  }
  return run;
}

std::vector<std::string> resume_conflicts(const std::string& saved, const std::string& current) {
  const auto before = flatten_text(saved), now = flatten_text(current);
  std::vector<std::string> conflicts;
  for (const auto& [key, value] : before) {
    const auto found = now.find(key);
    if (may_differ(key) || (found != now.end() && found->second == value)) continue;
    conflicts.push_back(key + ": " + value + " -> " +
                        (found == now.end() ? "(absent)" : found->second));
  }
  for (const auto& [key, value] : now) {
    if (!may_differ(key) && !before.contains(key))
      conflicts.push_back(key + ": (absent) -> " + value);
  }
  return conflicts;
}

}  // namespace graft::launcher
