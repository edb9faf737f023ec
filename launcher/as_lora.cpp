#include "launcher/as_lora.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "kernels/random/random.h"
#include "launcher/progress.h"
#include "peft/adapter_file.h"

namespace graft::launcher {
namespace {

using at::Tensor;

/// What a slot's adapters add to its matrix, float64. Where that does not depend on the matrix it
/// is taken without one, free of its rounding.
Tensor change_of(const peft::LinearSite& site, const Tensor& w) {
  Tensor with = w, alone = at::zeros_like(w);
  for (const auto& adapter : site.slot->adapters()) {
    adapter->to(at::kDouble);
    with = adapter->merged(with);
    alone = adapter->merged(alone);
  }
  const Tensor change = with - w;
  const double rounding = 1e-13 * w.norm().item<double>();
  const double difference = (change - alone).norm().item<double>();
  return difference <= rounding ? alone : change;
}

/// Columns that span those of D: found from random combinations of them, twice as many until they
/// do, which for a low rank takes far less than D's own decomposition.
Tensor column_space(const Tensor& d) {
  constexpr int64_t kFirst = 64;
  constexpr double kRounding = 1e-12;
  const int64_t smaller = std::min(d.size(0), d.size(1));
  for (int64_t count = kFirst; count < smaller / 2; count *= 2) {
    Tensor mix = at::empty({d.size(1), count}, at::kFloat);
    kernels::uniform(mix, kernels::Key{17, static_cast<uint64_t>(count)});
    Tensor q = std::get<0>(at::linalg_qr(d.mm(mix.to(at::kDouble) - 0.5)));
    if ((d - q.mm(q.t().mm(d))).norm().item<double>() <= kRounding * d.norm().item<double>())
      return q;
  }
  return at::eye(d.size(0), d.options());
}

}  // namespace

LowRank factorised(const Tensor& change, int64_t rank) {
  constexpr double kRounding = 1e-11;  // of the largest singular value
  const Tensor q = column_space(change);
  const auto [u, s, vh] = at::linalg_svd(q.t().mm(change), /*full_matrices=*/false);
  LowRank result;
  const Tensor energy = s.square();
  const double all = energy.sum().item<double>();
  result.exact = std::max<int64_t>(1, (s > kRounding * s.max()).sum().item<int64_t>());
  const int64_t r = rank == 0 ? result.exact : std::min(rank, result.exact);
  result.lost = all == 0 ? 0 : energy.slice(0, r).sum().item<double>() / all;
  const Tensor root = s.slice(0, 0, r).sqrt();
  result.b = q.mm(u.slice(1, 0, r)) * root;
  result.a = root.unsqueeze(1) * vh.slice(0, 0, r);
  return result;
}

std::vector<const peft::LinearSite*> changed_matrices(
    const peft::SlotMap& slots, const std::string& verb,
    const std::set<const models::LinearAdapter*>& others) {
  slots.each_beside_matrices([&](const auto& site) {
    GRAFT_CHECK(
        site.slot->empty(), verb, ": an adapter acts at ", site.name,
        ", which is no matrix; only changes of matrices can be merged. Leave that adapter out, "
        "or run it beside the base with --adapter");
  });
  std::vector<const peft::LinearSite*> changed;
  for (const auto* sites : {&slots.linears, &slots.gains}) {
    for (const peft::LinearSite& site : *sites) {
      bool is_changed = false;
      for (const auto& adapter : site.slot->adapters()) {
        if (others.contains(adapter.get())) continue;
        GRAFT_CHECK(adapter->mergeable(), verb, ": the adapter at ", site.name,
                    " is not a change of its matrix alone (a bias, say) and cannot be merged");
        is_changed = true;
      }
      if (is_changed) changed.push_back(&site);
    }
  }
  return changed;
}

std::unique_ptr<peft::Peft> lora_of(models::Model& model,
                                    const std::map<const peft::LinearSite*, LowRank>& factors) {
  nlohmann::json targets = nlohmann::json::array(), pattern = nlohmann::json::object();
  std::map<std::string, Tensor> tensors;
  int64_t largest = 0;
  for (const auto& [site, low] : factors) largest = std::max(largest, low.a.size(0));
  for (const auto& [site, low] : factors) {
    const bool table = site->info.kind == models::LinearKind::kEmbedding;
    const std::string key = std::string(peft::kFilePrefix) + site->hf_path;
    tensors[key + (table ? ".lora_embedding_A" : ".lora_A.weight")] = low.a;
    tensors[key + (table ? ".lora_embedding_B" : ".lora_B.weight")] = low.b;
    targets.push_back(site->hf_path);
    if (low.a.size(0) != largest) pattern[site->hf_path] = low.a.size(0);
  }
  const nlohmann::json text{
      {"method", "lora"},      {"target_modules", targets}, {"r", largest},
      {"lora_alpha", largest}, {"rank_pattern", pattern},   {"alpha_pattern", pattern}};
  auto entry = configs::read_text<peft::MethodEntry>(text.dump(), "the LoRA to be written");
  auto lora = std::make_unique<peft::Peft>(model, at::kCPU, 0);
  lora->attach(entry);
  const at::NoGradGuard no_grad;
  for (const peft::Param& param : lora->params().all())
    Tensor(param.value).copy_(tensors.at(param.hf_key));
  return lora;
}

LoraConversion as_lora(const peft::Peft& stack, peft::BaseWeights& base,
                       std::unique_ptr<models::Model> model, int64_t rank) {
  std::map<const peft::LinearSite*, LowRank> factors;
  LoraConversion result;
  LoraReport& report = result.report;
  double all = 0, lost = 0;
  int64_t lora_elems = 0, matrix_elems = 0;
  std::string full;  // a matrix whose change has full rank
  const auto changed = changed_matrices(stack.slots(), "export");
  GRAFT_CHECK(!changed.empty(), ExitCode::kData, "export: the adapters change no matrix");
  Progress progress("converting");
  for (const peft::LinearSite* site : changed) {
    GRAFT_CHECK(site->info.kind != models::LinearKind::kGain, "export: ", site->name,
                " is the vector of a norm, and a LoRA holds changes of matrices only");
    const bool table = site->info.kind == models::LinearKind::kEmbedding;
    const Tensor change = change_of(*site, base.weight(*site).to(at::kDouble));
    const LowRank low = factorised(table ? change.t() : change, rank);
    const int64_t r = low.a.size(0), in = low.a.size(1), out = low.b.size(0);
    lora_elems += r * (in + out), matrix_elems += in * out;
    if (low.exact == std::min(in, out)) full = site->name;
    factors[site] = low;
    report.smallest_rank = factors.size() == 1 ? r : std::min(report.smallest_rank, r);
    report.largest_rank = std::max(report.largest_rank, r);
    const double energy = change.square().sum().item<double>();
    all += energy, lost += low.lost * energy;
    if (low.lost > report.most_lost) report.most_lost = low.lost, report.lost_most = site->name;
    progress.update(std::ssize(factors), std::ssize(changed));
  }
  progress.finish();
  GRAFT_CHECK(rank > 0 || lora_elems < matrix_elems, "export: a LoRA of all of it would be no ",
              "smaller than the matrices, ", lora_elems, " numbers for ", matrix_elems, ": at ",
              full, ", say, the change has full rank; give --rank N for the nearest of that rank");
  report.num_matrices = std::ssize(factors);
  report.lost = all == 0 ? 0 : lost / all;
  result.model = std::move(model);
  result.adapters = lora_of(*result.model, factors);
  return result;
}

}  // namespace graft::launcher
