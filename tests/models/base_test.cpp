// models/base: what a folder's or a GGUF file's own words make of the config, and what is refused
// because it would be computed wrongly.
#include "models/base.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "dist/comm_factory.h"

#include "models/io/gguf_writer.h"
#include "models/io/open_source.h"
#include "models/io/safetensors.h"
#include "models/match.h"
#include "tests/models/io_testing.h"
#include "tests/testing.h"

namespace graft::models {
namespace {

using io::expect_refused;
using io::GgufValue;
using io::TestFolder;
using testing::tiny_llama;

/// A folder with the tiny model, its head tied by the config, and this head in its file.
void write_tied_model(const TestFolder& folder, const Tensor& head) {
  folder.write("config.json", tiny_llama(1, true).dump());
  io::NamedTensors tensors = {{kHeadTensor, head}};
  for (const auto& item : testing::golden_weights(*make_model(tiny_llama(1, true))))
    tensors.push_back(item);
  io::write_safetensors(folder.path() + "/model.safetensors", tensors, {});
}

TEST(BaseConfig, AHeadThatEqualsTheTiedTableIsDropped) {
  const TestFolder folder;
  write_tied_model(folder, testing::golden_weight(kEmbeddingTensor, {128, 48}));
  const auto config = read_base_config(folder.path());
  EXPECT_EQ(config["tie_word_embeddings"], true);
  const auto model = make_model(config);
  for (const MatchedWeight& item : match_weights(*model, *io::open_source(folder.path())))
    EXPECT_NE(item.source->name, kHeadTensor);
}

TEST(BaseConfig, AHeadThatDiffersFromTheTiedTableIsTheModels) {
  const TestFolder folder;
  write_tied_model(folder, testing::golden_weight(kHeadTensor, {128, 48}));
  const auto config = read_base_config(folder.path());
  EXPECT_EQ(config["tie_word_embeddings"], false);
  const auto comm = dist::make_single_comm();
  const auto source = io::open_source(folder.path());
  const data::Batch batch = testing::batch_of(testing::random_tokens(1, 8, 128, 1));
  EXPECT_TRUE(at::equal(testing::Base(config, *source, *comm).logits(batch),
                        testing::Base(tiny_llama(1, false), *comm).logits(batch)));
}

TEST(BaseConfig, RefusesJsonThatIsNoConfig) {
  const TestFolder folder;
  for (const char* text : {"[]", "3", "null", "\"llama\""}) {
    folder.write("config.json", text);
    expect_refused([&] { read_base_config(folder.path()); }, "expected a JSON object");
  }
  for (const char* text : {R"({"model_type":3})", R"({"model_type":null})", "{}", "[]"}) {
    expect_refused([&] { make_model(nlohmann::json::parse(text)); }, "model_type");
  }
}

/// The config of a GGUF file of the tiny model with these hyperparameters besides.
nlohmann::json gguf_config(const std::vector<std::pair<std::string, GgufValue>>& more,
                           const std::string& arch = "llama") {
  std::vector<std::pair<std::string, GgufValue>> metadata = {
      {"general.architecture", arch},
      {arch + ".embedding_length", uint32_t{48}},
      {arch + ".block_count", uint32_t{2}},
      {arch + ".feed_forward_length", uint32_t{80}},
      {arch + ".context_length", uint32_t{64}},
      {arch + ".attention.head_count", uint32_t{3}},
      {arch + ".attention.layer_norm_rms_epsilon", 1e-5F},
  };
  for (const auto& [name, value] : more) metadata.emplace_back(arch + "." + name, value);
  const TestFolder folder;
  const std::string path = folder.path() + "/m.gguf";
  io::write_gguf(path, metadata, {{"token_embd.weight", at::zeros({128, 48})}});
  return read_base_config(path);
}

TEST(GgufConfig, AcceptsHyperparametersThatSayWhatIsComputedAnyway) {
  const auto config = gguf_config({{"rope.dimension_count", uint32_t{16}},
                                   {"attention.value_length", uint32_t{16}},
                                   {"attention.scale", 0.25F},
                                   {"attention.causal", true},
                                   {"attention.clamp_kqv", 0.0F},
                                   {"logit_scale", 1.0F},
                                   {"expert_count", uint32_t{0}},
                                   {"vocab_size", uint32_t{128}},
                                   {"tensor_data_layout", std::string("Meta AI original pth")}});
  EXPECT_EQ(config["head_dim"], 16);
  EXPECT_EQ(config["model_type"], "llama");
}

TEST(GgufConfig, RefusesHyperparametersThatWouldChangeTheResult) {
  const std::vector<std::pair<std::string, GgufValue>> mistakes = {
      {"rope.dimension_count", uint32_t{8}},
      {"rope.scaling.attn_factor", 1.5F},
      {"rope.scaling.yarn_beta_fast", 16.0F},
      {"attention.scale", 0.5F},
      {"attention.value_length", uint32_t{8}},
      {"attention.causal", false},
      {"attention.clamp_kqv", 8.0F},
      {"logit_scale", 2.0F},
      {"embedding_scale", 12.0F},
      {"residual_scale", 0.2F},
      {"expert_count", uint32_t{8}},
      {"something.new", uint32_t{1}},
      {"something.else", std::string("text")},
      {"rope.dimension_sections", io::GgufArray(std::vector<int32_t>{8, 4, 4, 0})}};
  for (const auto& mistake : mistakes) {
    expect_refused([&] { gguf_config({mistake}); }, "llama." + mistake.first);
  }
  expect_refused(
      [&] {
        gguf_config({{"attention.sliding_window", uint32_t{8}}}, "qwen2");
      },
      "qwen2.attention.sliding_window");
}

TEST(GgufConfig, AWindowMakesALlamaFileAMistral) {
  const auto config = gguf_config({{"attention.sliding_window", uint32_t{8}}});
  EXPECT_EQ(config["model_type"], "mistral");
  EXPECT_EQ(config["sliding_window"], 8);
}

TEST(GgufConfig, AFactorWithoutATypeScalesLinearly) {
  for (const char* key : {"rope.scale_linear", "rope.scaling.factor"}) {
    const auto rope = gguf_config({{key, 2.0F}})["rope_parameters"];
    EXPECT_EQ(rope["rope_type"], "linear") << key;
    EXPECT_EQ(rope["factor"], 2.0) << key;
  }
  const auto none = gguf_config({{"rope.scaling.type", std::string("none")},
                                 {"rope.scaling.factor", 2.0F}})["rope_parameters"];
  EXPECT_EQ(none["rope_type"], "default");
}

}  // namespace
}  // namespace graft::models
