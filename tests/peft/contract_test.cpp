// The contract every method meets, on every tiny model: a method is tested the day it stands in
// methods.def. peft/README.md lists the clauses.
#include <gtest/gtest.h>

#include <mutex>
#include <set>

#include "tests/peft/tiny.h"

namespace graft::peft {

void register_example(MethodRegistry& registry,
                      const MethodFacts& facts);  // peft/methods/example.cpp

namespace {

const MethodRegistry& registry() {
  static const MethodRegistry all = [] {
    MethodRegistry r = methods();
    register_example(r, {"example", "reparam", "arXiv:2205.05638", "y = l * (W x + b)"});
    return r;
  }();
  return all;
}

struct Case {
  std::string method, model, options;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.method << " on " << c.model << " " << c.options;
}

/// Fields worth a run of their own, beside the defaults.
const std::vector<std::pair<std::string, std::string>> kVariants = {
    {"lora", "{target_modules: all-linear, lora_dropout: 0.25}"},
    {"lora",
     "{target_modules: [all-linear, embed], modules_to_save: head, bias: all, use_rslora: true,"
     " rank_pattern: {v_proj: 3}}"},
    {"example", "{target_modules: [all-linear, embed, head]}"},
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const char* model : {"llama", "mistral", "qwen2", "qwen3"}) {
    for (const std::string& method : registry().names()) all.push_back({method, model, "{}"});
    for (const auto& [method, options] : kVariants) all.push_back({method, model, options});
  }
  return all;
}

class Contract : public testing::TestWithParam<Case> {
 protected:
  static std::unique_ptr<Tiny> make(models::LoadOptions options = {}, dist::Comm* comm = nullptr) {
    auto tiny = std::make_unique<Tiny>(GetParam().model.c_str());
    std::shared_ptr<Method> method = registry().make(GetParam().method);
    read_fields(*method, GetParam().options);
    tiny->attach(GetParam().method, method);
    tiny->load(std::move(options), comm);
    return tiny;
  }
  static models::LoadOptions unquantised() {
    models::LoadOptions options;
    options.quantization = models::Quantization::kNone;
    return options;
  }
};

const std::vector<models::Lane> kLanes = {make_lane(0), make_lane(1)};

TEST_P(Contract, OutputAtStepZeroIsTheBases) {
  const auto tiny = make();
  if (!registry().make(GetParam().method)->starts_as_base())
    GTEST_SKIP() << "the method starts elsewhere";
  const data::Batch& batch = kLanes[0].batch;
  EXPECT_TRUE(at::equal(tiny->logits(batch), tiny->logits(batch, false)));
  tiny->jitter();
  EXPECT_FALSE(at::equal(tiny->logits(batch), tiny->logits(batch, false)))
      << "the adapter is not in the model";
}

TEST_P(Contract, InitialValuesAreAFunctionOfTheSeedAlone) {
  EXPECT_EQ(make()->adapters.params().hash(), make()->adapters.params().hash());
}

TEST_P(Contract, ExactlyTheParamSetGetsGradients) {
  const auto tiny = make();
  tiny->jitter();
  std::set<const void*> listed, trainable;
  for (const Param& p : tiny->params()) listed.insert(p.value.unsafeGetTensorImpl());
  const auto collect = [&](const auto& sites) {
    for (const auto& site : sites) {
      for (const auto& adapter : site.slot->adapters()) {
        for (const Tensor& p : adapter->parameters()) {
          if (p.requires_grad()) trainable.insert(p.unsafeGetTensorImpl());
        }
      }
    }
  };
  const SlotMap& slots = tiny->adapters.slots();
  collect(slots.linears), collect(slots.sublayers), collect(slots.attentions),
      collect(slots.sequences);
  collect(slots.tensors), collect(slots.carries), collect(slots.losses);
  EXPECT_EQ(trainable, listed);
  const auto gradients = tiny->sweep(kLanes, 2).gradients;
  for (size_t i = 0; i < gradients.size(); ++i) {
    EXPECT_TRUE(at::isfinite(gradients[i]).all().item<bool>()) << tiny->params()[i].name;
    EXPECT_GT(gradients[i].abs().max().item<double>(), 0)
        << tiny->params()[i].name << " has no gradient";
  }
}

TEST_P(Contract, BaseBytesAreTheSameAfterThreeSteps) {
  const auto tiny = make();
  const std::string base = tiny->store->hash(), start = tiny->adapters.params().hash();
  for (int i = 0; i < 3; ++i) tiny->step(kLanes, 2);
  EXPECT_EQ(tiny->store->hash(), base);
  EXPECT_NE(tiny->adapters.params().hash(), start);
}

// Central differences of the float32 model along u = unit(unit(gradient) + unit(noise)): along the
// gradient the signal is largest, the noise reaches every element. A step of h = 0.01 changes the
// loss (about 5) by 2 h |g|; float32 leaves errors of some 1e-6, so a difference is known to 1e-6 /
// (2 h) = 5e-5, and the cubic term is of the order of h^2.
TEST_P(Contract, GradientsMatchFiniteDifferences) {
  constexpr double kStep = 0.01, kAbsolute = 2e-4, kRelative = 0.01;
  const auto tiny = make(unquantised());
  tiny->jitter();
  const auto gradients = tiny->sweep(kLanes, 2).gradients;
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Param& param = tiny->params()[i];
    const Tensor saved = param.value.clone(), noise = fill(param.name + " noise", saved.sizes(), 1);
    Tensor u = gradients[i] / (gradients[i].norm() + 1e-12) + noise / noise.norm();
    u /= u.norm();
    const auto loss_at = [&](double h) {
      Tensor(param.value).copy_(saved + h * u);
      const at::AutoGradMode grad(true);
      return tiny->sweep(kLanes, 2).loss;
    };
    const double measured = (loss_at(kStep) - loss_at(-kStep)) / (2 * kStep);
    Tensor(param.value).copy_(saved);
    const double expected = (gradients[i] * u).sum().item<double>();
    EXPECT_NEAR(measured, expected, kAbsolute + kRelative * std::abs(expected)) << param.name;
  }
}

TEST_P(Contract, SavedAndLoadedItGoesOnBitForBit) {
  const TestFolder folder;
  const auto first = make(), second = make();
  for (int i = 0; i < 2; ++i) first->step(kLanes, 2);
  first->save(folder.path());
  second->adapters.load(folder.path());
  EXPECT_EQ(second->adapters.params().hash(), first->adapters.params().hash());
  for (size_t i = 0; i < first->params().size(); ++i) {
    second->optimizer->first_moments()[i].copy_(first->optimizer->first_moments()[i]);
    second->optimizer->second_moments()[i].copy_(first->optimizer->second_moments()[i]);
  }
  second->optimizer->set_num_steps(first->optimizer->num_steps());
  for (int i = 0; i < 2; ++i) EXPECT_EQ(second->step(kLanes, 2), first->step(kLanes, 2));
  EXPECT_EQ(second->adapters.params().hash(), first->adapters.params().hash());
}

TEST_P(Contract, MergedWeightsComputeTheSame) {
  const auto adapted = make(unquantised());
  adapted->jitter();
  std::map<std::string, const models::Slot<models::LinearAdapter>*> slots;
  for (const LinearSite& site : adapted->adapters.slots().linears) {
    for (const auto& adapter : site.slot->adapters()) {
      if (!adapter->mergeable())
        GTEST_SKIP() << "the adapter of " << site.name << " cannot be merged";
    }
    slots[site.hf_path + ".weight"] = site.slot;
  }
  const auto merge = [&](const std::string& name, Tensor w) {
    const at::NoGradGuard no_grad;
    if (!slots.contains(name)) return w;
    for (const auto& adapter : slots.at(name)->adapters()) w = adapter->merged(w);
    return w;
  };
  Tiny merged(GetParam().model.c_str());
  merged.load(unquantised(), nullptr, merge);
  const data::Batch& batch = kLanes[0].batch;
  const Tensor expected = adapted->logits(batch);
  EXPECT_LT((merged.logits(batch) - expected).abs().max().item<double>(), 1e-4);
  EXPECT_GT((merged.logits(batch) - adapted->logits(batch, false)).abs().max().item<double>(),
            1e-2);
}

TEST_P(Contract, TwoRanksOfOneLaneAreOneRankOfTwo) {
  constexpr int kSteps = 2;
  const auto alone = make();
  std::vector<double> expected;
  for (int i = 0; i < kSteps; ++i) expected.push_back(alone->step(kLanes, 2));
  std::mutex mutex;  // EXPECT may be called from one thread at a time
  dist::run_virtual_ranks(2, [&](dist::Comm& comm) {
    const auto tiny = make({}, &comm);
    std::vector<double> losses;
    for (int i = 0; i < kSteps; ++i)
      losses.push_back(tiny->step({kLanes[static_cast<size_t>(comm.rank())]}, 2));
    const std::lock_guard lock(mutex);
    EXPECT_EQ(losses, expected);
    EXPECT_EQ(tiny->adapters.params().hash(), alone->adapters.params().hash())
        << "rank " << comm.rank();
  });
}

TEST_P(Contract, LossFallsOnFourSamples) {
  const auto tiny = make();
  const double first = tiny->step(kLanes, 2);
  for (int i = 0; i < 40; ++i) tiny->step(kLanes, 2);
  EXPECT_LT(tiny->sweep(kLanes, 2).loss, 0.95 * first);
}

std::string case_name(const testing::TestParamInfo<Case>& info) {
  int variant = 0;
  for (const auto& [method, options] : kVariants) {
    variant += method == info.param.method ? 1 : 0;
    if (options == info.param.options) break;
  }
  return info.param.method + (info.param.options == "{}" ? "" : std::to_string(variant)) + "_" +
         info.param.model;
}
INSTANTIATE_TEST_SUITE_P(Methods, Contract, testing::ValuesIn(cases()), case_name);

// --- clause 1: fields

class Fields : public testing::TestWithParam<std::string> {};

/// A value for `field` outside of its bound, or "" if it takes any.
std::string out_of_range(const configs::FieldDoc& field) {
  if (!field.bound.choices.empty()) return "no-such-choice";
  std::string bad;
  if (field.bound.low) bad = std::to_string(static_cast<int64_t>(*field.bound.low) - 1);
  if (!field.bound.low && field.bound.high)
    bad = std::to_string(static_cast<int64_t>(*field.bound.high) + 1);
  return field.type == configs::Type::kList && !bad.empty() ? "[" + bad + "]" : bad;
}

TEST_P(Fields, DefaultsLoad) { EXPECT_NO_THROW(read_fields(*registry().make(GetParam()), "{}")); }

TEST_P(Fields, UnknownKeyIsRefusedWithItsLine) {
  const auto method = registry().make(GetParam());
  models::io::expect_refused([&] { read_fields(*method, "\nno_such_key: 1\n"); },
                             "options.yaml:2:1: no_such_key", ExitCode::kUsage);
}

TEST_P(Fields, ValuesOutOfRangeAreRefusedWithNameAndLine) {
  const auto method = registry().make(GetParam());
  const configs::FieldDoc all =
      configs::describe_section([&](configs::Fields& f) { method->fields(f); });
  int tried = 0;
  for (const configs::FieldDoc& field : all.members) {
    const std::string bad = out_of_range(field);
    if (bad.empty()) continue;
    ++tried;
    const size_t column = field.name.size() + (bad.starts_with('[') ? 4 : 3);
    models::io::expect_refused(
        [&] { read_fields(*registry().make(GetParam()), "\n" + field.name + ": " + bad); },
        "options.yaml:2:" + std::to_string(column) + ": " + field.name, ExitCode::kUsage);
  }
  EXPECT_GT(tried, 0);
}

INSTANTIATE_TEST_SUITE_P(Methods, Fields, testing::ValuesIn(registry().names()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace graft::peft
