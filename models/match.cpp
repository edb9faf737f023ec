#include "models/match.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>

#include "configs/check.h"

namespace graft::models {
namespace {

std::vector<MatchedWeight> weights_of(Model& model) {
  struct Collect : Visitor {
    std::vector<MatchedWeight> weights;
    int block = 0;
    void weight(const std::string& name, Weight& w) override {
      weights.push_back({name, &w, block});
    }
  } collect;
  for (collect.block = 0; collect.block < model.num_blocks(); ++collect.block) {
    model.visit_weights(collect.block, collect);
  }
  return collect.weights;
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
  std::vector<MatchedWeight> weights = weights_of(model);
  std::vector<std::string> missing, unknown, differ;
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
  }
  for (const io::SourceTensor& t : source.tensors()) {
    if (!used.contains(t.name) && !names.dropped(t.name)) unknown.push_back(t.name);
  }
  GRAFT_CHECK(missing.empty() && unknown.empty() && differ.empty(), ExitCode::kData,
              source.describe(), ": tensors and model config do not agree",
              list("not in the file", missing), list("not known to this family", unknown),
              list("other shape", differ));
  return weights;
}

Tensor rope_rows_from_gguf(const Tensor& rows, int64_t head_dim) {
  return rows.unflatten(0, {-1, head_dim / 2, 2}).transpose(1, 2).flatten(0, 2).contiguous();
}

Tensor rope_rows_to_gguf(const Tensor& rows, int64_t head_dim) {
  return rows.unflatten(0, {-1, 2, head_dim / 2}).transpose(1, 2).flatten(0, 2).contiguous();
}

}  // namespace graft::models
