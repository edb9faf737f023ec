#include "peft/adapter_file.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <span>

#include "configs/check.h"
#include "models/io/json_file.h"
#include "models/io/mapped_file.h"

namespace graft::peft {
namespace {

constexpr const char* kConfigFile = "/adapter_config.json";
constexpr const char* kWeightsFile = "/adapter_model.safetensors";
const std::string kOverTheBase = "not the base's matrix, and PEFT would load it over that: ";
constexpr std::string_view kFloats[] = {"F64", "F32", "BF16", "F16"};
constexpr std::string_view kIntegers[] = {"I64", "I32", "I16", "I8", "U8"};
constexpr size_t kMostEntries = 10'000;  // an ordered object takes time quadratic in its entries
constexpr size_t kLongestName = 512;
constexpr size_t kMostProblems = 20;  // printed

void check_entries(const nlohmann::json& value, const std::string& path) {
  GRAFT_CHECK(value.size() <= kMostEntries, ExitCode::kData, path, ": ", value.size(),
              " entries in one list, more than ", kMostEntries);
  if (!value.is_structured()) return;
  for (const nlohmann::json& item : value) check_entries(item, path);
}

std::span<const std::string_view> dtypes_for(const Tensor& like) {
  return like.is_floating_point() ? std::span<const std::string_view>(kFloats) : kIntegers;
}

bool is_among(std::string_view dtype, std::span<const std::string_view> dtypes) {
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
}

bool is_text_list(const nlohmann::json& value) {
  return value.is_array() &&
         std::all_of(value.begin(), value.end(), [](const auto& item) { return item.is_string(); });
}

/// Whether what is wanted can hold these numbers: they are finite in float32, or stay what they
/// are.
bool fits(const Tensor& value, const Tensor& like) {
  if (like.is_floating_point()) return at::isfinite(value.to(at::kFloat)).all().item<bool>();
  return at::equal(value.to(like.scalar_type()).to(at::kLong), value.to(at::kLong));
}

std::string copy_key(const LinearSite& site) {
  return std::string(kFilePrefix) + site.hf_path + std::string(kBaseCopy);
}

/// The copy may have been taken from the base in another precision.
bool is_rounding(const Tensor& exact, const Tensor& rounded) {
  for (const auto type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    if (at::equal(exact.to(type).to(at::kFloat), rounded)) return true;
  }
  return false;
}

}  // namespace

bool is_adapter_dtype(std::string_view dtype) { return is_among(dtype, kFloats); }

SavedAdapter read_saved_adapter(const std::string& directory) {
  const std::string path = directory + kConfigFile;
  GRAFT_CHECK(std::filesystem::exists(path), ExitCode::kData, directory, ": no ",
              std::string_view(kConfigFile).substr(1),
              "; expected an adapter folder in PEFT's layout");
  const nlohmann::json checked = models::io::read_json_file(path);
  GRAFT_CHECK(checked.is_object(), ExitCode::kData, path, ": not an object");
  check_entries(checked, path);
  SavedAdapter adapter;
  adapter.config = nlohmann::ordered_json::parse(models::io::MappedFile(path).text());
  const AdapterFile file(directory);
  adapter.tensors = file.names();
  adapter.facts = file.facts();
  return adapter;
}

AdapterFile::AdapterFile(const std::string& directory) : file_(directory + kWeightsFile) {
  for (const auto& entry : file_.entries()) {
    GRAFT_CHECK(entry.name.size() <= kLongestName, ExitCode::kData, file_.path(), ": the name '",
                entry.name.substr(0, kLongestName), "...' is too long");
  }
}

std::vector<std::string> AdapterFile::names() const {
  std::vector<std::string> names;
  for (const auto& entry : file_.entries()) names.push_back(entry.name);
  return names;
}

nlohmann::json AdapterFile::facts() const {
  const auto found = file_.metadata().find(kFactsKey);
  if (found == file_.metadata().end()) return nlohmann::json::object();
  const std::string where = file_.path() + ": the metadata's entry " + kFactsKey;
  auto facts = models::io::parse_json(found->second, where);
  GRAFT_CHECK(facts.is_object(), ExitCode::kData, where, " is no object");
  if (!facts.contains("method")) return nlohmann::json::object();  // not what Graft writes
  for (const auto& [key, value] : facts.items()) {
    const bool is_text = key == "method" || key == "base_fingerprint" || key == "created_by";
    GRAFT_CHECK(!is_text || value.is_string(), ExitCode::kData, where, ": ", key,
                " is no text but of the type ", value.type_name());
    GRAFT_CHECK(key != "labels" || is_text_list(value), ExitCode::kData, where,
                ": labels is no list of texts");
  }
  return facts;
}

bool AdapterFile::has_base_copies() const {
  return std::any_of(file_.entries().begin(), file_.entries().end(),
                     [](const auto& entry) { return entry.name.ends_with(kBaseCopy); });
}

void AdapterFile::check_modules(const SlotMap& slots) const {
  GRAFT_CHECK(!file_.entries().empty(), ExitCode::kData, file_.path(),
              ": holds no tensors, so the model would stay as it is; was the file cut?");
  std::map<std::string_view, int> layers;
  std::set<std::string_view> around;  // "model.layers.3.self_attn": LLaMA-Adapter's tensors
  for (const auto* sites : {&slots.linears, &slots.gains}) {
    for (const LinearSite& site : *sites) {
      layers[site.hf_path] = site.layer;
      if (site.role.starts_with("attn."))
        around.insert(std::string_view(site.hf_path).substr(0, site.hf_path.rfind('.')));
    }
  }
  std::vector<std::string> problems;
  for (const auto& entry : file_.entries()) {
    std::string_view module = entry.name;
    if (!module.starts_with(kFilePrefix)) continue;  // a name of ours, compared when it is read
    module.remove_prefix(kFilePrefix.size());
    if (around.contains(module.substr(0, module.rfind('.')))) continue;
    module = module_around(module, layers);
    if (module.empty()) {
      problems.push_back("unknown: " + entry.name);
    } else if (entry.name.ends_with(kBaseCopy) && layers.at(module) >= 0) {
      problems.push_back(kOverTheBase + entry.name);
    }
  }
  refuse(problems);
}

std::vector<Tensor> AdapterFile::read(const std::vector<Param>& params,
                                      const std::vector<Constant>& constants) const {
  std::vector<std::string> problems;
  std::set<std::string, std::less<>> wanted;
  std::vector<Tensor> values;
  const auto read_one = [&](const std::string& key, const Tensor& like, at::IntArrayRef shape,
                            bool may_be_left_out) {
    wanted.insert(key);
    values.emplace_back();
    const auto* entry = file_.find(key);
    if (entry == nullptr) {
      if (!may_be_left_out) problems.push_back("missing: " + key);
    } else if (entry->shape != shape) {
      problems.push_back(detail::concat("shape: ", key, " is ", at::IntArrayRef(entry->shape),
                                        ", expected ", shape));
    } else if (const auto dtypes = dtypes_for(like); !is_among(entry->dtype, dtypes)) {
      problems.push_back("dtype: " + key + " is " + entry->dtype + ", expected " +
                         configs::join({dtypes.begin(), dtypes.end()}, ", "));
    } else {
      values.back() = file_.read(key);
      if (!fits(values.back(), like))
        problems.push_back((like.is_floating_point() ? "not finite: " : "out of range: ") + key);
    }
  };
  for (const Param& param : params) {
    const bool thawed = param.thawed != nullptr;
    const Tensor like = thawed ? param.value : param.saved();
    read_one(param.hf_key, like, thawed ? param.thawed->shape() : like.sizes(),
             !thawed && like.numel() == 0);
    if (thawed) values.back() = Tensor();
  }
  for (const Constant& constant : constants)
    read_one(constant.hf_key, constant.value, constant.value.sizes(), constant.may_be_left_out);
  for (const auto& entry : file_.entries()) {
    if (!wanted.contains(entry.name) && !entry.name.ends_with(kBaseCopy))
      problems.push_back("unknown: " + entry.name);
  }
  refuse(problems);
  return values;
}

void AdapterFile::check_base_copies(const SlotMap& slots, BaseWeights& base) const {
  std::set<std::string, std::less<>> equal;
  std::vector<std::string> problems;
  for (const LinearSite& site : slots.linears) {
    const auto* entry = file_.find(copy_key(site));
    if (entry == nullptr || site.layer >= 0 || !is_adapter_dtype(entry->dtype)) continue;
    const Tensor frozen = base.weight(site).cpu();
    if (entry->shape != frozen.sizes()) continue;
    const Tensor copy = file_.read(entry->name).to(at::kFloat);
    if (is_rounding(frozen, copy) || is_rounding(copy, frozen)) equal.insert(entry->name);
  }
  for (const auto& entry : file_.entries()) {
    if (entry.name.ends_with(kBaseCopy) && !equal.contains(entry.name)) {
      problems.push_back(kOverTheBase + entry.name);
    }
  }
  refuse(problems);
}

void AdapterFile::refuse(const std::vector<std::string>& problems) const {
  const auto end =
      problems.begin() + static_cast<std::ptrdiff_t>(std::min(problems.size(), kMostProblems));
  GRAFT_CHECK(problems.empty(), ExitCode::kData, file_.path(), " does not fit this model:\n  ",
              configs::join({problems.begin(), end}, "\n  "),
              end == problems.end()
                  ? ""
                  : detail::concat("\n  and ", problems.size() - kMostProblems, " more"));
}

}  // namespace graft::peft
