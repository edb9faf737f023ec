// Soft prompts where they could go wrong beside the contract: rows in packed documents, a prompt
// that is text, generation with a key/value cache, files without the encoder.
#include <gtest/gtest.h>

#include <cmath>

#include "models/nn/sequence.h"
#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

/// Two rows of 8: documents of 3 and 4 and a place of padding; padding, then one document of 7.
data::Batch packed() {
  const Tensor tokens = (at::arange(16) * 37 + 11).remainder(127).reshape({2, 8});
  data::Batch batch = make_batch(tokens, tokens);
  const auto rows = [](std::vector<int64_t> v) { return at::tensor(v).reshape({2, 8}); };
  batch.documents_BL = rows({0, 0, 0, 1, 1, 1, 1, -1, -1, 2, 2, 2, 2, 2, 2, 2});
  batch.positions_BL = rows({0, 1, 2, 0, 1, 2, 3, 0, 0, 0, 1, 2, 3, 4, 5, 6});
  return batch;
}

data::Batch alone(const data::Batch& batch, const models::Document& d) {
  const Tensor tokens = batch.tokens_BL.slice(0, d.row, d.row + 1).slice(1, d.begin, d.end);
  return make_batch(tokens, tokens);
}

double difference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  return (a - b).abs().max().item<double>();
}

TEST(PutBeforeDocuments, EachDocumentGetsTheRowsAndItsTokensCountOn) {
  const data::Batch batch = packed();
  const models::Carry carry{{fill("h", {2, 8, 4}, 1)},
                            std::make_shared<const models::Sequence>(models::make_sequence(batch))};
  const Tensor prompt = fill("prompt", {2, 4}, 1);
  const models::Carry out = models::put_before_documents(carry, prompt);
  EXPECT_EQ(out.h().sizes(), (at::IntArrayRef{2, 12, 4}));
  EXPECT_TRUE(at::equal(models::at_tokens(out), carry.h()));
  const auto& before = carry.sequence->documents;
  const auto& after = out.sequence->documents;
  ASSERT_EQ(after.size(), before.size());
  EXPECT_FALSE(out.sequence->whole_rows);
  for (size_t d = 0; d < after.size(); ++d) {
    EXPECT_EQ(after[d].row, before[d].row);
    const auto part = [](const Tensor& t, const models::Document& x) {
      return t[x.row].slice(0, x.begin, x.end);
    };
    const Tensor expected = at::cat({prompt, part(carry.h(), before[d])});
    EXPECT_TRUE(at::equal(part(out.h(), after[d]), expected)) << d;
    EXPECT_TRUE(at::equal(part(out.sequence->positions_BL, after[d]),
                          at::arange(after[d].end - after[d].begin)))
        << d;
  }
  EXPECT_EQ(out.h()[1].slice(0, 10).abs().max().item<float>(), 0) << "what fills up the rows";
  const models::Carry twice = models::put_before_documents(out, prompt);
  EXPECT_TRUE(at::equal(models::at_tokens(twice), carry.h()));
}

TEST(PutBeforeDocuments, ARowThatIsOneDocumentStaysOne) {
  const models::Lane lane = make_lane(0);
  const models::Carry carry{
      {fill("h", {2, 12, 4}, 1)},
      std::make_shared<const models::Sequence>(models::make_sequence(lane.batch))};
  const models::Carry out = models::put_before_documents(carry, fill("prompt", {3, 4}, 1));
  EXPECT_TRUE(out.sequence->whole_rows);
  EXPECT_EQ(out.h().size(1), 15);
  EXPECT_TRUE(at::equal(out.sequence->positions_BL[1], at::arange(15)));
  EXPECT_TRUE(
      at::equal(models::shift_positions(carry, 3).sequence->positions_BL[0], at::arange(3, 15)));
}

TEST(PromptTuning, APromptThatIsTextGivesThatTextsLogits) {
  OneSlot one("prompt_tuning", "{num_virtual_tokens: 4}");
  const data::Batch whole = make_lane(0).batch;
  const Tensor rest = whole.tokens_BL.slice(1, 4);
  const Tensor embedding = fill("model.embed_tokens.weight", {128, 48}, 1);
  const at::NoGradGuard no_grad;
  for (int64_t row = 0; row < 2; ++row) {
    Tensor(one.tiny.params()[0].value)
        .copy_(embedding.index_select(0, whole.tokens_BL[row].slice(0, 0, 4)));
    const Tensor tokens = rest.slice(0, row, row + 1);
    const Tensor expected = one.tiny.logits(whole, false)[row].slice(0, 4);
    EXPECT_LT(difference(one.tiny.logits(make_batch(tokens, tokens))[0], expected), 1e-4);
  }
}

class SoftPrompts : public testing::TestWithParam<std::pair<const char*, const char*>> {
 protected:
  OneSlot one_on(const char* model) const {
    return OneSlot(GetParam().first, GetParam().second, model);
  }
};

TEST_P(SoftPrompts, PackedDocumentsEqualEachAlone) {
  for (const char* model : {"llama", "mistral"}) {
    OneSlot one = one_on(model);
    const data::Batch batch = packed();
    const Tensor logits = one.tiny.logits(batch);
    for (const models::Document& d : models::make_sequence(batch).documents) {
      EXPECT_LT(
          difference(logits[d.row].slice(0, d.begin, d.end), one.tiny.logits(alone(batch, d))[0]),
          1e-4)
          << model << " row " << d.row << " at " << d.begin;
    }
  }
}

TEST_P(SoftPrompts, CachedKeysGiveTheLogitsOfTheWholeRow) {
  for (const char* model : {"llama", "mistral"}) {
    OneSlot one = one_on(model);
    const Tensor tokens = make_lane(0).batch.tokens_BL.slice(0, 0, 1);
    const Tensor expected = one.tiny.logits(make_batch(tokens, tokens));
    models::KvCache cache;
    models::Pass pass;
    pass.want = models::Want::kLastLogits;
    pass.cache = &cache;
    for (int64_t begin = 0, end = 7; begin < 12; begin = end, ++end) {
      const Tensor part = tokens.slice(1, begin, end);
      models::Lane lane{make_batch(part, part), 0};
      lane.batch.positions_BL += begin;
      const Tensor last = one.tiny.trunk->forward({&lane, 1}, pass).front();
      EXPECT_LT(difference(last[0][0], expected[0][end - 1]), 1e-4) << model << " at " << end - 1;
    }
  }
}

TEST_P(SoftPrompts, ADirectoryWithoutTheEncoderHasTheSameLogits) {
  OneSlot one = one_on("llama");
  const Peft::Saved saved = one.tiny.adapters.save(0, {"base", "CAUSAL_LM", "print"});
  models::io::NamedTensors peft;  // what PEFT would write
  for (const auto& [key, value] : saved.tensors) {
    if (!key.starts_with("prompt_encoder.")) peft.emplace_back(key, value);
  }
  const TestFolder folder;
  Tiny::write_adapter(folder.path(), saved.config, peft);
  Tiny frozen("llama");
  frozen.adapters.attach_frozen(folder.path());
  models::LoadOptions unquantised;
  unquantised.quantization = models::Quantization::kNone;
  frozen.load(unquantised);
  const data::Batch batch = make_lane(0).batch;
  EXPECT_LT(difference(frozen.logits(batch), one.tiny.logits(batch)), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(
    Methods, SoftPrompts,
    testing::Values(std::pair{"prompt_tuning", "{num_virtual_tokens: 3}"},
                    std::pair{"p_tuning", "{num_virtual_tokens: 3}"},
                    std::pair{"prefix_tuning", "{num_virtual_tokens: 3}"},
                    std::pair{"prefix_tuning", "{num_virtual_tokens: 2, prefix_projection: true}"},
                    std::pair{"llama_adapter", "{adapter_len: 3, adapter_layers: 1}"}),
    [](const auto& info) { return info.param.first + std::to_string(info.index); });

/// A directory as PEFT writes it, of what `method` has learnt.
void write_flat(const std::string& directory, const std::string& method,
                const std::string& options) {
  const OneSlot one(method, options);
  const Peft::Saved saved = one.tiny.adapters.save(0, {"base", "CAUSAL_LM", "print"});
  models::io::NamedTensors rows;
  for (const auto& [key, value] : saved.tensors) {
    if (!key.starts_with("prompt_encoder.")) rows.emplace_back(key, value);
  }
  Tiny::write_adapter(directory, saved.config, rows);
}

TEST(SoftPromptFromPeft, IsTrainedOnAsItIsWhateverTheRunsEncoder) {
  for (const auto& [method, options] :
       {std::pair{"p_tuning", "{num_virtual_tokens: 3}"},
        std::pair{"p_tuning", "{num_virtual_tokens: 3, encoder_reparameterization_type: LSTM}"},
        std::pair{"prefix_tuning", "{num_virtual_tokens: 3, prefix_projection: true}"}}) {
    const TestFolder folder;
    write_flat(folder.path(), method, options);
    Tiny alone("llama"), with_method("llama");
    alone.attach("", nullptr, folder.path());
    std::shared_ptr<Method> entry = methods().make(method);
    read_fields(*entry, options);
    with_method.attach(method, entry, folder.path());
    alone.load(), with_method.load();
    ASSERT_EQ(with_method.params().size(), 1) << options;
    EXPECT_EQ(with_method.adapters.params().hash(), alone.adapters.params().hash()) << options;
    EXPECT_EQ(with_method.step({make_lane(0)}, 1), alone.step({make_lane(0)}, 1)) << options;
  }
}

constexpr const char* kLstm =
    "{num_virtual_tokens: 6, encoder_hidden_size: 8, encoder_reparameterization_type: LSTM,"
    " encoder_num_layers: 3, encoder_dropout: 0.5}";

TEST(PTuningLstm, StartsAsPyTorchsLstm) {
  Tiny tiny("llama");
  std::shared_ptr<Method> method = methods().make("p_tuning");
  read_fields(*method, kLstm);
  tiny.attach("p_tuning", method);
  tiny.load();
  const double bound = 1 / std::sqrt(8.0);
  int count = 0;
  for (const Param& p : tiny.params()) {
    if (p.name.find("lstm_head") == std::string::npos) continue;
    ++count;
    const double largest = p.value.detach().abs().max().item<double>();
    EXPECT_LE(largest, bound) << p.name;
    EXPECT_GT(largest, 0.8 * bound) << p.name;
  }
  EXPECT_EQ(count, 3 * 2 * 4);
}

TEST(PTuningLstm, DropsAsThePassSaysAndNothingWhenNotTraining) {
  OneSlot one("p_tuning", kLstm);
  const auto& input = one.tiny.adapters.slots().sequences.front();
  ASSERT_EQ(input.name, "input");
  const models::Lane lane = make_lane(0);
  const models::Carry carry{
      {fill("h", {2, 12, 48}, 1)},
      std::make_shared<const models::Sequence>(models::make_sequence(lane.batch))};
  const auto rows = [&](bool training, uint64_t number) {
    models::Pass pass;
    pass.training = training;
    pass.random = {7, number};
    return input.slot->adapters()[0]->edit(carry, pass).h()[0].slice(0, 0, 6).detach();
  };
  EXPECT_TRUE(at::equal(rows(true, 1), rows(true, 1))) << "recomputed";
  EXPECT_GT(difference(rows(true, 1), rows(true, 2)), 1e-3);
  EXPECT_GT(difference(rows(true, 1), rows(false, 1)), 1e-3);
  EXPECT_TRUE(at::equal(rows(false, 1), rows(false, 2)));
}

TEST(PTuning, TheMlpTakesNoLayersOrDropout) {
  models::io::expect_refused([] { OneSlot("p_tuning", "{encoder_num_layers: 3}"); },
                             "encoder_num_layers = 3", ExitCode::kUsage);
}

TEST(PrefixTuning, KeysAndValuesOfARealPromptGiveThatPromptsLogits) {
  for (const char* model : {"llama", "qwen3"}) {
    OneSlot one("prefix_tuning", "{num_virtual_tokens: 4}", model);
    const data::Batch whole = make_lane(0).batch;
    const Tensor tokens = whole.tokens_BL.slice(0, 0, 1);
    const Tensor prompt = tokens.slice(1, 0, 4), rest = tokens.slice(1, 4);
    models::KvCache cache;
    models::Pass pass;
    pass.want = models::Want::kLastLogits;
    pass.cache = &cache;
    pass.adapters = false;
    const models::Lane lane{make_batch(prompt, prompt), 0};
    one.tiny.trunk->forward({&lane, 1}, pass);
    const at::NoGradGuard no_grad;
    Tensor table = one.tiny.params()[0].value;
    const auto layers = static_cast<int64_t>(cache.layers.size());
    const int64_t heads = cache.layers[0].k.size(1);
    for (int64_t i = 0; i < layers; ++i) {  // [1, heads, 4, K]
      const models::KvCache::Layer& layer = cache.layers[static_cast<size_t>(i)];
      Tensor own = table.view({4, layers, 2, heads, -1}).select(1, i);
      own.select(1, 0).copy_(layer.k[0].transpose(0, 1));
      own.select(1, 1).copy_(layer.v[0].transpose(0, 1));
    }
    const Tensor expected = one.tiny.logits(whole, false)[0].slice(0, 4);
    EXPECT_LT(difference(one.tiny.logits(make_batch(rest, rest))[0], expected), 1e-4) << model;
  }
}

TEST(PTuningV2, IsPrefixTuningGivenTheSameTensors) {
  OneSlot v2("p_tuning_v2", "{num_virtual_tokens: 3}");
  const TestFolder folder;
  v2.tiny.save(folder.path());
  Tiny tiny("llama");
  std::shared_ptr<Method> method = methods().make("prefix_tuning");
  read_fields(*method, "{num_virtual_tokens: 3}");
  tiny.attach("prefix_tuning", method, folder.path());
  models::LoadOptions unquantised;
  unquantised.quantization = models::Quantization::kNone;
  tiny.load(unquantised);
  const data::Batch batch = make_lane(0).batch;
  EXPECT_TRUE(at::equal(tiny.logits(batch), v2.tiny.logits(batch)));
}

TEST(LlamaAdapter, TheFirstStepMovesGatesAlone) {
  for (const char* options : {"{}", "{gate: heads}"}) {
    Tiny tiny("llama");
    std::shared_ptr<Method> method = methods().make("llama_adapter");
    read_fields(*method, options);
    tiny.attach("llama_adapter", method);
    tiny.load();
    const auto gradients = tiny.sweep({make_lane(0)}, 1).gradients;
    for (size_t i = 0; i < gradients.size(); ++i) {
      const std::string& name = tiny.params()[i].name;
      const double largest = gradients[i].abs().max().item<double>();
      EXPECT_TRUE(name.ends_with("gate") ? largest > 0 : largest == 0) << name << " " << largest;
    }
  }
}

TEST(LlamaAdapter, IsTheBasesAttentionPlusAGatedOneOverThePrompt) {
  OneSlot one("llama_adapter", "{adapter_len: 3}");
  const SlotMap& slots = one.tiny.adapters.slots();
  const auto& params = one.tiny.params();  // of layer 0: prompt, gate
  const Tensor prompt = params[0].value.detach()[0], gate = params[1].value.detach();
  const Tensor w_k = fill("k", {32, 48}, 0.3), w_v = fill("v", {32, 48}, 0.3);
  const models::Pass pass;
  const auto project = [&](const char* name, const Tensor& w) {
    slots.find_linear(name)->slot->adapters()[0]->forward(fill("x", {1, 5, 48}, 1),
                                                          Dense(w, Tensor()), pass);
  };
  project("block.0.attn.k", w_k), project("block.0.attn.v", w_v);
  const Tensor q = fill("q", {2, 6, 5, 16}, 1), k = fill("own k", {2, 2, 5, 16}, 1);
  const Tensor y = slots.attentions[0].slot->adapters()[0]->forward(
      q, k, k, [](const Tensor& q_, const Tensor&, const Tensor&) { return q_ * 2; }, pass);
  const Tensor keys = prompt.mm(w_k.t()), values = prompt.mm(w_v.t());
  for (int64_t head = 0; head < 6; ++head) {
    const int64_t from = head / 3 * 16;  // three heads of queries share one of keys
    const Tensor scores = q.select(1, head).matmul(keys.slice(1, from, from + 16).t()) / 4;
    const Tensor expected =
        q.select(1, head) * 2 + gate * scores.softmax(-1).matmul(values.slice(1, from, from + 16));
    EXPECT_LT(difference(y.select(1, head).detach(), expected), 1e-5) << head;
  }
}

}  // namespace
}  // namespace graft::peft
