#include "launcher/inspect_adapter.h"

#include <ATen/ATen.h>

#include <cmath>
#include <filesystem>

#include "configs/check.h"
#include "launcher/adapter_folder.h"
#include "launcher/evaluate.h"
#include "launcher/workbench.h"
#include "models/io/json_file.h"
#include "peft/adapter_file.h"

namespace graft::launcher {
namespace {

using at::Tensor;
using models::io::SafetensorsFile;
using Problems = std::vector<std::string>;

/// The partner of a low-rank factor: ...lora_A... of ...lora_B..., empty for any other tensor (a
/// bias stands beside lora_B alone).
std::string partner_of(const std::string& key) {
  if (key.ends_with(".bias")) return "";
  for (const auto& [a, b] :
       {std::pair{".lora_A", ".lora_B"}, std::pair{".lora_embedding_A", ".lora_embedding_B"}}) {
    for (const auto& [mine, other] : {std::pair{a, b}, std::pair{b, a}}) {
      const size_t at = key.find(mine);
      if (at != std::string::npos)
        return std::string(key).replace(at, std::string_view(mine).size(), other);
    }
  }
  return "";
}

/// Tensors that hold nothing but zeros, and low-rank products that are zero with them.
struct Zeros {
  int64_t tensors = 0, products = 0, num_products = 0;
};

/// What is wrong with an adapter's numbers.
Problems problems_of(const SafetensorsFile& file, Zeros& zeros) {
  Problems problems;
  if (file.entries().empty()) problems.emplace_back("no tensors");
  for (const auto& entry : file.entries()) {
    const std::string partner = partner_of(entry.name);
    if (!partner.empty() && file.find(partner) == nullptr)
      problems.push_back("missing: " + partner);
    const bool is_integer = entry.dtype.starts_with("I") || entry.dtype.starts_with("U");
    if (is_integer && partner.empty()) continue;  // places of a sparse delta
    if (!peft::is_adapter_dtype(entry.dtype)) {
      problems.push_back("no float: " + entry.name + " is " + entry.dtype);
      continue;
    }
    const Tensor value = file.read(entry.name).to(at::kFloat);  // as it is computed with
    if (!at::isfinite(value).all().item<bool>()) problems.push_back("not finite: " + entry.name);
    const bool is_zero = value.count_nonzero().item<int64_t>() == 0;
    const bool last_factor = entry.name.find(".lora_B.") != std::string::npos ||
                             entry.name.find(".lora_embedding_A") != std::string::npos;
    zeros.tensors += is_zero ? 1 : 0;
    zeros.num_products += last_factor ? 1 : 0;
    zeros.products += last_factor && is_zero ? 1 : 0;
  }
  return problems;
}

/// "Graft's", with its version where the file says it, or "PEFT 0.21.2".
std::string creator(const nlohmann::json& config, const nlohmann::json& own) {
  if (!own.empty()) return own.value("created_by", "graft");
  const auto version = config.find("peft_version");
  return version != config.end() && version->is_string() ? "PEFT " + version->get<std::string>()
                                                         : "PEFT, or in its layout";
}

/// Entries of the config that say something.
void add_settings(const nlohmann::json& config, Facts& facts) {
  for (const auto& [key, value] : config.items()) {
    const bool is_empty =
        value.is_null() || value == false || (value.is_structured() && value.empty());
    if (!is_empty && key != "peft_version") facts[key] = value;
  }
}

void conclude(const Problems& problems, Inspection& result) {
  if (problems.empty()) return;
  Facts all = result.sound ? Facts::array() : result.facts["health"];
  for (const std::string& problem : problems) all.push_back(problem);
  result.facts["health"] = all;
  result.sound = false;
}

/// One row of a few tokens.
models::Lane probe(const Workbench& bench) {
  constexpr int64_t kLength = 16, kStride = 37;
  models::Lane lane;
  const Tensor tokens =
      (at::arange(kLength) * kStride + 1).remainder(bench.model->info().vocab_size);
  lane.batch.tokens_BL = tokens.unsqueeze(0).to(bench.world.device);
  lane.batch.positions_BL = at::arange(kLength).unsqueeze(0).to(bench.world.device);
  lane.batch.documents_BL = at::zeros({1, kLength}, at::kLong);
  lane.batch.labels_BL = at::full({1, kLength}, -100, at::kLong).to(bench.world.device);
  lane.batch.num_tokens = kLength;
  return lane;
}

Tensor logits(Workbench& bench, Adapters adapters) {
  const models::Lane lane = probe(bench);
  models::Pass pass;
  pass.want = models::Want::kLogits;
  pass.adapters = adapters == Adapters::kOn;
  return bench.trunk->forward({&lane, 1}, pass).front().to(at::kFloat).cpu();
}

}  // namespace

Inspection inspect_adapter(const std::string& directory) {
  const nlohmann::json config = models::io::read_json_file(directory + kAdapterConfig);
  GRAFT_CHECK(config.is_object(), ExitCode::kData, directory, kAdapterConfig, ": not an object");
  const SafetensorsFile file(directory + kAdapterWeights);
  const auto own = peft::AdapterFile(directory).facts();
  Inspection result;
  Facts& facts = result.facts;
  facts["kind"] = "adapter";
  Zeros zeros;
  Problems problems = problems_of(file, zeros);
  std::string method;
  try {
    peft::method_of_directory(directory, method);
  } catch (const Error& error) {
    problems.emplace_back(error.what());
  }
  facts["method"] = method.empty() ? Facts(nullptr) : Facts(method);
  facts["created_by"] = creator(config, own);
  add_settings(config, facts);
  if (!own.empty()) facts[peft::kFactsKey] = own;
  add_tensor_facts(file.entries(), facts);
  facts["bytes"] = std::filesystem::file_size(file.path());
  facts["zero_tensors"] = zeros.tensors;
  facts["zero_products"] = zeros.products;
  if (zeros.num_products > 0 && zeros.products == zeros.num_products)
    problems.emplace_back(
        "loads without effect: every low-rank product is zero, it is not trained");
  facts["health"] =
      zeros.products == 0 ? "good" : "good; where the product is zero, nothing has been trained";
  conclude(problems, result);
  return result;
}

void inspect_on_model(const std::vector<std::string>& directories, const std::string& model,
                      Inspection& inspection) {
  const at::NoGradGuard no_grad;
  Problems problems;
  Facts facts{{"model", model}};
  Run run;
  run.model.name_or_path = model;
  run.model.any_base = true;  // compared below, where it is one finding of several
  run.model.adapters.values = directories;
  World world = join_world({}, nullptr, run.parallel);
  try {
    Workbench bench = build_workbench(world, run);
    facts["base_fingerprint"] = bench.fingerprint;
    try {
      bench.adapters->check_fingerprints([&] { return bench.fingerprint; });
    } catch (const Error& error) {
      problems.emplace_back(error.what());
    }
    const Tensor with = logits(bench, Adapters::kOn), without = logits(bench, Adapters::kOff);
    const double change = (with - without).abs().max().item<double>();
    facts["largest_change_of_a_logit"] = change;
    if (!std::isfinite(change)) problems.emplace_back("the logits with it are not finite");
    if (change == 0) problems.emplace_back("loads without effect: the logits are the base's");
  } catch (const Error& error) {
    if (error.code() != ExitCode::kData) throw;
    problems.emplace_back(error.what());
  }
  inspection.facts["on_model"] = facts;
  conclude(problems, inspection);
}

}  // namespace graft::launcher
