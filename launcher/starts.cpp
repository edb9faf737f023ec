#include "launcher/starts.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <span>

#include "configs/check.h"
#include "configs/names.h"
#include "dist/top_k.h"
#include "launcher/progress.h"
#include "peft/observer.h"

namespace graft::launcher {
namespace {

using at::Tensor;

constexpr size_t kLanesPerPass = 2;

class SourceMatrix : public peft::PlainMatrix {
 public:
  SourceMatrix(const StartInputs& inputs, const models::MatchedWeight& item)
      : inputs_(inputs), item_(item) {}
  Tensor dense() override {
    return models::read_matrix(item_, inputs_.source, inputs_.model.info().head_dim)
        .to(inputs_.device, at::kFloat);
  }
  Tensor stored(const Tensor& w) override {
    return models::stored(item_, w.cpu(), inputs_.options).to(inputs_.device, at::kFloat);
  }
  int stored_bits() const override {
    switch (inputs_.options.quantization) {
      case models::Quantization::kNone:
        return 32;
      case models::Quantization::kInt8:
        return 8;
      default:
        return 4;
    }
  }

 private:
  const StartInputs& inputs_;
  const models::MatchedWeight& item_;
};

peft::Calibration calibration_of(const std::vector<peft::Peft::Start>& starts) {
  peft::Calibration all;
  std::string before;
  for (const auto& start : starts) {
    const peft::Calibration one = start.method->calibration();
    GRAFT_CHECK(one.rows == 0 || all.rows == 0 || one.one_document == all.one_document,
                "peft: ", one.one_document ? start.name : before,
                " looks at one document at a time and cannot be combined with ",
                one.one_document ? before : start.name,
                ", which looks at micro-batches of the run; start one of them in a run before and "
                "go on with init_from");
    if (one.rows > 0) before = start.name;
    all.one_document = all.one_document || one.one_document;
    all.rows = std::max(all.rows, one.rows);
    all.gradients = all.gradients || one.gradients;
  }
  return all;
}

/// Runs the rows through the base and shows what passes the slots `mine`.
void observe(const StartInputs& inputs, const std::vector<peft::Peft::Start>& starts,
             const std::vector<peft::Peft::Start>& mine, const peft::Calibration& wanted) {
  int lowest = inputs.model.num_stages() - 1;
  for (const auto& start : starts) lowest = std::min(lowest, start.site->stage);
  models::Trunk& trunk = inputs.load_base();
  std::vector<models::Lane> lanes = inputs.rows(wanted);
  const int64_t rows_per_lane = lanes.empty() ? 1 : lanes.front().batch.tokens_BL.size(0);
  std::vector<peft::Observer::Seen> seen;
  const std::string prompts = configs::join(inputs.adapters.prompts(), " and ");
  for (const auto& start : mine) {  // each sees as many as it asked for, whatever others want
    const int64_t rows = start.method->calibration().rows;
    const int64_t lanes_left = (rows + rows_per_lane - 1) / rows_per_lane;
    const auto see = [start, left = lanes_left](const peft::Observation& observation) mutable {
      if (left-- > 0) start.method->observe(*start.site, observation);
    };
    seen.push_back({start.site, see, start.name, prompts});
  }
  peft::Observer observer(
      std::move(seen), inputs.model.num_stages(),
      wanted.gradients ? peft::Observer::Gradients::kYes : peft::Observer::Gradients::kNo);
  models::TrunkOptions options;
  options.recompute = models::Recompute::kOn;
  options.training = false;
  options.lowest_trained = lowest;
  Progress progress("looking at the first rows");
  for (size_t first = 0; first < lanes.size(); first += kLanesPerPass) {
    const std::span group =
        std::span(lanes).subspan(first, std::min(kLanesPerPass, lanes.size() - first));
    if (wanted.gradients) {
      trunk.sweep(group, observer, options);
    } else {
      trunk.forward(group, {});
    }
    progress.update(static_cast<int64_t>(first + group.size()), static_cast<int64_t>(lanes.size()));
  }
  progress.finish();
}

/// Every rank gets the tensors of `owner`, on the CPU.
std::vector<Tensor> broadcast(dist::Comm& host, std::vector<Tensor> values, int owner) {
  nlohmann::json layout = nlohmann::json::array();
  for (Tensor& value : values) {
    value = value.detach().cpu().contiguous();
    layout.push_back({static_cast<int>(value.scalar_type()), value.sizes().vec()});
  }
  layout = nlohmann::json::parse(dist::broadcast_text(host, layout.dump(), owner));
  values.resize(layout.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if (host.rank() != owner) {
      values[i] = at::empty(layout[i][1].get<std::vector<int64_t>>(),
                            static_cast<at::ScalarType>(layout[i][0].get<int>()));
    }
    if (values[i].numel() > 0) host.broadcast(values[i], owner, dist::Traffic::kControl);
  }
  return values;
}

/// Methods that choose among all their slots' values: each rank brings the scores of the slots that
/// it watched, and all get the same places.
void choose(const StartInputs& inputs, const std::vector<peft::Peft::Start>& starts,
            const std::function<int(size_t)>& owner) {
  // In the order of the run, which all ranks share: what follows is collective.
  std::vector<std::pair<peft::Method*, std::vector<size_t>>> choosing;
  for (size_t i = 0; i < starts.size(); ++i) {
    peft::Method* method = starts[i].method;
    if (method->share_chosen() <= 0) continue;
    if (choosing.empty() || choosing.back().first != method) choosing.push_back({method, {}});
    choosing.back().second.push_back(i);
  }
  for (const auto& [method, members] : choosing) {
    int64_t total = 0;
    std::vector<dist::CutVector> scores;
    for (const size_t i : members) {
      const peft::LinearSite& site = *starts[i].site;
      const int64_t numel = site.info.in * site.info.out;
      total += numel;
      std::vector<dist::Slice> slices;
      for (int r = 0; r < inputs.host.size(); ++r)
        slices.push_back({r > owner(i) ? numel : 0, r < owner(i) ? 0 : numel});
      const bool mine = owner(i) == inputs.host.rank();
      scores.push_back({numel, slices, mine ? method->scores(site) : at::empty({0})});
    }
    const double share = method->share_chosen();
    const auto count = static_cast<int64_t>(share * static_cast<double>(total));
    GRAFT_CHECK(count > 0, "peft: a share of ", share, " of ", total, " values is less than one");
    const auto places = dist::global_top_k(inputs.host, scores, count);
    for (size_t k = 0; k < members.size(); ++k)
      method->adopt(*starts[members[k]].site, {places[k]});
  }
}

}  // namespace

void set_starts(const StartInputs& inputs) {
  const auto starts = inputs.adapters.starts();
  if (starts.empty()) return;
  const auto owner = [&](size_t i) {
    return static_cast<int>(i % static_cast<size_t>(inputs.host.size()));
  };
  std::vector<peft::Peft::Start> mine;
  for (size_t i = 0; i < starts.size(); ++i) {
    if (owner(i) == inputs.host.rank()) mine.push_back(starts[i]);
  }
  const peft::Calibration wanted = calibration_of(starts);
  if (wanted.rows > 0) observe(inputs, starts, mine, wanted);

  const at::NoGradGuard no_grad;
  choose(inputs, starts, owner);
  const auto weights = models::match_weights(inputs.model, inputs.source);
  Progress progress("first values");
  for (size_t i = 0; i < starts.size(); ++i) {
    peft::Method* method = starts[i].method;
    const peft::LinearSite* site = starts[i].site;
    if (method->share_chosen() > 0) continue;
    const auto item = [&] {
      const auto named = [&](const std::string& name) {
        return std::find_if(weights.begin(), weights.end(),
                            [&](const auto& weight) { return weight.name == name; });
      };
      const auto own = named(site->name + ".weight");  // a tied head has none
      return own == weights.end() ? named("embed.weight") : own;
    }();
    std::vector<Tensor> values;
    if (owner(i) == inputs.host.rank()) {
      SourceMatrix matrix(inputs, *item);
      values = method->start(*site, matrix);
    }
    method->adopt(*site, broadcast(inputs.host, std::move(values), owner(i)));
    progress.update(static_cast<int64_t>(i + 1), static_cast<int64_t>(starts.size()));
  }
  progress.finish();
  inputs.adapters.adopted();
}

}  // namespace graft::launcher
