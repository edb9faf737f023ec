#include <ATen/ATen.h>

#include <cmath>
#include <map>

#include "configs/check.h"
#include "peft/adapter_file.h"
#include "peft/lycoris_file.h"
#include "peft/lycoris_module.h"
#include "peft/rotation.h"

namespace graft::peft {
namespace {

using Json = nlohmann::json;

/// The fields of an adapter, PEFT's and ours.
struct Fields {
  Json config, own;

  Json get(const char* name, const Json& fallback) const {
    return own.value(name, config.value(name, fallback));
  }
  /// Of a module, from a pattern.
  double value(const char* name, const char* pattern, const std::string& path) const {
    const Json& all = config.value(pattern, Json::object());
    return all.contains(path) ? all.at(path).get<double>() : config.at(name).get<double>();
  }
  double scale(const char* alpha, int64_t r, const std::string& path) const {
    const bool rooted = get("use_rslora", false) == true || get("rs_lora", false) == true;
    const auto rank = static_cast<double>(r);
    return value(alpha, "alpha_pattern", path) / (rooted ? std::sqrt(rank) : rank);
  }
};

using Leaves = std::vector<std::pair<std::string, Tensor>>;

Tensor number(double value) { return at::scalar_tensor(value, at::kFloat); }

/// A trained scalar goes into the first factor, as LyCORIS saves it.
Tensor times_scalar(const Tensor& t, LycorisModule& m) {
  const Tensor scalar = m.take("scalar");
  return scalar.defined() ? t * scalar : t;
}

void add_magnitudes(LycorisModule& m, Leaves& leaves) {
  if (const Tensor scale = m.take("dora_scale"); scale.defined())
    leaves.emplace_back("dora_scale", scale);
}

Leaves write_lora(LycorisModule& m, const Fields& fields) {
  const bool is_locon = m.has("lora_up.weight");
  const Tensor down = m.need(is_locon ? "lora_down.weight" : "lora_A.weight");
  const Tensor up = times_scalar(m.need(is_locon ? "lora_up.weight" : "lora_B.weight"), m);
  const int64_t r = down.size(0);
  const double scale = fields.scale(is_locon ? "alpha" : "lora_alpha", r, m.site.hf_path);
  Leaves leaves = {{"lora_up.weight", up},
                   {"lora_down.weight", down},
                   {"alpha", number(scale * static_cast<double>(r))}};
  if (const Tensor lengths = m.take("lora_magnitude_vector"); lengths.defined())
    leaves.emplace_back("dora_scale", lengths.unsqueeze(1));
  add_magnitudes(m, leaves);
  return leaves;
}

/// The ranks that work outside of training, which LyCORIS reads as a locon.
Leaves write_dylora(LycorisModule& m, const Fields& fields) {
  m.take("ranks");
  const Json wanted = fields.get("inference_r", Json());
  const auto all = fields.get("r", 8).get<int64_t>();
  const int64_t b = wanted.is_number() ? wanted.get<int64_t>() : all;
  const auto by = fields.get("scale_by", "sqrt_rank").get<std::string>();
  const auto ranks = static_cast<double>(b);
  double alpha = fields.get("lora_alpha", 8).get<double>();  // scaled by alpha / b
  if (by == "pieces") alpha *= fields.get("block_size", 1).get<double>();
  if (by == "sqrt_rank") alpha *= std::sqrt(ranks / static_cast<double>(all));
  return {{"lora_up.weight", m.need("lora_B.weight").slice(1, 0, b)},
          {"lora_down.weight", m.need("lora_A.weight").slice(0, 0, b)},
          {"alpha", number(alpha)}};
}

Leaves write_loha(LycorisModule& m, const Fields& fields) {
  const int64_t r = m.left().at("hada_w1_b").size(0);
  const double alpha = fields.scale("alpha", r, m.site.hf_path) * static_cast<double>(r);
  Leaves leaves = {{"hada_w1_a", times_scalar(m.need("hada_w1_a"), m)}, {"alpha", number(alpha)}};
  for (const char* leaf : {"hada_w1_b", "hada_w2_a", "hada_w2_b"})
    leaves.emplace_back(leaf, m.need(leaf));
  add_magnitudes(m, leaves);
  return leaves;
}

/// LyCORIS takes the rank from a factor, and where all are whole it does not scale.
Leaves write_lokr(LycorisModule& m, const Fields& fields) {
  const std::string& path = m.site.hf_path;
  const bool both_whole = m.has("lokr_w1") && m.has("lokr_w2");
  const auto rank = static_cast<int64_t>(fields.value("r", "rank_pattern", path));
  const double scale = fields.scale("alpha", rank, path);
  const bool is_unit = fields.get("unit_scale", false) == true;
  Leaves leaves = {{"alpha", number(both_whole ? 1 : scale * static_cast<double>(rank))}};
  const std::string first = m.has("lokr_w1") ? "lokr_w1" : "lokr_w1_a";
  Tensor w1 = times_scalar(m.need(first), m);
  if (both_whole && !is_unit) w1 = w1 * scale;
  leaves.emplace_back(first, w1);
  for (const char* leaf : {"lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}) {
    if (m.has(leaf)) leaves.emplace_back(leaf, m.take(leaf));
  }
  add_magnitudes(m, leaves);
  return leaves;
}

Leaves write_ia3(LycorisModule& m, const Fields& fields) {
  const Tensor l = m.need("ia3_l");
  const bool on_input = l.size(0) == 1;
  GRAFT_CHECK(on_input || !m.site.info.has_bias || fields.get("scale_bias", true) == false,
              "export: LyCORIS's ia3 leaves biases alone, and this one scales that of ",
              m.site.hf_path, " (scale_bias)");
  return {{"weight", l.flatten() - 1}, {"on_input", at::scalar_tensor(on_input, at::kLong)}};
}

Leaves write_oft(LycorisModule& m, const Fields& fields) {
  const bool is_boft = m.has("boft_R");
  GRAFT_CHECK(fields.get("rotate", "inputs") == "outputs" &&
                  (is_boft || (fields.get("use_cayley_neumann", true) == false &&
                               fields.get("block_share", false) == false)),
              "export: LyCORIS turns outputs, exactly and each block by itself: rotate: outputs",
              is_boft ? "" : ", use_cayley_neumann: false, block_share: false");
  Leaves leaves = {{"alpha", number(0)}};
  if (is_boft) {
    const Tensor order = halves_together(m.left().at("boft_R").size(-1)).argsort();
    leaves.emplace_back("oft_blocks",
                        -0.5 * m.need("boft_R").index_select(2, order).index_select(3, order));
    leaves.emplace_back("rescale", m.need("boft_s"));
    return leaves;
  }
  const Tensor above = m.need("oft_R.weight");
  const int64_t k = m.site.info.out / above.size(0);
  leaves.emplace_back("oft_blocks", -0.5 * skew_matrices(above, k));
  if (const Tensor rescale = m.take("rescale"); rescale.defined())
    leaves.emplace_back("rescale", rescale.unsqueeze(1));
  return leaves;
}

Leaves write_glora(LycorisModule& m, const Fields& fields) {
  GRAFT_CHECK(fields.get("matrix_product", false) == true,
              "export: LyCORIS's glora multiplies W by A as a matrix: matrix_product: true");
  const Tensor a2 = m.need("glora_A.Xu");
  for (const char* path : {"C", "D", "E"}) {
    if (m.has(std::string("glora_") + path + ".zeros"))
      m.take(std::string("glora_") + path + ".zeros");
  }
  return {{"a1.weight", m.need("glora_A.Xd")},
          {"a2.weight", a2},
          {"b1.weight", m.need("glora_B.Xd")},
          {"b2.weight", m.need("glora_B.Xu")},
          {"alpha", number(static_cast<double>(a2.size(0)))}};
}

Leaves write_leaves(LycorisModule& m, const Fields& fields, BaseWeights& base) {
  if (m.has("ranks")) return write_dylora(m, fields);
  if (m.has("lora_A.weight") || m.has("lora_up.weight")) return write_lora(m, fields);
  if (m.has("hada_w1_b")) return write_loha(m, fields);
  if (m.has("lokr_w1") || m.has("lokr_w1_a")) return write_lokr(m, fields);
  if (m.has("ia3_l")) return write_ia3(m, fields);
  if (m.has("oft_R.weight") || m.has("boft_R")) return write_oft(m, fields);
  if (m.has("glora_A.Xd")) return write_glora(m, fields);
  if (m.has("ln_tuning_layers.weight"))
    return {{"w_norm", m.need("ln_tuning_layers.weight") - base.weight(m.site).cpu()}};
  if (m.has("diff")) {
    Leaves leaves = {{"diff", m.need("diff")}};
    if (m.has("diff_b")) leaves.emplace_back("diff_b", m.take("diff_b"));
    return leaves;
  }
  return {};
}

}  // namespace

models::io::NamedTensors write_lycoris(const Peft::Saved& adapter, const SlotMap& slots,
                                       BaseWeights& base) {
  const Fields fields{adapter.config, Json::parse(adapter.metadata.at(kFactsKey))};
  models::io::NamedTensors tensors;
  std::map<std::string, Tensor> left(adapter.tensors.begin(), adapter.tensors.end());
  for (const auto* sites : {&slots.linears, &slots.gains}) {
    for (const LinearSite& site : *sites) {
      const std::string prefix = std::string(kFilePrefix) + site.hf_path + ".";
      LycorisModule m(site);
      for (auto t = left.lower_bound(prefix); t != left.end() && t->first.starts_with(prefix);) {
        m.put(t->first.substr(prefix.size()), t->second.to(at::kFloat));
        t = left.erase(t);
      }
      for (const auto& [leaf, value] : write_leaves(m, fields, base))
        tensors.emplace_back("lycoris_" + underscored(site.hf_path) + "." + leaf,
                             value.contiguous());
      GRAFT_CHECK(m.left().empty(), "export: LyCORIS has no kind for ", prefix,
                  m.left().begin()->first);
    }
  }
  GRAFT_CHECK(left.empty(), "export: LyCORIS has no kind for ", left.begin()->first);
  return tensors;
}

}  // namespace graft::peft
