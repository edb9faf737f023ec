// Bottleneck adapters, MAM, prefixes and prompts against AdapterHub's `adapters`: its values set in
// ours give its logits, loss and gradients. tests/oracle/adapter_hub.py writes them into
// GRAFT_ORACLE_DIR/adapter_hub, and says which bases they are of.
#include <gtest/gtest.h>

#include <cstdlib>
#include <regex>

#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

using models::io::SafetensorsFile;

constexpr double kTolerance = 1e-5;          ///< of the largest logit, and of the loss
constexpr double kGradientTolerance = 1e-4;  ///< of a tensor's largest element

std::string oracle_root() {
  const char* root = std::getenv("GRAFT_ORACLE_DIR");
  return root == nullptr ? "" : root;
}

struct HubCase {
  const char *name, *base, *method, *options;
};
void PrintTo(const HubCase& c, std::ostream* out) { *out << c.name; }

// A decoder of `adapters` has the raw tap, and prefixes in front of position 0.
const HubCase kCases[] = {
    {"houlsby", "llama_tied", "bottleneck", "{reduction_factor: 8}"},
    {"pfeiffer", "llama_tied", "bottleneck",
     "{sites: [block], reduction_factor: 8, non_linearity: relu}"},
    {"leave_out", "llama_tied", "bottleneck",
     "{sites: [block], reduction_factor: 8, non_linearity: relu, leave_out: [0]}"},
    {"parallel", "llama_tied", "bottleneck",
     "{sites: [mlp], form: parallel, tap: raw, reduction_factor: 2, non_linearity: relu}"},
    {"scaled_parallel", "llama_tied", "bottleneck",
     "{sites: [mlp], form: parallel, tap: raw, reduction_factor: 2, non_linearity: relu, scaling: "
     "4}"},
    {"learned_parallel", "llama_tied", "bottleneck",
     "{sites: [mlp], form: parallel, tap: raw, reduction_factor: 2, non_linearity: relu, "
     "learn_scaling: true}"},
    {"prefix", "llama_heads", "prefix_tuning",
     "{num_virtual_tokens: 5, prefix_projection: true, encoder_hidden_size: 24, shift_positions: "
     "false}"},
    {"prefix_flat", "llama_square", "prefix_tuning",
     "{num_virtual_tokens: 5, shift_positions: false}"},
    {"mam", "llama_heads", "mam",
     "{prefix_tuning: {num_virtual_tokens: 5, encoder_hidden_size: 24, shift_positions: false}, "
     "bottleneck: {tap: raw}}"},
    {"prompt", "llama_tied", "prompt_tuning", "{num_virtual_tokens: 5}"},
};

/// Their name of a parameter of ours.
std::string their_name(std::string name, bool flat) {
  const std::string prefix =
      "model.layers.0.self_attn.prefix_tuning.pool.prefix_tunings.a.self_prefix.";
  const std::pair<const char*, std::string> rules[] = {
      {R"(^0\.(bottleneck\.|prefix_tuning\.)?)", ""},
      {R"(^block\.(\d+)\.attn\.)", "model.layers.$1.attention_adapters.adapters.a."},
      {R"(^block\.(\d+)(\.mlp)?\.)", "model.layers.$1.output_adapters.adapters.a."},
      {"down_", "adapter_down.0."},
      {"up_", "adapter_up."},
      {R"(^prompt\.table$)", prefix + (flat ? "control_trans" : "wte.weight")},
      {R"(^prompt\.transform\.)", prefix + "control_trans."}};
  for (const auto& [pattern, replacement] : rules)
    name = std::regex_replace(name, std::regex(pattern), replacement);
  return name;
}

class AdapterHubOracle : public testing::TestWithParam<HubCase> {
 protected:
  void SetUp() override {
    if (oracle_root().empty()) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
  }
  std::string their_name(const Param& param) const {
    const std::string name = GetParam().name;
    if (name == "prompt") return "prompt.prompt_embedding.weight";
    return peft::their_name(param.name, name == "prefix_flat");
  }
  /// With their values.
  std::unique_ptr<Tiny> make(const SafetensorsFile& theirs, const std::string& options) const {
    auto tiny = std::make_unique<Tiny>(
        models::read_base_config(oracle_root() + "/" + GetParam().base + "/model"));
    std::shared_ptr<Method> method = methods().make(GetParam().method);
    read_fields(*method, options);
    tiny->attach(GetParam().method, method);
    models::LoadOptions unquantised;
    unquantised.quantization = models::Quantization::kNone;
    tiny->load(unquantised);
    const at::NoGradGuard no_grad;
    for (const Param& param : tiny->params()) {
      const Tensor value = theirs.read("value." + their_name(param));
      Tensor(param.value).copy_(value.view(param.value.sizes()));
    }
    return tiny;
  }
  SafetensorsFile theirs() const {
    return SafetensorsFile(oracle_root() + "/adapter_hub/" + GetParam().name + ".safetensors");
  }
  data::Batch batch() const {
    const SafetensorsFile rows(oracle_root() + "/llama_tied/oracle.safetensors");
    return make_batch(rows.read("input_ids"), rows.read("labels"));
  }
  static double largest(const Tensor& t) { return t.abs().max().item<double>(); }
  static void expect_close(const Tensor& ours, const Tensor& expected, const std::string& what,
                           double allowed) {
    ASSERT_EQ(ours.numel(), expected.numel()) << what;
    EXPECT_LE(largest(ours - expected.view(ours.sizes())), allowed)
        << what << ", largest " << largest(expected);
  }
};

TEST_P(AdapterHubOracle, ItsValuesGiveItsLogitsLossAndGradients) {
  const SafetensorsFile hub = theirs();
  const auto tiny = make(hub, GetParam().options);
  const Tensor logits = hub.read("logits");
  expect_close(tiny->logits(batch()), logits, "logits", kTolerance * largest(logits));
  tiny->training = false;
  const auto [loss, gradients] = tiny->sweep({{batch(), 0}}, 1);
  const double expected_loss = hub.read("loss").item<double>();
  EXPECT_NEAR(loss, expected_loss, kTolerance * expected_loss);
  size_t count = 0;
  double size = 0;
  for (const auto& entry : hub.entries()) {
    if (!entry.name.starts_with("grad.")) continue;
    ++count;
    size = std::max(size, largest(hub.read(entry.name)));
  }
  ASSERT_EQ(gradients.size(), count) << "what is trained";
  for (size_t i = 0; i < count; ++i) {
    const std::string name = their_name(tiny->params()[i]);
    const Tensor expected = hub.read("grad." + name);
    expect_close(gradients[i], expected, "gradient of " + name,
                 kGradientTolerance * std::max(largest(expected), 1e-3 * size));
  }
}

TEST_P(AdapterHubOracle, SkippedLayersAreItsSkippedLayers) {
  const SafetensorsFile hub = theirs();
  if (hub.find("skip_logits") == nullptr) GTEST_SKIP() << "it skips bottleneck adapters only";
  std::string options = GetParam().options;
  options.insert(1, "skip_layers: [0], ");
  const Tensor logits = hub.read("skip_logits");
  expect_close(make(hub, options)->logits(batch()), logits, "logits", kTolerance * largest(logits));
}

INSTANTIATE_TEST_SUITE_P(Cases, AdapterHubOracle, testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(AdapterHubOracleFiles, HaveACaseHereEach) {
  if (oracle_root().empty()) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
  std::set<std::string> files, cases;
  for (const auto& file : std::filesystem::directory_iterator(oracle_root() + "/adapter_hub"))
    files.insert(file.path().stem());
  for (const HubCase& c : kCases) cases.insert(c.name);
  EXPECT_EQ(files, cases);
}

}  // namespace
}  // namespace graft::peft
