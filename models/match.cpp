#include "models/match.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>

#include "configs/check.h"

namespace graft::models {
namespace {

/// Whether a tensor of this dtype may become a weight: floating point, stored as such or in the
/// blocks of GGUF and bitsandbytes. Eight-bit floats need scales that lie elsewhere.
bool holds_floats(const std::string& dtype) {
  static const std::set<std::string, std::less<>> kFloats = {"F64",  "F32", "F16",
                                                             "BF16", "nf4", "fp4"};
  return kFloats.contains(dtype) || dtype.starts_with("Q");  // GGUF: Q4_0, Q6_K ...
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

std::string list(const std::string& title, const std::vector<std::string>& lines) {
  constexpr size_t kShown = 10;
  if (lines.empty()) return "";
  std::string text = "\n" + title + " (" + std::to_string(lines.size()) + "):";
  for (size_t i = 0; i < std::min(kShown, lines.size()); ++i) text += "\n  " + lines[i];
  return lines.size() > kShown ? text + "\n  ..." : text;
}

}  // namespace

std::vector<MatchedWeight> match_weights(Model& model, const io::TensorSource& source) {
  const NameMap& names = model.names();
  const bool gguf = source.find("token_embd.weight") != nullptr;
  std::vector<MatchedWeight> weights;
  for_each_weight(model, [&](int block, const std::string& name, Weight& w) {
    weights.push_back({name, &w, block});
  });
  std::vector<std::string> missing, unknown, differ, not_floats;
  std::set<std::string, std::less<>> used;
  for (MatchedWeight& item : weights) {
    const auto found = gguf ? names.to_gguf(item.name) : names.to_hf(item.name);
    GRAFT_ASSERT(found.has_value(), "no name for ", item.name);
    item.source = source.find(found->name);
    item.transform = found->transform;
    if (item.source == nullptr) {
      missing.push_back(found->name);
      continue;
    }
    used.insert(found->name);
    if (item.source->shape != item.weight->shape()) {
      differ.push_back(found->name + " is " + shape_text(item.source->shape) +
                       ", the config says " + shape_text(item.weight->shape()));
    }
    if (!holds_floats(item.source->dtype)) {
      not_floats.push_back(found->name + " is " + item.source->dtype);
    }
  }
  if (model.info().tied_head) used.insert(kHeadTensor);  // read_base_config saw it equal the table
  for (const io::SourceTensor& t : source.tensors()) {
    if (!used.contains(t.name) && !names.dropped(t.name)) unknown.push_back(t.name);
  }
  GRAFT_CHECK(missing.empty() && unknown.empty() && differ.empty() && not_floats.empty(),
              ExitCode::kData, source.describe(), ": tensors and model config do not agree",
              list("not in the file", missing), list("not known to this family", unknown),
              list("other shape", differ), list("not a floating-point type", not_floats));
  return weights;
}

Tensor rope_rows_from_gguf(const Tensor& rows, int64_t head_dim) {
  return rows.unflatten(0, {-1, head_dim / 2, 2}).transpose(1, 2).flatten(0, 2).contiguous();
}

Tensor rope_rows_to_gguf(const Tensor& rows, int64_t head_dim) {
  return rows.unflatten(0, {-1, 2, head_dim / 2}).transpose(1, 2).flatten(0, 2).contiguous();
}

}  // namespace graft::models
