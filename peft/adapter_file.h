// An adapter directory in HF PEFT's layout: adapter_config.json beside adapter_model.safetensors.
// The second says which modules are adapted and how large the adapters are; the first is asked for
// the rest.
#pragma once

#include <ATen/core/Tensor.h>

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "models/io/safetensors.h"
#include "peft/method.h"

namespace graft::peft {

/// What precedes the path of a module in PEFT's files.
inline constexpr std::string_view kFilePrefix = "base_model.model.";
/// What follows it where PEFT saved the frozen matrix too.
inline constexpr std::string_view kBaseCopy = ".base_layer.weight";

/// The metadata entry of adapter_model.safetensors with what only Graft knows: method and
/// base_fingerprint, as JSON. PEFT would warn of an entry in adapter_config.json.
inline constexpr const char* kFactsKey = "graft";

/// What a method is made from.
struct SavedAdapter {
  nlohmann::ordered_json config;     ///< as in the file: of two patterns PEFT takes the first
  std::vector<std::string> tensors;  ///< names, as in the file
  nlohmann::json facts = nlohmann::json::object();  ///< what kFactsKey holds, if Graft wrote it
};

/// @throws graft::Error (kData) for a directory that is no adapter
SavedAdapter read_saved_adapter(const std::string& directory);

/// The tensors of a directory.
class AdapterFile {
 public:
  /// @throws graft::Error (kData)
  explicit AdapterFile(const std::string& directory);

  std::vector<std::string> names() const;
  /// What kFactsKey holds; an empty object if it is not there or names no method.
  /// @throws graft::Error (kData) for entries of another type than Graft writes
  nlohmann::json facts() const;
  bool has_base_copies() const;
  /// Refuses a file without tensors, tensors of modules that the model does not have, and matrices
  /// that would take the place of a block's.
  void check_modules(const SlotMap& slots) const;
  /// What the file holds for `params` and then for `constants`, in their order; undefined for a
  /// constant that it leaves out, for a parameter without elements, and for a thawed weight, which
  /// is checked and left to tensor().
  /// Copies of base matrices are left to check_modules and check_base_copies.
  /// @throws graft::Error (kData) with the missing, unknown and misshapen tensors
  std::vector<Tensor> read(const std::vector<Param>& params,
                           const std::vector<Constant>& constants = {}) const;
  /// One tensor as it is in the file.
  Tensor tensor(const std::string& key) const { return file_.read(key); }
  /// PEFT saves the frozen matrix beside an adapted embedding or head, and loads it over the
  /// base's. Collective, as BaseWeights is.
  /// @throws graft::Error (kData) for a copy that is not the base's matrix
  void check_base_copies(const SlotMap& slots, BaseWeights& base) const;

 private:
  void refuse(const std::vector<std::string>& problems) const;

  models::io::SafetensorsFile file_;
};

/// True for the dtypes an adapter may have.
bool is_adapter_dtype(std::string_view dtype);

/// The first of `path` and the modules around it that is among `known`, else "".
template <class Known>
std::string_view module_around(std::string_view path, const Known& known) {
  while (!path.empty() && !known.contains(path)) {
    const size_t dot = path.rfind('.');
    path = path.substr(0, dot == std::string_view::npos ? 0 : dot);
  }
  return path;
}

}  // namespace graft::peft
