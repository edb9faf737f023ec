#include "peft/targets.h"

#include <algorithm>
#include <map>
#include <set>

#include "configs/check.h"
#include "configs/names.h"
#include "peft/attach.h"

namespace graft::peft {
namespace {

constexpr std::string_view kAllLinear = "all-linear";

std::string last_part(const std::string& path) { return path.substr(path.rfind('.') + 1); }

Error unmatched(const std::string& entry, const char* key, const std::vector<LinearSite>& all) {
  std::set<std::string> known;
  for (const LinearSite& site : all) known.insert({site.role, last_part(site.hf_path)});
  const std::vector<std::string> list(known.begin(), known.end());
  const std::string close = configs::nearest(entry, list);
  return {
      ExitCode::kUsage,
      "peft: " + std::string(key) + " '" + entry + "' matches nothing in this model" +
          (close.empty() ? "" : "; did you mean '" + close + "'?") + (close.empty() ? "." : "") +
          " It has: " +
          (all.front().info.kind == models::LinearKind::kGain ? ""
                                                              : std::string(kAllLinear) + ", ") +
          configs::join(list, ", ")};
}

}  // namespace

bool is_meant(const std::string& entry, const LinearSite& site) {
  if (entry == kAllLinear) return site.layer >= 0 && site.info.kind == models::LinearKind::kLinear;
  for (const std::string& name : {site.role, site.name, site.hf_path}) {
    if (glob_match(entry, name) || name.ends_with("." + entry)) return true;
  }
  return false;
}

void check_pattern(const std::vector<std::string>& keys,
                   const std::vector<const LinearSite*>& sites, const char* field) {
  for (const std::string& key : keys) {
    const bool used = std::any_of(sites.begin(), sites.end(),
                                  [&](const LinearSite* site) { return is_meant(key, *site); });
    GRAFT_CHECK(used, "peft: ", field, ": '", key, "' means none of the adapted slots");
  }
}

void Targets::fields(configs::Fields& f) {
  f("target_modules", modules,
    "slots to adapt: all-linear, roles (attn.q), Hugging Face suffixes (q_proj), globs");
  f("exclude_modules", exclude, "slots to leave out, in the same words");
  f("layers_to_transform", layers, f.at_least(0), "only these layers; empty: all");
}

bool glob_match(std::string_view pattern, std::string_view text) {
  size_t p = 0, t = 0, star = std::string_view::npos, resume = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = t;
    } else if (p < pattern.size() && pattern[p] == text[t]) {
      ++p, ++t;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      t = ++resume;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

std::vector<const LinearSite*> Targets::resolve(const AttachContext& context,
                                                const char* field) const {
  check_slots(context, gains ? context.slots.gains.size() : context.slots.linears.size(),
              gains ? "norms" : "linear layers");
  return resolve(context.slots, field);
}

std::vector<const LinearSite*> Targets::resolve(const SlotMap& slots, const char* field) const {
  const std::vector<LinearSite>& all = gains ? slots.gains : slots.linears;
  std::set<const LinearSite*> meant, excluded;
  const auto collect = [&](const configs::StringOrList& entries, const char* key, auto& into) {
    for (const std::string& entry : entries.values) {
      bool found = false;
      for (const LinearSite& site : all) {
        if (is_meant(entry, site)) found = true, into.insert(&site);
      }
      if (!found) throw unmatched(entry, key, all);
    }
  };
  for (const int layer : layers) {
    const bool exists = std::any_of(slots.linears.begin(), slots.linears.end(),
                                    [&](const LinearSite& site) { return site.layer == layer; });
    GRAFT_CHECK(exists, "peft: layers_to_transform: this model has no layer ", layer,
                "; they count from 0");
  }
  collect(modules, field, meant);
  collect(exclude, "exclude_modules", excluded);
  std::vector<const LinearSite*> sites;
  for (const LinearSite& site : all) {
    const bool layer_fits = layers.empty() || site.layer < 0 ||
                            std::find(layers.begin(), layers.end(), site.layer) != layers.end();
    if (meant.contains(&site) && !excluded.contains(&site) && layer_fits) sites.push_back(&site);
  }
  GRAFT_CHECK(!sites.empty(), "peft: ", field,
              ", exclude_modules and layers_to_transform leave no slot to adapt");
  return sites;
}

std::vector<std::string> hf_targets(const std::vector<const LinearSite*>& sites,
                                    const SlotMap& slots) {
  std::map<std::string, size_t> in_model, meant;
  const auto suffix = [&](const LinearSite& s) { return last_part(s.hf_path); };
  for (const auto* all : {&slots.linears, &slots.gains}) {
    for (const LinearSite& site : *all) ++in_model[suffix(site)];
  }
  for (const LinearSite* site : sites) ++meant[suffix(*site)];
  std::set<std::string> out;
  for (const LinearSite* site : sites) {
    const std::string s = suffix(*site);
    out.insert(meant[s] == in_model[s] ? s : site->hf_path);
  }
  return {out.begin(), out.end()};
}

}  // namespace graft::peft
