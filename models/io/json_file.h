// JSON from files we did not write: config.json, adapter_config.json, index files, safetensors
// headers. What a plain parser lets through and we do not: duplicate keys (two readers would see
// two files), deep nesting, giant value counts, numbers that do not fit.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace graft::models::io {

/// @param where  the file, for messages
/// @throws graft::Error (kData) on anything but one well-formed UTF-8 JSON value with unique keys,
/// at most 64 levels
///         and 4 million values
nlohmann::json parse_json(std::string_view text, const std::string& where);

/// The whole file as JSON. @throws graft::Error (kData) also if it is larger than max_bytes
nlohmann::json read_json_file(const std::string& path, uint64_t max_bytes = 16u << 20);

}  // namespace graft::models::io
