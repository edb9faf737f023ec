#include "models/io/json_file.h"

#include <utility>
#include <vector>

#include "configs/check.h"
#include "models/io/mapped_file.h"

namespace graft::models::io {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 64;
constexpr size_t kMaxValues = 4'000'000;  // 16 bytes each once parsed

/// Builds the value from the parser's events; throws out of it at the first one we refuse. (The
/// library's own parser callback would do, but it walks the parent once a child: minutes for
/// 100,000 tensors.)
class Builder : public json::json_sax_t {
 public:
  explicit Builder(const std::string& where) : where_(where) {}
  json take() { return std::move(root_); }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(int64_t value) override { return add(value); }
  bool number_unsigned(uint64_t value) override { return add(value); }
  bool number_float(double value, const std::string& /*text*/) override { return add(value); }
  bool string(std::string& value) override { return add(std::move(value)); }
  bool binary(json::binary_t& value) override { return add(std::move(value)); }
  bool start_object(size_t /*size*/) override { return open(json::object()); }
  bool start_array(size_t /*size*/) override { return open(json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(std::string& name) override {
    GRAFT_CHECK(!open_.back()->contains(name), ExitCode::kData, where_, ": duplicate JSON key '",
                name, "'");
    key_ = std::move(name);
    return true;
  }

  bool parse_error(size_t /*position*/, const std::string& /*token*/,
                   const json::exception& error) override {
    throw Error(ExitCode::kData, where_ + ": not valid JSON: " + error.what());
  }

 private:
  json& place(json value) {
    GRAFT_CHECK(++values_ <= kMaxValues, ExitCode::kData, where_, ": more than ", kMaxValues,
                " JSON values");
    if (open_.empty()) return root_ = std::move(value);
    if (open_.back()->is_array()) return open_.back()->emplace_back(std::move(value));
    return (*open_.back())[std::move(key_)] = std::move(value);
  }
  bool add(json value) {
    place(std::move(value));
    return true;
  }
  bool open(json value) {
    open_.push_back(&place(std::move(value)));
    GRAFT_CHECK(open_.size() <= kMaxDepth, ExitCode::kData, where_, ": JSON nested more than ",
                kMaxDepth, " levels deep");
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& where_;
  json root_;
  std::vector<json*> open_;  ///< outermost first; each stays where it is while it is open
  std::string key_;          ///< of the value to come
  size_t values_ = 0;
};

}  // namespace

json parse_json(std::string_view text, const std::string& where) {
  Builder builder(where);
  json::sax_parse(text, &builder);
  return builder.take();
}

json read_json_file(const std::string& path, uint64_t max_bytes) {
  const MappedFile file(path);
  GRAFT_CHECK(file.bytes().size() <= max_bytes, ExitCode::kData, path, ": ", file.bytes().size(),
              " bytes of JSON, more than the ", max_bytes, " allowed here");
  return parse_json(file.text(), path);
}

}  // namespace graft::models::io
