#include "launcher/facts.h"

#include <cstdio>
#include <filesystem>

#include "configs/check.h"
#include "configs/names.h"

namespace graft::launcher {
namespace {

std::string dump(const Facts& value) {
  return value.dump(-1, ' ', false, Facts::error_handler_t::replace);
}

std::string value_text(const Facts& value) {
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return dump(value);
  std::vector<std::string> items;
  for (const Facts& item : value) items.push_back(value_text(item));
  return items.empty() ? "none" : configs::join(items, ", ");
}

void add_lines(const Facts& facts, const std::string& indent, std::string& text) {
  for (const auto& [key, value] : facts.items()) {
    if (value.is_object() && !value.empty()) {
      text += indent + key + ":\n";
      add_lines(value, indent + "  ", text);
    } else {
      text += indent + key + ": " + value_text(value) + "\n";
    }
  }
}

}  // namespace

std::string facts_json(const Facts& facts) { return dump(facts) + "\n"; }

std::string facts_text(const Facts& facts) {
  std::string text;
  add_lines(facts, "", text);
  return text;
}

int64_t num_parameters(models::Model& model) {
  struct Count : models::Visitor {
    int64_t n = 0;
    void weight(const std::string&, models::Weight& w) override { n += w.numel(); }
  } count;
  for (int b = 0; b < model.num_blocks(); ++b) model.visit_weights(b, count);
  return count.n;
}

std::string count_text(int64_t n) {
  char text[32];
  if (n < 1'000'000) return std::to_string(n);
  const bool billions = n >= 1'000'000'000;
  std::snprintf(text, sizeof text, "%.2f %s", static_cast<double>(n) / (billions ? 1e9 : 1e6),
                billions ? "B" : "M");
  return text;
}

std::vector<std::string> adapter_parts(const std::string& directory) {
  namespace fs = std::filesystem;
  const auto is_adapter = [](const std::string& path) {
    return fs::exists(path + "/adapter_config.json");
  };
  if (is_adapter(directory)) return {directory};
  GRAFT_CHECK(!fs::is_regular_file(directory), ExitCode::kData, directory,
              ": a file; expected an adapter folder in PEFT's layout. One of LyCORIS's becomes a ",
              "folder by graft export --to peft");
  std::vector<std::string> parts;
  for (std::string part = directory + "/0"; is_adapter(part);
       part = directory + "/" + std::to_string(parts.size())) {
    parts.push_back(part);
  }
  GRAFT_CHECK(!parts.empty(), ExitCode::kData, directory,
              ": no adapter_config.json; expected an adapter folder in PEFT's layout");
  return parts;
}

}  // namespace graft::launcher
