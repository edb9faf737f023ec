#include "launcher/fuse.h"

#include <ATen/ATen.h>

#include <map>

#include "configs/check.h"
#include "configs/log.h"
#include "launcher/adapter_folder.h"
#include "launcher/as_lora.h"
#include "launcher/checkpoint/folder.h"
#include "launcher/evaluate.h"
#include "launcher/workbench.h"
#include "models/base.h"
#include "peft/observer.h"

namespace graft::launcher {
namespace {

using at::Tensor;

/// Names of the linear layers that any of the adapters changes, in the model's order.
std::vector<std::string> matrices_changed_by(const std::string& base, const FuseOptions& options) {
  const auto model = models::make_model(models::read_base_config(base));
  peft::Peft adapters(*model, at::kCPU, 0);
  attach_all(adapters, options.adapters);
  std::vector<std::string> names;
  for (const peft::LinearSite* site : changed_matrices(adapters.slots(), "fuse")) {
    GRAFT_CHECK(site->info.kind == models::LinearKind::kLinear, "fuse: the adapter at ", site->name,
                " changes no linear layer; nothing else can be fused");
    GRAFT_CHECK(options.rank <= std::min(site->info.in, site->info.out), "fuse: --rank ",
                options.rank, " is larger than ", site->name, ", ", site->info.out, " x ",
                site->info.in);
    names.push_back(site->name);
  }
  GRAFT_CHECK(!names.empty(), ExitCode::kData, "fuse: the adapters change no matrix");
  return names;
}

using Parts = std::map<std::string, std::vector<FusionPart>>;

/// Runs one adapter over its data and adds what it does to `parts`. @return the base's fingerprint
std::string add_concept(World& world, Run run, const FuseOptions& options, size_t number,
                        const std::vector<std::string>& names, Parts& parts) {
  run.peft.clear();
  add_adapter(run.model, options.adapters[number]);
  run.data.eval = options.data[number].c_str();
  Workbench bench = build_workbench(world, run);
  std::vector<const peft::LinearSite*> sites;
  std::vector<peft::Observer::Seen> seen;
  std::vector<Tensor> grams;
  for (const std::string& name : names) {
    sites.push_back(bench.adapters->slots().find_linear(name));
    const int64_t in = sites.back()->info.in;
    grams.push_back(at::zeros({in, in}, at::TensorOptions().device(world.device)));
    seen.push_back({sites.back(), [gram = grams.back()](const peft::Observation& observed) {
                      gram.add_(observed.x.t().mm(observed.x));
                    }});
  }
  log::info("fusing: " + options.adapters[number] + " over " + options.data[number]);
  {
    const peft::Observer observer(std::move(seen), bench.model->num_stages(),
                                  peft::Observer::Gradients::kNo);
    evaluate(bench, run);
  }
  const auto base = bench.base_weights();
  for (size_t i = 0; i < names.size(); ++i) {
    const Tensor w = base->weight(*sites[i]);
    Tensor merged = w;
    for (const auto& adapter : sites[i]->slot->adapters()) merged = adapter->merged(merged);
    world.comm().all_reduce(grams[i], dist::Traffic::kControl);
    parts[names[i]].push_back({(merged - w).cpu(), grams[i].cpu()});
  }
  return bench.fingerprint;
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
  check_unused("fuse", options.output);
  const auto names = matrices_changed_by(run.model.name_or_path, options);
  Parts parts;
  std::string fingerprint;
  for (size_t c = 0; c < options.adapters.size(); ++c)
    fingerprint = add_concept(world, run, options, c, names, parts);

  FuseReport report{names.size()};
  const auto model = models::make_model(models::read_base_config(run.model.name_or_path));
  const peft::SlotMap slots(*model);
  std::map<const peft::LinearSite*, LowRank> factors;
  for (const std::string& name : names) {
    const auto& of_name = parts.at(name);
    const LowRank low = factorised(fuse(of_name, options.epsilon), options.rank);
    factors[slots.find_linear(name)] = low;
    Tensor mean = of_name.front().update;
    for (size_t c = 1; c < of_name.size(); ++c) mean = mean + of_name[c].update;
    report.lost += lost_share(low.b.mm(low.a), of_name) / static_cast<double>(names.size());
    report.averaged += lost_share(mean / static_cast<double>(of_name.size()), of_name) /
                       static_cast<double>(names.size());
  }
  if (world.rank() != 0) return report;
  const peft::BaseFacts base{run.model.name_or_path, "CAUSAL_LM", fingerprint};
  FolderReplacement folder(options.output);
  const auto saved = lora_of(*model, factors)->save(0, base);
  write_adapter_files(folder.partial_path(), saved, saved.metadata);
  folder.commit();
  return report;
}

}  // namespace graft::launcher
