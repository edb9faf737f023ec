// What holds for any method beside the contract: it may be attached again, and it merges in the
// precision of the matrix.
#include <gtest/gtest.h>

#include "tests/peft/all_methods.h"
#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

using models::io::expect_refused;

std::shared_ptr<Method> make(const std::string& name, const std::string& options) {
  std::shared_ptr<Method> method = registry().make(name);
  read_fields(*method, options);
  return method;
}

/// Names and shapes of all that a method lists on a new model.
std::vector<std::string> listed(const std::string& name, const std::shared_ptr<Method>& method) {
  const auto model = models::make_model(tiny_config("llama"));
  Peft adapters(*model, at::kCPU, 7);
  std::vector<MethodEntry> entries;
  if (method->acts_on_others()) entries.push_back({"lora", make("lora", "{}"), {}});
  entries.push_back({name, method, {}});
  adapters.attach(entries);
  std::vector<std::string> all;
  const auto add = [&](const std::string& key, const Tensor& value) {
    all.push_back(detail::concat(key, " ", value.sizes()));
  };
  for (const Param& p : adapters.params().all()) add(p.name, p.value);
  for (const Constant& c : adapters.params().constants()) add(c.name, c.value);
  return all;
}

// As a dry run does: once for the counts, once to train.
TEST(EveryMethod, AttachedAgainListsTheSame) {
  for (const std::string& name : registry().names()) {
    const auto method = make(name, defaults(name));
    const auto first = listed(name, method);
    EXPECT_FALSE(first.empty()) << name;
    EXPECT_EQ(listed(name, method), first) << name;
  }
}

TEST(EveryMethod, MergesInThePrecisionOfTheMatrix) {
  std::vector<std::pair<std::string, std::string>> cases = {
      {"glora", "{matrix_product: true}"},
      {"tinylora", "{target_modules: all-linear, r: 8, save_projection: false}"}};
  for (const std::string& name : registry().names()) cases.emplace_back(name, defaults(name));
  for (const auto& [name, options] : cases) {
    Tiny tiny("llama");
    const auto method = make(name, options);
    if (method->acts_on_others()) continue;
    tiny.attach(name, method);
    tiny.first_rows = {make_lane(0)};
    tiny.load();
    tiny.jitter();
    const at::NoGradGuard no_grad;
    for (const LinearSite& site : tiny.adapters.slots().linears) {
      if (site.slot->empty() || !site.slot->adapters()[0]->mergeable()) continue;
      models::LinearAdapter& adapter = *site.slot->adapters()[0];
      const bool table = site.info.kind == models::LinearKind::kEmbedding;
      const Tensor w = fill(site.name,
                            table ? at::IntArrayRef{site.info.in, site.info.out}
                                  : at::IntArrayRef{site.info.out, site.info.in},
                            1);
      const Tensor single = adapter.merged(w);
      adapter.to(at::kDouble);
      const Tensor wide = adapter.merged(w.to(at::kDouble));
      EXPECT_EQ(wide.scalar_type(), at::kDouble) << name;
      EXPECT_LT((wide - single).abs().max().item<double>(), 1e-3) << name << " " << site.name;
      break;
    }
  }
}

TEST(EveryMethod, ThatNeedsTheMatrixIsRefusedOverOneThatCannotBeMerged) {
  for (const std::string name : {"peanut", "dora"}) {
    for (const std::string& words : {name + " needs the matrix", std::string("lily below it")}) {
      Tiny tiny("llama");
      tiny.attach("lily", make("lily", "{r: 8, target_modules: all-linear}"));
      tiny.attach(name, make(name, "{r: 8, target_modules: all-linear}"));
      expect_refused([&] { tiny.load(); }, words, ExitCode::kUsage);
    }
  }
}

TEST(Psoft, MeansTheSameOnABaseThatIsQuantisedOtherwise) {
  const models::io::TestFolder folder;
  const auto update = [](const Tiny& tiny) {
    const LinearSite& site = *tiny.adapters.slots().find_linear("block.0.attn.q");
    return site.slot->adapters()[0]->merged(at::zeros({site.info.out, site.info.in}));
  };
  Tiny trained("llama");
  trained.attach("psoft", make("psoft", "{r: 8}"));
  models::LoadOptions options;
  options.quantization = models::Quantization::kNf4;
  trained.load(options);
  trained.jitter();
  const Peft::Saved saved = trained.adapters.save(0, {"base", "CAUSAL_LM", "print"});
  Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
  for (const auto quantization : {models::Quantization::kNf4, models::Quantization::kNone}) {
    Tiny other("llama");
    other.adapters.attach_frozen(folder.path());
    options.quantization = quantization;
    other.load(options);
    EXPECT_TRUE(at::equal(update(other), update(trained)));
  }
}

TEST(EdLora, ATokenNamedTwiceIsRefused) {
  Tiny tiny("llama");
  tiny.attach("ed_lora", make("ed_lora", "{token_ids: [5, 5], token_start: [1, 2]}"));
  expect_refused([&] { tiny.load(); }, "token_ids names a token twice", ExitCode::kUsage);
}

}  // namespace
}  // namespace graft::peft
