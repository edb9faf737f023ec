// AdaMSS with several subspaces against its definition, output by output; PEFT compares it with one
// (peft_oracle_test.cpp).
#include <gtest/gtest.h>

#include "peft/adapter_file.h"
#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

constexpr const char* kOptions = "{num_subspaces: 4, subspace_rank: 2, r: 12}";
constexpr const char* kAllVectors = "{num_subspaces: 4, subspace_rank: 2, r: 48}";  ///< exactly

models::LoadOptions unquantised() {
  models::LoadOptions options;
  options.quantization = models::Quantization::kNone;
  return options;
}

/// How far the rows are from the means of their groups.
double scatter(const Tensor& rows, const Tensor& group, int64_t count) {
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) {
    const Tensor own = rows.index_select(0, at::nonzero(group == k).flatten());
    if (own.size(0) > 0) sum += (own - own.mean(0, true)).square().sum().item<double>();
  }
  return sum;
}

TEST(Adamss, EachOutputIsInOneSubspace) {
  for (const char* model : {"llama", "qwen2"}) {  // without and with a bias
    const OneSlot slot("adamss", kOptions, model);
    const Tensor a = slot.value("a"), b = slot.value("b"), p = slot.value("p");
    const Tensor subspace = slot.value("subspaces"), x = fill("x", {5, slot.site().info.in}, 1);
    Tensor expected = at::linear(x, slot.weight(), slot.bias());
    const Tensor with_one = p.size(1) > x.size(1) ? at::cat({x, at::ones({5, 1})}, 1) : x;
    for (int64_t output = 0; output < b.size(0); ++output) {
      const Tensor own = a.slice(0, 2 * subspace[output].item<int64_t>()).slice(0, 0, 2);
      expected.select(1, output).add_(with_one.mv(b[output].unsqueeze(0).mm(own).mm(p)[0]));
    }
    EXPECT_TRUE(at::allclose(slot.forward(x), expected, 1e-4, 1e-5)) << model;
    EXPECT_EQ(slot.adapter().mergeable(), !slot.site().info.has_bias) << model;
  }
}

TEST(Adamss, SubspacesAreClustersOfTheLeftSingularVectors) {
  const OneSlot slot("adamss", kAllVectors);
  const Tensor left = slot.weight().mm(slot.value("p").t());
  const Tensor unit = left / left.norm(2, 0, true), subspace = slot.value("subspaces");
  const Tensor any = (at::arange(unit.size(0)) * 37 + 11).remainder(101).remainder(4);
  EXPECT_EQ(std::get<0>(at::_unique(subspace)).numel(), 4);
  EXPECT_LT(scatter(unit, subspace, 4), 0.99 * scatter(unit, any, 4));
}

TEST(Adamss, AStartsWithWhatItsOutputsSpanFirst) {
  Tiny tiny("llama");
  const std::shared_ptr<Method> method = methods().make("adamss");
  read_fields(*method, kAllVectors);
  tiny.attach("adamss", method);
  tiny.load(unquantised());
  const auto& adapter = *tiny.adapters.slots().find_linear("block.0.attn.q")->slot->adapters()[0];
  const Tensor a = adapter.named_parameters()["a"].detach();
  const Tensor subspace = adapter.named_buffers()["subspaces"], p = adapter.named_buffers()["p"];
  const Tensor left = fill("model.layers.0.self_attn.q_proj.weight", {96, 48}, 0.25).mm(p.t());
  const Tensor rows =
      (left / left.norm(2, 0, true)).index_select(0, at::nonzero(subspace == 1).flatten());
  const Tensor first = std::get<2>(at::linalg_svd(rows, false)).slice(0, 0, 2),
               own = a.slice(0, 2, 4);
  EXPECT_TRUE(at::allclose(own.t().mm(own), first.t().mm(first), 1e-3, 1e-3));
}

TEST(Adamss, PeftsFilesOfSeveralSubspacesAreRefusedWithTheReason) {
  const TestFolder folder;
  const OneSlot slot("adamss", "{r: 12}");
  Peft::Saved saved = slot.tiny.save_part(0);
  EXPECT_EQ(saved.config["peft_type"], "ADAMSS");
  saved.config["num_subspaces"] = 5;  // PEFT's default
  Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
  Tiny other("llama");
  models::io::expect_refused([&] { other.adapters.attach_frozen(folder.path()); },
                             "does not stand in PEFT's file", ExitCode::kData);
}

TEST(Adamss, OursOfSeveralSubspacesHaveNoPeftTypeAndAreReadHere) {
  const TestFolder folder;
  OneSlot slot("adamss", kOptions);
  EXPECT_TRUE(slot.tiny.save_part(0).config["peft_type"].is_null());
  slot.tiny.save(folder.path());
  Tiny other("llama");
  other.adapters.attach_frozen(folder.path());
  other.load(unquantised());
  const data::Batch batch = make_lane(0).batch;
  EXPECT_TRUE(at::equal(other.logits(batch), slot.tiny.logits(batch)));
}

TEST(Adamss, ANumberOfNoSubspaceIsRefused) {
  const TestFolder folder;
  const OneSlot slot("adamss", kOptions);
  slot.adapter().named_buffers()["subspaces"][3] = 4;
  slot.tiny.save(folder.path());
  Tiny other("llama");
  other.adapters.attach_frozen(folder.path());
  other.load(unquantised());
  models::io::expect_refused([&] { other.logits(make_lane(0).batch); }, "outside of 0 to 3",
                             ExitCode::kData);
}

TEST(Adamss, SubspacesThatRestStayWhereTheyAre) {
  OneSlot slot("adamss",
               "{target_modules: all-linear, num_subspaces: 4, subspace_rank: 2, use_asa: true,"
               " asa_target_subspaces: 9, init_warmup: 0, final_warmup: 6, mask_interval: 2}");
  for (int step = 0; step < 8; ++step) slot.tiny.step({make_lane(0)}, 1);
  std::vector<Tensor> before;
  for (const Param& p : slot.tiny.params()) before.push_back(p.value.detach().clone());
  for (int step = 0; step < 3; ++step) slot.tiny.step({make_lane(0)}, 1);
  int64_t moving = 0;
  for (size_t i = 0; i < before.size(); ++i) {
    const Param& p = slot.tiny.params()[i];
    if (!p.name.ends_with(".a")) continue;
    for (int64_t k = 0; k < 4; ++k)
      moving +=
          !at::equal(p.value.slice(0, 2 * k, 2 * k + 2), before[i].slice(0, 2 * k, 2 * k + 2));
  }
  EXPECT_EQ(moving, 9);  // step 4 keeps those above the 10th; 9 are no more than the target
}

}  // namespace
}  // namespace graft::peft
