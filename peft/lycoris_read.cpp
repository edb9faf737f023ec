#include "peft/lycoris_file.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <optional>

#include "configs/check.h"
#include "peft/adapter_file.h"
#include "peft/lycoris_module.h"
#include "peft/peft_form.h"
#include "peft/targets.h"

namespace graft::peft {
namespace {

using Json = nlohmann::json;

/// Of LyCORIS's own wrapper, and of kohya's scripts for text encoders and denoisers.
constexpr const char* kPrefixes[] = {"lycoris_",  "lora_te_",  "lora_te1_",
                                     "lora_te2_", "lora_te3_", "lora_unet_"};

/// A module of a LyCORIS file as one of a method here.
struct Piece {
  std::string method;
  Json config = Json::object();  ///< what all modules of an adapter share
  Json own = Json::object();     ///< likewise, of the fields that only Graft has
  std::optional<int64_t> rank = {};
  std::optional<double> alpha = {};
  std::vector<std::pair<std::string, Tensor>> tensors = {};  ///< by leaf
};

/// alpha / rank; LyCORIS takes a missing or zero alpha for the rank.
double read_alpha(LycorisModule& m, int64_t rank) {
  const double value = m.number("alpha", 0);
  return value == 0 ? static_cast<double>(rank) : value;
}

void expect_shape(const LycorisModule& m, const std::string& leaf, const Tensor& t,
                  const std::vector<int64_t>& shape) {
  const at::IntArrayRef expected(shape);
  GRAFT_CHECK(t.sizes() == expected, ExitCode::kData, m.site.hf_path, ": ", leaf, " is ", t.sizes(),
              ", expected ", expected, t.dim() > 2 ? "; convolutions are not supported" : "");
}

/// Magnitudes [out, 1] or [1, in]: of rows or columns.
Tensor take_magnitudes(LycorisModule& m, Json& own) {
  Tensor scale = m.take("dora_scale");
  if (!scale.defined()) return scale;
  const bool of_rows = scale.numel() == m.site.info.out && scale.dim() > 0 && scale.size(0) > 1;
  expect_shape(
      m, "dora_scale", scale,
      of_rows ? std::vector<int64_t>{m.site.info.out, 1} : std::vector<int64_t>{1, m.site.info.in});
  own["weight_decompose"] = true;
  own["wd_on_out"] = of_rows;
  return scale;
}

Piece read_locon(LycorisModule& m) {
  Piece piece;
  const Tensor up = m.need("lora_up.weight"), down = m.need_matrix("lora_down.weight");
  const int64_t r = down.size(0);
  expect_shape(m, "lora_up.weight", up, {m.site.info.out, r});
  expect_shape(m, "lora_down.weight", down, {r, m.site.info.in});
  piece.rank = r, piece.alpha = read_alpha(m, r);
  Json own;
  const Tensor scale = take_magnitudes(m, own);
  if (scale.defined() && own["wd_on_out"] == false) {
    piece.method = "locon", piece.own = own;
    piece.tensors = {{"lora_up.weight", up}, {"lora_down.weight", down}, {"dora_scale", scale}};
    return piece;
  }
  piece.method = scale.defined() ? "dora" : "lora";
  piece.config["use_dora"] = scale.defined();
  piece.tensors = {{"lora_A.weight", down}, {"lora_B.weight", up}};
  if (scale.defined()) piece.tensors.emplace_back("lora_magnitude_vector", scale.flatten());
  return piece;
}

Piece read_loha(LycorisModule& m) {
  Piece piece{.method = "loha"};
  int64_t r = 0;
  for (const char* leaf : {"hada_w1_b", "hada_w1_a", "hada_w2_a", "hada_w2_b"}) {
    const Tensor t = m.need_matrix(leaf);
    if (r == 0) r = t.size(0);
    expect_shape(m, leaf, t,
                 std::string_view(leaf).ends_with("_a") ? std::vector<int64_t>{m.site.info.out, r}
                                                        : std::vector<int64_t>{r, m.site.info.in});
    piece.tensors.emplace_back(leaf, t);
  }
  piece.rank = r, piece.alpha = read_alpha(m, r);
  if (const Tensor scale = take_magnitudes(m, piece.own); scale.defined())
    piece.tensors.emplace_back("dora_scale", scale);
  return piece;
}

/// n as LyCORIS's lokr splits it, the smaller size; where `factor` divides n, PEFT has that first.
int64_t smaller_size(int64_t n, int64_t factor) {
  if (factor > 0 && n % factor == 0) return std::min(factor, n / factor);
  int64_t first = 1;
  for (int64_t k = 2; k * k <= n && (factor < 0 || k <= factor); ++k) first = n % k ? first : k;
  return first;
}

/// Sets the fields that give W1 the sizes it has.
void find_factors(const LycorisModule& m, int64_t o1, int64_t i1, Piece& piece) {
  const int64_t out = m.site.info.out, in = m.site.info.in;
  GRAFT_CHECK(o1 > 0 && i1 > 0 && out % o1 == 0 && in % i1 == 0, ExitCode::kData, m.site.hf_path,
              ": lokr_w1 [", o1, ", ", i1, "] does not divide [", out, ", ", in, "]");
  for (const int64_t factor : {int64_t{-1}, o1, i1, out / o1, in / i1}) {
    const int64_t rows = smaller_size(out, factor), columns = smaller_size(in, factor);
    const auto first = [&](int64_t n, int64_t smaller) {
      return factor > 0 && n % factor == 0 ? factor : smaller;
    };
    piece.config["decompose_factor"] = factor;
    const bool is_pefts = first(out, rows) == o1 && first(in, columns) == i1;
    piece.own["factorization"] = is_pefts ? "peft" : rows == o1 ? "lycoris" : "unbalanced";
    if (is_pefts || (columns == i1 && (rows == o1 || out / rows == o1))) return;
  }
  throw Error(ExitCode::kData, detail::concat(m.site.hf_path, ": no factor gives lokr_w1 [", o1,
                                              ", ", i1, "] of [", out, ", ", in, "]"));
}

Piece read_lokr(LycorisModule& m) {
  Piece piece{.method = "lokr"};
  std::map<std::string, Tensor> t;
  for (const char* name : {"lokr_w1", "lokr_w2"}) {
    for (const char* factor : {"", "_a", "_b"}) {
      const std::string leaf = std::string(name) + factor;
      const bool is_whole = t.contains(name);
      if (*factor == 0 ? m.has(leaf) : !is_whole) t[leaf] = m.need_matrix(leaf);
    }
  }
  const bool whole1 = t.contains("lokr_w1"), whole2 = t.contains("lokr_w2");
  const int64_t o1 = t[whole1 ? "lokr_w1" : "lokr_w1_a"].size(0);
  const int64_t i1 = t[whole1 ? "lokr_w1" : "lokr_w1_b"].size(1);
  find_factors(m, o1, i1, piece);
  piece.config["decompose_both"] = !whole1;
  if (whole1 && whole2) {  // any large rank; LyCORIS scales by 1
    piece.rank = std::max(m.site.info.out / o1, m.site.info.in / i1);
    piece.alpha = static_cast<double>(*piece.rank);
    m.take("alpha");
  } else {
    piece.rank = t[whole1 ? "lokr_w2_b" : "lokr_w1_b"].size(0);
    piece.alpha = read_alpha(m, *piece.rank);
  }
  for (const auto& [leaf, value] : t) piece.tensors.emplace_back(leaf, value);
  if (const Tensor scale = take_magnitudes(m, piece.own); scale.defined())
    piece.tensors.emplace_back("dora_scale", scale);
  return piece;
}

Piece read_ia3(LycorisModule& m) {
  Piece piece{.method = "ia3"};
  const bool on_input = m.number("on_input", 0) != 0;
  const Tensor l = m.need("weight").to(at::kFloat) + 1;
  expect_shape(m, "weight", l, {on_input ? m.site.info.in : m.site.info.out});
  piece.config["feedforward_modules"] = Json::array();  // filled in with the modules
  piece.tensors = {{"ia3_l", on_input ? l.unsqueeze(0) : l.unsqueeze(1)}};
  return piece;
}

Piece read_full(LycorisModule& m) {
  Piece piece{.method = "full_delta"};
  piece.tensors = {{"diff", m.need("diff")}};
  expect_shape(m, "diff", piece.tensors[0].second, {m.site.info.out, m.site.info.in});
  if (m.has("diff_b")) {
    GRAFT_CHECK(m.site.info.has_bias, ExitCode::kData, m.site.hf_path,
                ": diff_b, and the base has no bias there");
    piece.tensors.emplace_back("diff_b", m.take("diff_b"));
  }
  return piece;
}

/// LyCORIS: Q = blocks - blocks^T, scaled down to |Q| <= constraint * out over all blocks.
Tensor skew_of(LycorisModule& m) {
  const Tensor blocks = m.need("oft_blocks").to(at::kFloat);
  GRAFT_CHECK(blocks.dim() == 3 || blocks.dim() == 4, ExitCode::kData, m.site.hf_path,
              ": oft_blocks are ", blocks.sizes());
  GRAFT_CHECK(blocks.size(-1) == blocks.size(-2), ExitCode::kData, m.site.hf_path,
              ": oft_blocks are ", blocks.sizes(), ", expected squares");
  const double bound = m.number("alpha", 0) * static_cast<double>(m.site.info.out);
  const Tensor q = blocks - blocks.transpose(-1, -2);
  const double norm = q.norm().item<double>() + 1e-8;
  return bound > 0 && norm > bound ? q * (bound / norm) : q;
}

/// y = R^T W x with R = (I + Q)(I - Q)^-1: ours, Cayley's (I - Q)(I + Q)^-1, has the other sign.
Piece read_oft(LycorisModule& m) {
  const Tensor rescale = m.take("rescale"), q = skew_of(m);
  const int64_t k = q.size(-1), out = m.site.info.out, dimensions = q.dim();
  GRAFT_CHECK(q.size(-3) * k == out && (!rescale.defined() || rescale.numel() == out),
              ExitCode::kData, m.site.hf_path, ": oft_blocks are ", q.sizes(), " for ", out,
              " outputs");
  Piece piece{.method = dimensions == 3 ? "oft" : "boft"};
  piece.own["rotate"] = "outputs";
  if (dimensions == 4) {
    GRAFT_CHECK(k % 2 == 0, ExitCode::kData, m.site.hf_path, ": oft_blocks of an odd size ", k);
    piece.config = {
        {"boft_block_size", k}, {"boft_block_num", 0}, {"boft_n_butterfly_factor", q.size(0)}};
    const Tensor order = halves_together(k);
    const Tensor r = (-q).index_select(2, order).index_select(3, order);
    const Tensor s = rescale.defined() ? rescale.to(at::kFloat).view({out, 1}) : at::ones({out, 1});
    piece.tensors = {{"boft_R", r}, {"boft_s", s}};
    return piece;
  }
  piece.config = {{"oft_block_size", k}, {"r", 0}, {"use_cayley_neumann", false}};
  const Tensor places = at::triu_indices(k, k, 1);
  piece.tensors = {{"oft_R.weight", (-q).flatten(1).index_select(1, places[0] * k + places[1])}};
  piece.own["rescaled"] = rescale.defined();
  if (rescale.defined()) piece.tensors.emplace_back("rescale", rescale.flatten());
  return piece;
}

Piece read_glora(LycorisModule& m) {
  Piece piece{.method = "glora"};
  const int64_t out = m.site.info.out, in = m.site.info.in;
  const Tensor a1 = m.need("a1.weight"), a2 = m.need_matrix("a2.weight"), b1 = m.need("b1.weight"),
               b2 = m.need("b2.weight");
  const int64_t r = a2.size(0);
  expect_shape(m, "a1.weight", a1, {in, r}), expect_shape(m, "a2.weight", a2, {r, in});
  expect_shape(m, "b1.weight", b1, {out, r}), expect_shape(m, "b2.weight", b2, {r, in});
  const double scale = read_alpha(m, r) / static_cast<double>(r);
  piece.config = {{"r", r}, {"config_A_B", "lora"}, {"config_C", "none"}, {"config_D_E", "none"}};
  piece.own["matrix_product"] = true;
  piece.tensors = {{"glora_A.Xd", a1 * scale},
                   {"glora_A.Xu", a2},
                   {"glora_B.Xd", b1 * scale},
                   {"glora_B.Xu", b2},
                   {"glora_C.zeros", at::zeros({in, 1})},
                   {"glora_D.zeros", at::zeros({out})},
                   {"glora_E.zeros", at::zeros({out})}};
  return piece;
}

Piece read_norm(LycorisModule& m, BaseWeights& base) {
  Piece piece{.method = "layernorm_tuning"};
  const Tensor change = m.need("w_norm").to(at::kFloat);
  expect_shape(m, "w_norm", change, {m.site.info.out});
  piece.tensors = {{"ln_tuning_layers.weight", base.weight(m.site).cpu() + change}};
  return piece;
}

Piece read_piece(LycorisModule& m, BaseWeights& base) {
  if (m.site.info.kind == models::LinearKind::kGain) return read_norm(m, base);
  if (m.has("lora_up.weight")) return read_locon(m);
  if (m.has("hada_w1_a")) return read_loha(m);
  if (m.has("lokr_w1") || m.has("lokr_w1_a")) return read_lokr(m);
  if (m.has("on_input")) return read_ia3(m);
  if (m.has("diff")) return read_full(m);
  if (m.has("oft_blocks")) return read_oft(m);
  if (m.has("a1.weight")) return read_glora(m);
  throw Error(ExitCode::kData,
              m.site.hf_path + ": no kind of LyCORIS's has a tensor " + m.left().begin()->first);
}

/// Modules of one method and one set of fields.
struct Group {
  Piece first;
  std::vector<const LinearSite*> sites;
  Peft::Saved saved;
};

void add(Group& group, const Piece& piece, const LinearSite& site) {
  Json& config = group.saved.config;
  if (group.sites.empty()) {
    group.first = piece;
    config = piece.config;
    const std::string type = methods().make(piece.method)->peft_type();
    if (type.empty()) config.update(piece.own);  // all fields of a method that PEFT lacks
    if (piece.rank) config["r"] = *piece.rank;
    if (piece.alpha) config[type == "LORA" ? "lora_alpha" : "alpha"] = *piece.alpha;
  }
  group.sites.push_back(&site);
  if (piece.rank && piece.rank != group.first.rank)
    config["rank_pattern"][site.hf_path] = *piece.rank;
  if (piece.alpha && piece.alpha != group.first.alpha)
    config["alpha_pattern"][site.hf_path] = *piece.alpha;
  if (piece.method == "ia3" && piece.tensors[0].second.size(0) == 1)
    config["feedforward_modules"].push_back(site.hf_path);
  else if (piece.method == "ia3" && site.info.has_bias)
    group.first.own["scale_bias"] = false;
  for (const auto& [leaf, value] : piece.tensors) {
    group.saved.tensors.emplace_back(std::string(kFilePrefix) + site.hf_path + "." + leaf,
                                     value.to(at::kFloat).contiguous());
  }
}

/// Sets what every adapter_config.json has, and the type: PEFT's, if it can compute the adapter.
void finish(Group& group, const SlotMap& slots) {
  Json& config = group.saved.config;
  const Json& own = group.first.own;
  config["target_modules"] = hf_targets(group.sites, slots);
  config["task_type"] = "CAUSAL_LM";
  config["inference_mode"] = true;
  Json facts = own;
  facts["method"] = group.first.method;
  group.saved.metadata = {{"format", "pt"}, {kFactsKey, facts.dump()}};
  const std::shared_ptr<Method> method = methods().make(group.first.method);
  SavedAdapter adapter{config, {}, facts};
  for (const auto& [name, value] : group.saved.tensors) adapter.tensors.push_back(name);
  method->from_peft_config(adapter);
  const std::string type = method->peft_type();
  config["peft_type"] = type.empty() ? Json() : Json(type);
}

}  // namespace

std::vector<Peft::Saved> read_lycoris(const std::string& path, const SlotMap& slots,
                                      BaseWeights& base) {
  const models::io::SafetensorsFile file(path);
  std::map<std::string, const LinearSite*> by_name;
  for (const auto* sites : {&slots.linears, &slots.gains}) {
    for (const LinearSite& site : *sites) by_name[underscored(site.hf_path)] = &site;
  }
  std::map<std::string, LycorisModule> modules;
  std::vector<std::string> problems;
  for (const auto& entry : file.entries()) {
    const size_t dot = entry.name.find('.');
    std::string name = entry.name.substr(0, dot);
    for (const char* prefix : kPrefixes) {
      if (entry.name.starts_with(prefix)) name = name.substr(std::string_view(prefix).size());
    }
    const auto site = by_name.find(name);
    if (dot == std::string::npos || site == by_name.end()) {
      problems.push_back("unknown: " + entry.name);
      continue;
    }
    const bool is_one = entry.shape.empty() || entry.shape == std::vector<int64_t>{1};
    const bool is_count = is_one && entry.dtype.starts_with('I');  // as alpha may be
    if (!is_count && !is_adapter_dtype(entry.dtype)) {
      problems.push_back("no float: " + entry.name + " is " + entry.dtype);
      continue;
    }
    const Tensor value = file.read(entry.name);
    if (!at::isfinite(value.to(at::kFloat)).all().item<bool>())
      problems.push_back("not finite: " + entry.name);
    const bool is_new = modules.try_emplace(name, *site->second)
                            .first->second.put(entry.name.substr(dot + 1), value);
    if (!is_new) problems.push_back("twice: " + entry.name);
  }
  std::map<std::string, Group> groups;
  const auto read_one = [&](const LinearSite& site) {
    const auto found = modules.find(underscored(site.hf_path));
    if (found == modules.end()) return;
    LycorisModule& m = found->second;
    try {
      const Piece piece = read_piece(m, base);
      for (const auto& [leaf, value] : m.left())
        problems.push_back("unknown: " + site.hf_path + "." + leaf);
      add(groups[piece.method + piece.config.dump() + piece.own.dump()], piece, site);
    } catch (const Error& error) {
      problems.emplace_back(error.what());
    }
  };
  for (const LinearSite& site : slots.linears) read_one(site);
  for (const LinearSite& site : slots.gains) read_one(site);
  constexpr size_t kMostProblems = 20;  // printed
  const size_t count = std::min(problems.size(), kMostProblems);
  GRAFT_CHECK(
      problems.empty() && !groups.empty(), ExitCode::kData, path,
      " is not a LyCORIS file of this model:\n  ",
      configs::join({problems.begin(), problems.begin() + static_cast<std::ptrdiff_t>(count)},
                    "\n  "),
      count < problems.size() ? detail::concat("\n  and ", problems.size() - count, " more") : "");
  std::vector<Peft::Saved> all;
  for (auto& [key, group] : groups) {
    try {
      finish(group, slots);
    } catch (const Error& error) {
      throw Error(error.code(), path + ", " + group.first.method + ": " + error.what());
    }
    all.push_back(std::move(group.saved));
  }
  return all;
}

}  // namespace graft::peft
