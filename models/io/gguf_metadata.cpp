// GgufMetadata's typed reading.
#include <limits>
#include <type_traits>

#include "configs/check.h"
#include "models/io/gguf_header.h"

namespace graft::models::io {
namespace {

template <class T>
constexpr bool kIsInteger = std::is_integral_v<T> && !std::is_same_v<T, bool>;

}  // namespace

const GgufValue& GgufMetadata::at(std::string_view key) const {
  const auto found = values_.find(key);
  GRAFT_CHECK(found != values_.end(), ExitCode::kData, path_, ": metadata '", key, "' is missing");
  return found->second;
}

template <class T>
const T& GgufMetadata::as(std::string_view key, const char* kind) const {
  const T* value = std::get_if<T>(&at(key));
  GRAFT_CHECK(value != nullptr, ExitCode::kData, path_, ": metadata '", key, "' is not ", kind);
  return *value;
}

template <class T>
const T& GgufMetadata::as_list(std::string_view key, const char* kind) const {
  const T* value = std::get_if<T>(&as<GgufArray>(key, kind));
  GRAFT_CHECK(value != nullptr, ExitCode::kData, path_, ": metadata '", key, "' is not ", kind);
  return *value;
}

int64_t GgufMetadata::get_int(std::string_view key) const {
  return std::visit(
      [&](const auto& value) -> int64_t {
        using T = std::decay_t<decltype(value)>;
        if constexpr (kIsInteger<T>) {
          GRAFT_CHECK(std::in_range<int64_t>(value), ExitCode::kData, path_, ": metadata '", key,
                      "' = ", value, " is too large");
          return static_cast<int64_t>(value);
        } else {
          throw Error(ExitCode::kData,
                      detail::concat(path_, ": metadata '", key, "' is not an integer"));
        }
      },
      at(key));
}

double GgufMetadata::get_float(std::string_view key) const {
  if (const auto* value = std::get_if<float>(&at(key))) return *value;
  return as<double>(key, "a number with a fraction");
}

bool GgufMetadata::get_bool(std::string_view key) const { return as<bool>(key, "a bool"); }

const std::string& GgufMetadata::get_string(std::string_view key) const {
  return as<std::string>(key, "a string");
}

const std::vector<std::string>& GgufMetadata::get_strings(std::string_view key) const {
  return as_list<std::vector<std::string>>(key, "a list of strings");
}

std::vector<int64_t> GgufMetadata::get_ints(std::string_view key) const {
  return std::visit(
      [&](const auto& list) -> std::vector<int64_t> {
        if constexpr (requires { list.begin(); }) {
          using T = typename std::decay_t<decltype(list)>::value_type;
          if constexpr (kIsInteger<T>) {
            std::vector<int64_t> values;
            for (T value : list) {
              GRAFT_CHECK(std::in_range<int64_t>(value), ExitCode::kData, path_, ": metadata '",
                          key, "' holds ", value, ", which is too large");
              values.push_back(static_cast<int64_t>(value));
            }
            return values;
          }
        }
        throw Error(ExitCode::kData,
                    detail::concat(path_, ": metadata '", key, "' is not a list of integers"));
      },
      as<GgufArray>(key, "a list of integers"));
}

std::vector<float> GgufMetadata::get_floats(std::string_view key) const {
  return as_list<std::vector<float>>(key, "a list of f32");
}

}  // namespace graft::models::io
