#include "models/io/source.h"

#include <algorithm>

namespace graft::models::io {

const SourceTensor* TensorSource::find(std::string_view name) const {
  const auto& all = tensors();
  const auto found = std::lower_bound(
      all.begin(), all.end(), name,
      [](const SourceTensor& tensor, std::string_view wanted) { return tensor.name < wanted; });
  return found != all.end() && found->name == name ? &*found : nullptr;
}

std::optional<FourBit> TensorSource::read_four_bit(const std::string& /*name*/) {
  return std::nullopt;
}

}  // namespace graft::models::io
