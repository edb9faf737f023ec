// LoRA-Sparse against attention over chosen keys, by loops; its loss against the divergence of two
// distributions; and that the estimate learns to choose.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

double at2(const Tensor& t, int64_t i, int64_t j) { return t[i][j].item<double>(); }

/// What an attention adapter gets, seen from outside.
struct Seen : models::AttentionAdapter {
  Tensor forward(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Core& core,
                 const models::Pass&) override {
    q = q_, k = k_, v = v_;
    return out = core(q, k, v);
  }
  Tensor q, k, v, out;
};

/// What the projection of the queries gets.
struct SeenInput : models::LinearAdapter {
  Tensor forward(const Tensor& x_, const models::LinearOp& base, const models::Pass&) override {
    return x = x_, base(x_);
  }
  Tensor x;
};

/// A tiny model with the method on it, and what its attention gets.
struct Watched {
  explicit Watched(const std::string& options) : slot("lora_sparse", options) {
    const SlotMap& map = slot.tiny.adapters.slots();
    for (size_t layer = 0; layer < map.attentions.size(); ++layer) {
      map.attentions[layer].slot->push(seen.emplace_back(std::make_shared<Seen>()));
      map.find_linear("block." + std::to_string(layer) + ".attn.q")
          ->slot->push(input.emplace_back(std::make_shared<SeenInput>()));
    }
  }
  Tensor parameter(size_t layer, const std::string& leaf) const {
    for (const auto& p : slot.tiny.params()) {
      if (p.name == "0.block." + std::to_string(layer) + ".attn.core." + leaf)
        return p.value.detach();
    }
    throw std::logic_error(leaf);
  }
  int64_t heads() const { return seen[0]->q.size(1); }
  int64_t length() const { return seen[0]->q.size(2); }
  int64_t key_head(int64_t head) const { return head / (heads() / seen[0]->k.size(1)); }
  /// S of one row and head, [L, L].
  Tensor estimate(size_t layer, int64_t row, int64_t head) const {
    const Tensor p_q = parameter(layer, "q")[head], p_k = parameter(layer, "k")[key_head(head)];
    const Tensor x = input[layer]->x.detach()[row];
    return x.mm(p_q.t()).mm(x.mm(p_k.t()).t());
  }
  /// The true scores of one row and head, [L, L].
  Tensor truth(size_t layer, int64_t row, int64_t head) const {
    const Seen& s = *seen[layer];
    return s.q[row][head].mm(s.k[row][key_head(head)].t()).detach() /
           std::sqrt(static_cast<double>(s.q.size(3)));
  }
  OneSlot slot;
  std::vector<std::shared_ptr<Seen>> seen;
  std::vector<std::shared_ptr<SeenInput>> input;
};

TEST(LoraSparse, AttendsToTheBestKeysByTheEstimate) {
  constexpr int64_t kTop = 3;
  Watched watched("{top_k: 3, r: 5}");
  watched.slot.tiny.logits(make_lane(0).batch);
  const Seen& seen = *watched.seen[0];
  for (int64_t head = 0; head < watched.heads(); ++head) {
    const Tensor s = watched.estimate(0, 1, head), truth = watched.truth(0, 1, head).exp();
    const Tensor v = seen.v[1][watched.key_head(head)];
    for (int64_t i = 0; i < watched.length(); ++i) {
      Tensor sum = at::zeros({v.size(1)});
      double total = 0;
      for (int64_t j = 0; j <= i; ++j) {
        int64_t better = 0;
        for (int64_t other = 0; other <= i; ++other) better += at2(s, i, other) > at2(s, i, j);
        if (better >= kTop) continue;
        sum = sum + at2(truth, i, j) * v[j];
        total += at2(truth, i, j);
      }
      EXPECT_TRUE(at::allclose(seen.out[1][head][i], sum / total, 1e-3, 1e-4)) << head << " " << i;
    }
  }
}

TEST(LoraSparse, WithEnoughKeysItIsDenseAttention) {
  OneSlot slot("lora_sparse", "{top_k: 12}");
  const data::Batch batch = make_lane(0).batch;
  EXPECT_TRUE(at::equal(slot.tiny.logits(batch), slot.tiny.logits(batch, false)));
}

TEST(LoraSparse, ItsLossIsTheDivergenceOfTheTwoOrders) {
  const models::Lane lane = make_lane(0);
  const auto targets = static_cast<double>(lane.batch.num_targets);
  Watched watched("{mimic_weight: 3}");
  OneSlot without("lora_sparse", "{mimic_weight: 0}");
  const double added =
      targets * (watched.slot.tiny.sweep({lane}, 1).loss - without.tiny.sweep({lane}, 1).loss);
  double expected = 0;
  for (size_t layer = 0; layer < watched.seen.size(); ++layer) {
    for (int64_t row = 0; row < 2; ++row) {
      for (int64_t head = 0; head < watched.heads(); ++head) {
        for (int64_t i = 0; i < watched.length(); ++i) {
          const Tensor p = watched.truth(layer, row, head)[i].slice(0, 0, i + 1).softmax(0);
          const Tensor q = watched.estimate(layer, row, head)[i].slice(0, 0, i + 1).softmax(0);
          expected += (p * (p / q).log()).sum().item<double>() / watched.heads();
        }
      }
    }
  }
  EXPECT_GT(expected, 1);
  EXPECT_NEAR(added, 3 * expected, 1e-3 * added);
}

/// Of the three keys with the highest scores, the share among the three of the estimate.
double recall(Watched& watched) {
  watched.slot.tiny.logits(make_lane(0).batch);
  int64_t found = 0, all = 0;
  for (int64_t head = 0; head < watched.heads(); ++head) {
    const Tensor s = watched.estimate(1, 0, head), truth = watched.truth(1, 0, head);
    for (int64_t i = 3; i < watched.length(); ++i) {
      const auto best = [&](const Tensor& t) {
        return std::get<1>(t[i].slice(0, 0, i + 1).topk(3));
      };
      found += best(s).unsqueeze(1).eq(best(truth)).sum().item<int64_t>();
      all += 3;
    }
  }
  return static_cast<double>(found) / static_cast<double>(all);
}

TEST(LoraSparse, TheEstimateLearnsWhichKeysMatter) {
  Watched watched("{top_k: 3, init_weights: normal}");
  const double untrained = recall(watched);
  for (int step = 0; step < 60; ++step) watched.slot.tiny.step({make_lane(0)}, 1);
  EXPECT_GT(recall(watched), untrained + 0.15);
}

TEST(LoraSparse, WithACacheItChoosesTheSameKeys) {
  OneSlot slot("lora_sparse", "{top_k: 3}");
  const Tensor tokens = make_lane(0).batch.tokens_BL.slice(0, 0, 1);
  const Tensor expected = slot.tiny.logits(make_batch(tokens, tokens));
  for (int text = 0; text < 2; ++text) {  // the second finds nothing of the first
    models::KvCache cache;
    models::Pass pass;
    pass.want = models::Want::kLogits;
    pass.cache = &cache;
    std::vector<Tensor> parts;
    for (const auto& [begin, end] : {std::pair{0, 5}, std::pair{5, 6}, std::pair{6, 12}}) {
      const Tensor part = tokens.slice(1, begin, end);
      models::Lane lane{make_batch(part, part), 0};
      lane.batch.positions_BL = lane.batch.positions_BL + begin;
      parts.push_back(slot.tiny.trunk->forward({&lane, 1}, pass).front());
    }
    EXPECT_TRUE(at::allclose(at::cat(parts, 1), expected, 1e-4, 1e-4)) << "text " << text;
  }
}

TEST(LoraSparse, PaddingBehindADocumentChangesNothing) {
  OneSlot slot("lora_sparse", "{top_k: 3}");
  const Tensor tokens = make_lane(0).batch.tokens_BL.slice(0, 0, 1), real = tokens.slice(1, 0, 8);
  data::Batch padded = make_batch(tokens, tokens);
  padded.documents_BL.slice(1, 8).fill_(-1);
  padded.labels_BL.slice(1, 7).fill_(-100);
  padded.num_targets = 7, padded.num_tokens = 8;
  EXPECT_TRUE(at::allclose(slot.tiny.logits(padded).slice(1, 0, 8),
                           slot.tiny.logits(make_batch(real, real)), 1e-4, 1e-4));
  const models::Lane with{padded, 0}, without{make_batch(real, real), 0};
  EXPECT_NEAR(slot.tiny.sweep({with}, 1).loss, slot.tiny.sweep({without}, 1).loss, 1e-4);
}

TEST(LoraSparse, SvdStartsAtTheScoresWherePositionsDoNotTurnThem) {
  // At full rank S is x W_q W_k x / sqrt(K), the score of a position with itself.
  const OneSlot moved("lora_sparse", "{}");
  Tiny tiny("llama");
  std::shared_ptr<Method> method = methods().make("lora_sparse");
  read_fields(*method, "{r: " + std::to_string(tiny.model->info().head_dim) + "}");
  tiny.attach("lora_sparse", method);
  models::LoadOptions unquantised;
  unquantised.quantization = models::Quantization::kNone;
  tiny.load(unquantised);
  const Tensor q = tiny.params()[0].value.detach(), k = tiny.params()[1].value.detach();
  const LinearSite& site = moved.site();
  const Tensor w_q = moved.weight();
  const int64_t head_dim = tiny.model->info().head_dim, group = q.size(0) / k.size(0);
  const Tensor w_k =
      fill("model.layers.0.self_attn.k_proj.weight", {k.size(0) * head_dim, site.info.in}, 0.25);
  for (int64_t head = 0; head < q.size(0); ++head) {
    const Tensor expected =
        w_q.slice(0, head * head_dim, (head + 1) * head_dim)
            .t()
            .mm(w_k.slice(0, head / group * head_dim, (head / group + 1) * head_dim)) /
        std::sqrt(static_cast<double>(head_dim));
    EXPECT_TRUE(at::allclose(q[head].t().mm(k[head / group]), expected, 1e-3, 1e-4)) << head;
  }
}

}  // namespace
}  // namespace graft::peft
