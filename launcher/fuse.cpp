#include "launcher/fuse.h"

#include <ATen/ATen.h>

#include <filesystem>
#include <map>
#include <set>

#include "configs/check.h"
#include "configs/log.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/evaluate.h"
#include "launcher/facts.h"
#include "launcher/workbench.h"
#include "models/base.h"
#include "models/io/safetensors.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;
using at::Tensor;

/// Sums up what a matrix gets. Positions that are padding do not count.
class GramProbe : public models::LinearAdapter {
 public:
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    Tensor rows = x.detach().flatten(0, -2);
    if (x.dim() == 3)
      rows = rows.index_select(
          0, pass.batch->documents_BL.flatten().ge(0).nonzero().squeeze(1).to(x.device()));
    rows = rows.to(at::kFloat);
    const Tensor gram = rows.t().mm(rows);
    gram_ = gram_.defined() ? gram_.add_(gram) : gram;
    return base(x);
  }
  /// [in, in]; zero where this rank had no rows.
  Tensor gram(const peft::LinearSite& site, at::Device device) const {
    return gram_.defined()
               ? gram_
               : at::zeros({site.info.in, site.info.in}, at::TensorOptions().device(device));
  }

 private:
  Tensor gram_;
};

/// Names of the matrices that any of the adapters changes, in the model's order.
std::vector<std::string> matrices_changed_by(const std::string& base, const FuseOptions& options) {
  const auto model = models::make_model(models::read_base_config(base));
  peft::Peft adapters(*model, at::kCPU, 0);
  for (const std::string& directory : options.adapters) {
    for (const std::string& part : adapter_parts(directory)) adapters.attach_frozen(part);
  }
  const peft::SlotMap& slots = adapters.slots();
  const auto refuse = [](const auto& sites) {
    for (const auto& site : sites) {
      GRAFT_CHECK(site.slot->empty(), "fuse: an adapter acts at ", site.name,
                  "; only changes of linear layers can be fused");
    }
  };
  refuse(slots.gains), refuse(slots.sublayers), refuse(slots.attentions), refuse(slots.sequences);
  refuse(slots.tensors), refuse(slots.carries), refuse(slots.losses);
  std::vector<std::string> names;
  for (const peft::LinearSite& site : slots.linears) {
    if (site.slot->empty()) continue;
    for (const auto& adapter : site.slot->adapters()) {
      GRAFT_CHECK(adapter->mergeable() && site.info.kind == models::LinearKind::kLinear,
                  "fuse: the adapter at ", site.name,
                  " is no change of a linear layer's matrix alone and cannot be fused");
    }
    GRAFT_CHECK(options.rank <= std::min(site.info.in, site.info.out), "fuse: --rank ",
                options.rank, " is larger than ", site.name, ", ", site.info.out, " x ",
                site.info.in);
    names.push_back(site.name);
  }
  GRAFT_CHECK(!names.empty(), ExitCode::kData, "fuse: the adapters change no matrix");
  return names;
}

using Parts = std::map<std::string, std::vector<FusionPart>>;

/// Runs one adapter over its data and adds what it does to `parts`. @return the base's fingerprint
std::string add_concept(World& world, Run run, const std::string& directory,
                        const std::string& data, const std::vector<std::string>& names,
                        Parts& parts) {
  run.peft.clear();
  run.model.adapters.values = adapter_parts(directory);
  run.data.eval = data.c_str();
  Workbench bench = build_workbench(world, run);
  std::vector<std::shared_ptr<GramProbe>> probes;
  for (const std::string& name : names)
    bench.adapters->slots().find_linear(name)->slot->push(
        probes.emplace_back(std::make_shared<GramProbe>()));
  log::info("fusing: " + directory + " over " + data);
  evaluate(bench, run);
  const auto base = bench.base_weights();
  for (size_t i = 0; i < names.size(); ++i) {
    const peft::LinearSite& site = *bench.adapters->slots().find_linear(names[i]);
    const Tensor w = base->weight(site);
    Tensor merged = w, gram = probes[i]->gram(site, world.device);
    const auto& adapters = site.slot->adapters();
    for (size_t a = 0; a + 1 < adapters.size(); ++a) merged = adapters[a]->merged(merged);
    world.comm().all_reduce(gram, dist::Traffic::kControl);
    parts[names[i]].push_back({(merged - w).cpu(), gram.cpu()});
  }
  return bench.fingerprint;
}

/// The nearest matrix of this rank, as B A.
std::pair<Tensor, Tensor> low_rank(const Tensor& update, int64_t rank) {
  const auto [u, s, v] = at::linalg_svd(update, false);
  const Tensor root = s.slice(0, 0, rank).sqrt();
  return {root.unsqueeze(1) * v.slice(0, 0, rank), u.slice(1, 0, rank) * root};
}

/// A LoRA on these matrices of the base, with scale 1, in PEFT's form.
peft::Peft::Saved save_lora(const Run& run, const std::string& fingerprint, int rank,
                            const std::map<std::string, std::pair<Tensor, Tensor>>& factors) {
  const auto model = models::make_model(models::read_base_config(run.model.name_or_path));
  peft::Peft adapters(*model, at::kCPU, 0);
  std::vector<std::string> names;
  for (const auto& [name, a_b] : factors) names.push_back(name);
  const std::string text = "{method: lora, r: " + std::to_string(rank) +
                           ", lora_alpha: " + std::to_string(rank) + ", target_modules: [" +
                           configs::join(names, ", ") + "]}";
  auto entry = configs::read_text<peft::MethodEntry>(text, "fuse");
  adapters.attach(entry);
  for (const peft::Param& param : adapters.params().all()) {
    const size_t leaf = param.name.rfind('.');
    const auto& [a, b] = factors.at(param.name.substr(2, leaf - 2));  // "0.block.3.attn.q.lora_a"
    param.value.detach().copy_(param.name.ends_with("lora_a") ? a : b);
  }
  return adapters.save(0, {run.model.name_or_path, "CAUSAL_LM", fingerprint});
}

}  // namespace

Tensor fuse(const std::vector<FusionPart>& parts, double epsilon) {
  Tensor wanted, grams;
  for (const FusionPart& part : parts) {
    const Tensor gram = part.gram.to(at::kDouble), product = part.update.to(at::kDouble).mm(gram);
    wanted = wanted.defined() ? wanted + product : product;
    grams = grams.defined() ? grams + gram : gram;
  }
  const Tensor ridge = epsilon * grams.diagonal().mean().clamp_min(1e-30);
  grams = grams + ridge * at::eye(grams.size(0), grams.options());
  return at::linalg_solve(grams, wanted, /*left=*/false);
}

double lost_share(const Tensor& update, const std::vector<FusionPart>& parts) {
  const auto energy = [](const Tensor& d, const FusionPart& part) {
    return (d.mm(part.gram.to(at::kDouble)) * d).sum().item<double>();
  };
  double lost = 0, all = 0;
  for (const FusionPart& part : parts) {
    const Tensor own = part.update.to(at::kDouble);
    lost += energy(update.to(at::kDouble) - own, part);
    all += energy(own, part);
  }
  return all > 0 ? lost / all : 0;
}

FuseReport fuse_adapters(World& world, const Run& run, const FuseOptions& options) {
  const at::NoGradGuard no_grad;
  GRAFT_CHECK(options.adapters.size() == options.data.size(), "fuse: ", options.adapters.size(),
              " adapters and data for ", options.data.size(),
              "; --data is needed for each --adapter");
  GRAFT_CHECK(run.model.adapters.values.empty(),
              "fuse: model.adapters of the config would be fused into each; leave it out");
  GRAFT_CHECK(!fs::exists(options.output), "fuse: ", options.output,
              " exists; nothing is overwritten");
  const auto names = matrices_changed_by(run.model.name_or_path, options);
  Parts parts;
  std::string fingerprint;
  for (size_t c = 0; c < options.adapters.size(); ++c)
    fingerprint = add_concept(world, run, options.adapters[c], options.data[c], names, parts);

  FuseReport report{names.size()};
  std::map<std::string, std::pair<Tensor, Tensor>> factors;
  for (const std::string& name : names) {
    const auto& of_name = parts.at(name);
    const auto [a, b] = factors[name] = low_rank(fuse(of_name, options.epsilon), options.rank);
    Tensor mean = of_name.front().update;
    for (size_t c = 1; c < of_name.size(); ++c) mean = mean + of_name[c].update;
    report.lost += lost_share(b.mm(a), of_name) / static_cast<double>(names.size());
    report.averaged += lost_share(mean / static_cast<double>(of_name.size()), of_name) /
                       static_cast<double>(names.size());
  }
  if (world.rank() != 0) return report;
  const auto saved = save_lora(run, fingerprint, options.rank, factors);
  fs::create_directories(options.output);
  models::io::write_safetensors(options.output + "/adapter_model.safetensors", saved.tensors,
                                saved.metadata);
  write_text(options.output + "/adapter_config.json", saved.config.dump(2) + "\n");
  return report;
}

}  // namespace graft::launcher
