#include "models/names.h"

#include <cctype>

#include "configs/check.h"

namespace graft::models {
namespace {

constexpr std::string_view kLayer = "{i}";
constexpr std::string_view kWeight = ".weight";

/// The layer number that makes `pattern` equal to `name`; "" if the pattern has none; nothing if
/// they differ.
std::optional<std::string> match(std::string_view pattern, std::string_view name) {
  const size_t at = pattern.find(kLayer);
  if (at == std::string_view::npos) {
    return pattern == name ? std::optional<std::string>("") : std::nullopt;
  }
  const std::string_view head = pattern.substr(0, at), tail = pattern.substr(at + kLayer.size());
  if (!name.starts_with(head) || !name.ends_with(tail) ||
      name.size() <= head.size() + tail.size()) {
    return std::nullopt;
  }
  const std::string_view number = name.substr(head.size(), name.size() - head.size() - tail.size());
  for (const char c : number) {
    if (std::isdigit(static_cast<unsigned char>(c)) == 0) return std::nullopt;
  }
  return std::string(number);
}

std::string fill(std::string_view pattern, const std::string& layer) {
  std::string out(pattern);
  const size_t at = out.find(kLayer);
  return at == std::string::npos ? out : out.replace(at, kLayer.size(), layer);
}

std::string_view without_weight(std::string_view name) {
  return name.ends_with(kWeight) ? name.substr(0, name.size() - kWeight.size()) : name;
}

}  // namespace

std::optional<NameMap::Found> NameMap::to_hf(std::string_view ours) const {
  for (const NameRow& row : rows_) {
    if (const auto layer = match(row.ours, ours)) return Found{fill(row.hf, *layer)};
  }
  return std::nullopt;
}

std::optional<NameMap::Found> NameMap::to_gguf(std::string_view ours) const {
  for (const NameRow& row : rows_) {
    if (const auto layer = match(row.ours, ours))
      return Found{fill(row.gguf, *layer), row.from_gguf};
  }
  return std::nullopt;
}

std::optional<std::string> NameMap::from_hf(std::string_view hf) const {
  for (const NameRow& row : rows_) {
    if (const auto layer = match(row.hf, hf)) return fill(row.ours, *layer);
  }
  return std::nullopt;
}

bool NameMap::dropped(std::string_view hf) const {
  for (const std::string_view suffix : drops_) {
    if (hf.ends_with(suffix)) return true;
  }
  return false;
}

std::string NameMap::hf_module(std::string_view slot) const {
  const auto found = to_hf(std::string(slot) + std::string(kWeight));
  GRAFT_ASSERT(found.has_value(), "no Hugging Face name for slot ", slot);
  return std::string(without_weight(found->name));
}

std::optional<std::string> NameMap::slot_of_hf_module(std::string_view module) const {
  const auto ours = from_hf(std::string(module) + std::string(kWeight));
  return ours ? std::optional<std::string>(without_weight(*ours)) : std::nullopt;
}

std::optional<std::string> NameMap::role_of_hf_suffix(std::string_view suffix) const {
  for (const NameRow& row : rows_) {
    const std::string_view module = without_weight(row.hf);
    if (module == suffix || module.ends_with("." + std::string(suffix))) {
      return role_of(without_weight(row.ours));
    }
  }
  return std::nullopt;
}

std::string role_of(std::string_view slot) {
  constexpr std::string_view kBlock = "block.";
  if (!slot.starts_with(kBlock)) return std::string(slot);
  const size_t dot = slot.find('.', kBlock.size());
  return dot == std::string_view::npos ? std::string("block") : std::string(slot.substr(dot + 1));
}

}  // namespace graft::models
