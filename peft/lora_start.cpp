#include "peft/lora_start.h"

#include <ATen/ATen.h>
#include <xxhash.h>

#include <algorithm>
#include <cmath>

#include "configs/check.h"

namespace graft::peft {
namespace {

using Json = nlohmann::json;

/// PEFT's sections for the starts that have options.
constexpr const char* kLoraSections[] = {"loftq_config", "eva_config", "corda_config",
                                         "lora_ga_config"};
constexpr const char* kLoraStart = "init_lora_weights";

/// The section of a start, or "".
std::string start_section(const std::string& start) {
  const std::string name = start + "_config";
  const bool known = std::find(std::begin(kLoraSections), std::end(kLoraSections), name) !=
                     std::end(kLoraSections);
  return known ? name : "";
}

/// What else becomes another in the file of an adapter that the base gave something up for.
constexpr const char* kLoraRanks[] = {"r", "rank_pattern"};
constexpr const char* kLoraAlphas[] = {"lora_alpha", "alpha_pattern"};

/// A number, or all values of a pattern, times a factor; whole numbers stay whole where they can.
void multiply_entry(Json& entry, double factor) {
  if (entry.is_object()) {
    for (auto& value : entry) multiply_entry(value, factor);
    return;
  }
  const double product = factor * entry.get<double>();
  entry = entry.is_number_integer() && product == std::floor(product)
              ? Json(static_cast<int64_t>(product))
              : Json(product);
}

/// What a slot sees: q, k and v of a layer see one input, its gate and up another.
std::string input_of(const LinearSite& site) {
  constexpr const char* kSharing[] = {"attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"};
  const bool shares =
      std::find(std::begin(kSharing), std::end(kSharing), site.role) != std::end(kSharing);
  return shares ? site.name.substr(0, site.name.rfind('.')) : site.name;
}

/// A number of an object, else `otherwise`.
double json_number(const nlohmann::ordered_json& object, const std::string& key, double otherwise) {
  if (!object.is_object()) return otherwise;
  const auto found = object.find(key);
  return found != object.end() && found->is_number() ? found->get<double>() : otherwise;
}

}  // namespace

void LoftqFields::fields(configs::Fields& f) {
  f("loftq_bits", loftq_bits, f.range(4, 8), "those of model.quantization: 4, or 8 for int8");
  f("loftq_iter", loftq_iter, f.range(1, 100), "T: 1 leaves the base as it would be without");
}

void EvaFields::fields(configs::Fields& f) {
  f("rho", rho, f.at_least(1).at_most(1000),
    "a slot may get up to rho times its rank; 1: no sharing");
  f("tau", tau, f.range(0, 1),
    "cosine between two batches above which a slot's directions are done");
  f("use_label_mask", use_label_mask, "see only tokens that are targets");
  f("whiten", whiten, "divide directions by the root of their singular value");
  f("adjust_scaling_factors", adjust_scaling_factors, "lora_alpha follows the rank a slot gets");
}

void CordaFields::fields(configs::Fields& f) {
  f("corda_method", corda_method, f.one_of({"ipm", "kpm"}),
    "ipm: adapt the largest directions of W C; kpm: the smallest, which preserves knowledge");
}

void LoraGaFields::fields(configs::Fields& f) {
  f("direction", direction, f.one_of({"ArBr", "A2rBr", "ArB2r", "random"}),
    "which singular vectors of the gradient go to A and to B");
  f("scale", scale, f.one_of({"stable", "weight_svd", "gd_scale", "unit"}), "of B");
  f("stable_gamma", stable_gamma, f.positive(), "stable: B is scaled by out^(1/4) / sqrt(gamma)");
}

void LoraStartFields::fields(configs::Fields& f) {
  LoraFields::fields(f);
  f("loftq_config", loftq_config, "of init_lora_weights: loftq");
  f("eva_config", eva_config, "of init_lora_weights: eva");
  f("corda_config", corda_config, "of init_lora_weights: corda");
  f("lora_ga_config", lora_ga_config, "of init_lora_weights: lora_ga");
  f("calibration_samples", calibration_samples, f.range(1, 1'000'000),
    "rows of data.train that eva, corda and lora_ga see before step 0");
}

bool LoraStartFields::is_computed() const {
  return takes_from_base() || is_start("loftq") || is_start("eva") || is_start("mica");
}

bool LoraStartFields::takes_from_base() const {
  return is_pissa() || is_start("olora") || is_start("corda") || is_start("lora_ga") ||
         (is_start("loftq") && loftq_config.loftq_iter > 1);
}

void LoraStartFields::check_start(const LinearSite& site) const {
  if (!is_computed()) return;
  const std::string what = "init_lora_weights: " + init_lora_weights;
  GRAFT_CHECK(site.layer >= 0 && site.info.kind == models::LinearKind::kLinear, "peft: ", what,
              " is for the linear layers of blocks, and ", site.name, " is not one");
  const int64_t needed = is_start("lora_ga") ? 2 * rank(site) : rank(site);
  GRAFT_CHECK(needed <= std::min(site.info.in, site.info.out), "peft: ", what, " takes ", needed,
              " directions of ", site.name, ", which is ", site.info.out, " x ", site.info.in,
              "; r at most ",
              std::min(site.info.in, site.info.out) / (is_start("lora_ga") ? 2 : 1));
}

Calibration LoraStartFields::calibration() const {
  if (is_start("lora_ga")) return {calibration_samples, true};
  return {is_start("eva") || is_start("corda") ? calibration_samples : 0, false};
}

void LoraStartFields::decide(const std::vector<const LinearSite*>& sites,
                             const std::vector<Tensor>& ratios) {
  int64_t budget = 0;
  for (const LinearSite* site : sites) budget += rank(*site);
  const std::vector<int> ranks = share_ranks(ratios, budget);
  std::map<std::string, Decision> shared;
  for (size_t i = 0; i < sites.size(); ++i) {
    const auto& [planned, alpha] = decision(*sites[i]);
    const double follows = static_cast<double>(ranks[i]) / planned;
    shared[sites[i]->hf_path] = {ranks[i],
                                 eva_config.adjust_scaling_factors ? alpha * follows : alpha};
  }
  decided = std::move(shared);
}

void LoraStartFields::take_decisions(const SavedAdapter& adapter) {
  if (!is_start("eva")) return;
  constexpr std::string_view kLeaf = ".lora_A.weight";
  decided.emplace();
  const auto entry = [&](const char* pattern, const char* all, const std::string& module) {
    const double fallback = json_number(adapter.config, all, 0);
    const auto found = adapter.config.find(pattern);
    return found == adapter.config.end() ? fallback : json_number(*found, module, fallback);
  };
  for (const std::string& tensor : adapter.tensors) {
    if (!tensor.starts_with(kFilePrefix) || !tensor.ends_with(kLeaf)) continue;
    const std::string module =
        tensor.substr(kFilePrefix.size(), tensor.size() - kFilePrefix.size() - kLeaf.size());
    const double rank = entry("rank_pattern", "r", module);
    (*decided)[module] = {static_cast<int>(std::clamp(rank, 0.0, 4096.0)),
                          entry("alpha_pattern", "lora_alpha", module)};
  }
}

void LoraStartFields::write(Json& config, const std::vector<const LinearSite*>& sites,
                            const SlotMap& slots) const {
  const std::string section = start_section(init_lora_weights);
  Json own = {{kLoraStart, init_lora_weights}};
  if (!section.empty()) own[section] = config[section];
  const bool is_read_by_peft = is_start("eva");
  for (const char* name : kLoraSections) {
    if (name != section || !is_read_by_peft)
      config[name] = std::string_view(name) == "loftq_config" ? Json::object() : Json(nullptr);
  }
  if (is_start("loftq")) config[kLoraStart] = true;  // PEFT would quantise the base once more
  if (takes_from_base()) {                           // the scale stays
    for (const char* key : kLoraRanks) own[key] = config[key], multiply_entry(config[key], 2);
    for (const char* key : kLoraAlphas)
      own[key] = config[key], multiply_entry(config[key], use_rslora ? std::sqrt(2.0) : 2);
    config[kLoraStart] = true;
    config[kOwnEntries].update(own);
  }
  if (!decided) return;
  config["rank_pattern"] = config["alpha_pattern"] = Json::object();
  std::vector<const LinearSite*> adapted;
  for (const LinearSite* site : sites) {
    const auto& [rank, alpha] = decision(*site);
    if (rank == 0) continue;
    adapted.push_back(site);
    if (rank != r) config["rank_pattern"][site->hf_path] = rank;
    if (alpha != lora_alpha) config["alpha_pattern"][site->hf_path] = alpha;
  }
  config["target_modules"] = hf_targets(adapted, slots);
}

SavedAdapter LoraStartFields::read(SavedAdapter adapter) {
  for (const char* name : kLoraSections) adapter.config.erase(name);
  if (!adapter.facts.contains(kLoraStart)) return with_known_start(std::move(adapter));
  const auto restore = [&](const char* key) {
    if (adapter.facts.contains(key)) adapter.config[key] = adapter.facts[key];
  };
  restore(kLoraStart);
  for (const char* key : kLoraRanks) restore(key);
  for (const char* key : kLoraAlphas) restore(key);
  for (const char* name : kLoraSections) restore(name);
  return adapter;
}

PeftForm LoraStartFields::peft_form() {
  PeftForm form = LoraFields::peft_form();
  form.ours.emplace_back("calibration_samples");
  return form;
}

void LoraStarter::list(const LoraStartFields& c, const LinearSite& site, models::Task task) {
  predicts_next_ = task == models::Task::kCausalLm;
  const auto own = static_cast<int64_t>(std::nearbyint(c.rank(site) * c.eva_config.rho));
  int64_t& most = candidates_[input_of(site)];  // half to even above, as Python rounds
  most = std::max(most, std::min(own, site.info.in));
}

Tensor LoraStarter::with_targets(const Observation& seen) const {
  // Here a label stands at the token before. The last token of a document has none, so the first of
  // the next is no target, nor is the first of all.
  return seen.x.index({predicts_next_ ? seen.predicts.roll(1) : seen.predicts});
}

void LoraStarter::observe(const LoraStartFields& c, const LinearSite& site,
                          const Observation& seen) {
  Statistics& s = statistics_[site.name];
  if (c.is_start("eva")) {
    if (!s.pca) s.pca.emplace(candidates_.at(input_of(site)), c.eva_config.tau);
    s.pca->fit(c.eva_config.use_label_mask ? with_targets(seen) : seen.x);
    return;
  }
  Tensor one;
  if (c.is_start("corda")) {
    const Tensor x = seen.x / seen.x.max().abs();  // as the authors: a batch's largest is 1
    one = x.t().mm(x);
    ++s.count;
  } else {
    one = seen.dy.t().mm(seen.x);
    s.count += seen.predicts.sum().item<int64_t>();
  }
  s.sum = s.sum.defined() ? s.sum.add_(one) : one;
}

std::vector<Tensor> LoraStarter::start(const LoraStartFields& c, const LinearSite& site,
                                       PlainMatrix& matrix) {
  const int64_t r = c.rank(site);
  const double s = c.scale(site);
  const kernels::Key key{XXH3_64bits(site.name.data(), site.name.size()), 0};
  const auto seen = statistics_.extract(site.name);
  const auto sum = [&] {
    GRAFT_CHECK(!seen.empty() && seen.mapped().count > 0, ExitCode::kData,
                "init_lora_weights: ", c.init_lora_weights,
                ": the first rows of data.train hold nothing to learn from");
    return seen.mapped().sum / static_cast<double>(seen.mapped().count);
  };
  if (c.is_start("eva")) {
    GRAFT_CHECK(!seen.empty() && seen.mapped().pca->fitted(), ExitCode::kData, "peft: ", site.name,
                ": no micro-batch of the first rows of data.train has as many tokens as ",
                "init_lora_weights: eva looks for directions, ", c.eva_config.rho, " x ", r);
    const IncrementalPca& pca = *seen.mapped().pca;
    Tensor directions = pca.components();
    if (c.eva_config.whiten) directions = directions / pca.singular_values().sqrt().unsqueeze(1);
    return {directions, pca.explained_variance_ratio()};
  }
  const Tensor w = matrix.dense();
  FirstFactors f;
  if (c.is_pissa()) {
    const size_t number = c.init_lora_weights.rfind('_');
    const int iterations =
        number == std::string::npos ? 0 : std::stoi(c.init_lora_weights.substr(number + 1));
    f = pissa(w, r, s, iterations, key);
  } else if (c.is_start("olora")) {
    f = olora(w, r);
  } else if (c.is_start("mica")) {
    f = mica(w, r);
  } else if (c.is_start("corda")) {
    f = corda(
        w, sum(), r, s,
        c.corda_config.corda_method == "ipm" ? CordaTriplets::kLargest : CordaTriplets::kSmallest);
  } else if (c.is_start("lora_ga")) {
    f = lora_ga(w, sum(), r, s, c.lora_ga_config, key);
  } else {
    const int bits = matrix.stored_bits();
    GRAFT_CHECK(
        bits == c.loftq_config.loftq_bits, "loftq_config.loftq_bits = ", c.loftq_config.loftq_bits,
        ", and model.quantization stores ", bits, " bits; loftq starts from what quantising loses");
    f = loftq(w, r, s, c.loftq_config.loftq_iter,
              [&](const Tensor& t) { return matrix.stored(t); });
  }
  std::vector<Tensor> values = {f.a, f.b};
  if (c.takes_from_base()) values.insert(values.end(), {f.taken_a, -f.taken_b});
  return values;
}

}  // namespace graft::peft
