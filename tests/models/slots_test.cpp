// The seven slots of the Llama family: each is really called, changes nothing when the adapter does
// nothing, and nests in the order of attachment.
#include "models/slots.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <map>

#include "configs/check.h"
#include "dist/comm_factory.h"
#include "peft/slot_map.h"
#include "tests/testing.h"

namespace graft::models {
namespace {

using testing::Base;

/// The names of adapters in the order in which they were entered.
using Log = std::vector<std::string>;

/// Adapters that do nothing but say that they were there. One a kind of slot.
template <class Base>
class Probe : public Base {
 public:
  Probe(std::string label, Log& log) : label_(std::move(label)), log_(log) {}

 protected:
  void enter() { log_.push_back(label_); }

 private:
  std::string label_;
  Log& log_;
};
struct LinearProbe : Probe<LinearAdapter> {
  using Probe::Probe;
  Tensor forward(const Tensor& x, const LinearOp& base, const Pass&) override {
    return enter(), base(x);
  }
};
struct SublayerProbe : Probe<SublayerAdapter> {
  using Probe::Probe;
  Tensor forward(const Tensor& h, const Sublayer& sublayer, const Pass&) override {
    return enter(), sublayer(h);
  }
};
struct AttentionProbe : Probe<AttentionAdapter> {
  using Probe::Probe;
  Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Core& core,
                 const Pass&) override {
    return enter(), core(q, k, v);
  }
};
struct SequenceProbe : Probe<SequenceAdapter> {
  using Probe::Probe;
  Carry edit(Carry carry, const Pass&) override { return enter(), carry; }
};
struct TensorProbe : Probe<TensorAdapter> {
  using Probe::Probe;
  Tensor forward(const Tensor& t, const Pass&) override { return enter(), t; }
};
struct CarryProbe : Probe<CarryAdapter> {
  using Probe::Probe;
  Carry forward(Carry carry, const Stage& stage, const Pass&) override {
    return enter(), stage(std::move(carry));
  }
};
struct LossProbe : Probe<LossAdapter> {
  using Probe::Probe;
  Tensor term(const Carry& carry, const Pass&) override {
    return enter(), at::zeros({}, carry.h().options());
  }
};

/// Puts a probe on every slot. @return the slots' names
std::vector<std::string> attach_probes(Model& model, Log& log, const std::string& prefix = "") {
  const peft::SlotMap slots(model);
  std::vector<std::string> names;
  const auto attach = [&]<class P>(const auto& sites, std::type_identity<P>) {
    for (const auto& site : sites) {
      site.slot->push(std::make_shared<P>(prefix + site.name, log));
      names.push_back(site.name);
    }
    EXPECT_FALSE(sites.empty());
  };
  attach(slots.linears, std::type_identity<LinearProbe>());
  attach(slots.sublayers, std::type_identity<SublayerProbe>());
  attach(slots.attentions, std::type_identity<AttentionProbe>());
  attach(slots.sequences, std::type_identity<SequenceProbe>());
  attach(slots.tensors, std::type_identity<TensorProbe>());
  attach(slots.carries, std::type_identity<CarryProbe>());
  attach(slots.losses, std::type_identity<LossProbe>());
  return names;
}

nlohmann::json qwen3() {  // the variant with the most slots: norms of queries and keys
  nlohmann::json config = testing::tiny_llama();
  config["model_type"] = "qwen3";
  return config;
}

class Slots : public ::testing::Test {
 protected:
  std::unique_ptr<dist::Comm> comm = dist::make_single_comm();
  const Base base{qwen3(), *comm};
  const data::Batch batch = testing::batch_of(testing::random_tokens(2, 9, 128, 1));
  Log log;
};

TEST_F(Slots, AnAdapterThatDoesNothingIsCalledOnceInEverySlotAndChangesNoBit) {
  const Tensor logits = base.logits(batch);
  const double loss = base.mean_loss(batch);
  std::vector<std::string> names = attach_probes(*base.model, log);
  EXPECT_EQ(base.mean_loss(batch), loss);
  std::sort(names.begin(), names.end()), std::sort(log.begin(), log.end());
  EXPECT_EQ(log, names);
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end())
      << "two slots share a name";
  EXPECT_TRUE(at::equal(base.logits(batch), logits));
}

TEST_F(Slots, APassWithoutAdaptersCallsNone) {
  attach_probes(*base.model, log);
  Pass pass;
  pass.adapters = false;
  const std::vector<Lane> lanes = {{batch}};
  base.trunk->forward(lanes, pass);
  EXPECT_EQ(log, Log{});
}

TEST_F(Slots, TheLastAttachedIsTheOutermost) {
  const auto names = attach_probes(*base.model, log, "1:");
  attach_probes(*base.model, log, "2:");
  base.mean_loss(batch);
  std::map<std::string, std::string> order;  // of a slot: who was entered first, who second
  for (const std::string& entry : log) order[entry.substr(2)] += entry[0];
  const peft::SlotMap slots(*base.model);
  std::map<std::string, std::string> expected;
  for (const std::string& name : names) expected[name] = "21";
  // These see what the inner one returned: entered later is further out.
  for (const auto& site : slots.sequences) expected[site.name] = "12";
  for (const auto& site : slots.tensors) expected[site.name] = "12";
  for (const auto& site : slots.losses) expected[site.name] = "12";
  EXPECT_EQ(order, expected);
}

/// Sees the map below it twice: as a function of the identity, and as a matrix.
struct Onlooker : LinearAdapter {
  Tensor map_of_eye, matrix;
  Tensor forward(const Tensor& x, const LinearOp& base, const Pass&) override {
    const bool is_embedding = !x.is_floating_point();
    matrix = base.weight();
    map_of_eye =
        is_embedding ? base(at::arange(matrix.size(0), at::kLong)) : base(at::eye(x.size(-1))).t();
    return base(x);
  }
};

TEST_F(Slots, AChainOfMergeableAdaptersIsItsMergedMatrix) {
  const nlohmann::json config = {
      {"r", 3},
      {"lora_alpha", 6},
      {"target_modules", {"embed_tokens", "q_proj", "o_proj", "down_proj", "lm_head"}}};
  const auto inner = testing::attach(*base.model, "lora", config),
             outer = testing::attach(*base.model, "lora", config);
  std::map<std::string, std::shared_ptr<Onlooker>> onlookers;
  for (const auto& site : peft::SlotMap(*base.model).linears) {
    if (site.slot->empty()) continue;
    EXPECT_EQ(site.slot->adapters().size(), 2U);
    site.slot->push(onlookers[site.name] = std::make_shared<Onlooker>());
  }
  EXPECT_EQ(onlookers.size(), 8U);
  base.logits(batch);
  for (const auto& [name, onlooker] : onlookers) {
    EXPECT_LT(testing::relative_error(onlooker->map_of_eye, onlooker->matrix), 1e-5) << name;
    const dist::Pin pin(*base.store, base.weight(name + ".weight").block());
    const Tensor untouched = base.weight(name + ".weight").dense();
    EXPECT_GT(testing::relative_error(onlooker->matrix, untouched), 0.01) << name;
  }
}

TEST_F(Slots, WhatCannotMergeSaysSo) {
  LinearProbe probe("", log);
  EXPECT_FALSE(probe.mergeable());
  EXPECT_THROW(probe.merged(at::eye(2)), Error);
}

}  // namespace
}  // namespace graft::models
