#include "launcher/facts.h"

#include <cstdio>

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
  return configs::printable(text);
}

int64_t num_parameters(models::Model& model) {
  int64_t n = 0;
  models::for_each_weight(
      model, [&](int, const std::string&, const models::Weight& w) { n += w.numel(); });
  return n;
}

std::string count_text(int64_t n) {
  char text[32];
  if (n < 1'000'000) return std::to_string(n);
  const bool billions = n >= 1'000'000'000;
  std::snprintf(text, sizeof text, "%.2f %s", static_cast<double>(n) / (billions ? 1e9 : 1e6),
                billions ? "B" : "M");
  return text;
}

}  // namespace graft::launcher
