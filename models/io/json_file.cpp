#include "models/io/json_file.h"

#include <unordered_set>
#include <vector>

#include "configs/check.h"
#include "models/io/mapped_file.h"

namespace graft::models::io {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 64;
constexpr size_t kMaxValues = 4'000'000;  // 16 bytes each once parsed

/// Watches the parser's events; throws out of it at the first one we refuse.
class Guard {
 public:
  explicit Guard(const std::string& where) : where_(where) {}

  bool operator()(int /*depth*/, json::parse_event_t event, const json& value) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        open_.emplace_back();
        GRAFT_CHECK(open_.size() <= kMaxDepth, ExitCode::kData, where_, ": JSON nested more than ",
                    kMaxDepth, " levels deep");
        [[fallthrough]];
      case json::parse_event_t::value:
        GRAFT_CHECK(++values_ <= kMaxValues, ExitCode::kData, where_, ": more than ", kMaxValues,
                    " JSON values");
        break;
      case json::parse_event_t::key: {
        const auto& key = value.get_ref<const std::string&>();
        GRAFT_CHECK(open_.back().insert(key).second, ExitCode::kData, where_,
                    ": duplicate JSON key '", key, "'");
        break;
      }
      case json::parse_event_t::object_end:
      case json::parse_event_t::array_end:
        open_.pop_back();
        break;
    }
    return true;
  }

 private:
  const std::string& where_;
  std::vector<std::unordered_set<std::string>> open_;  ///< the keys so far of each open object
  size_t values_ = 0;
};

}  // namespace

json parse_json(std::string_view text, const std::string& where) {
  Guard guard(where);
  try {
    return json::parse(text, [&](int depth, json::parse_event_t event, json& value) {
      return guard(depth, event, value);
    });
  } catch (const json::exception& error) {
    throw Error(ExitCode::kData, where + ": not valid JSON: " + error.what());
  }
}

json read_json_file(const std::string& path, uint64_t max_bytes) {
  const MappedFile file(path);
  GRAFT_CHECK(file.bytes().size() <= max_bytes, ExitCode::kData, path, ": ", file.bytes().size(),
              " bytes of JSON, more than the ", max_bytes, " allowed here");
  return parse_json(file.text(), path);
}

}  // namespace graft::models::io
