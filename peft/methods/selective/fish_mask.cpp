// FISH Mask: y = (W + S) x, S sparse where the Fisher information is largest.
//   Sung, Nair and Raffel 2021, arXiv:2111.09839
// F = sum over the first num_samples documents of (d log p / d W)^2, a document at a time and
// squared before anything is added up, with the true labels: the empirical Fisher, which is what
// the paper trains with. Its other choice, an expectation over labels that the model itself draws,
// takes a backward pass for each of V tokens of every position, or noise; it is not here. Nor is
// Child-Tuning D (arXiv:2109.05687), which squares the gradient of a batch, so that its mask
// depends on how documents are grouped. The keep share of all values with the largest F is trained,
// over all adapted matrices together; among equals the first. S is zero at the start. In a
// quantised base the gradient is that of the matrix it stands for. The paper lets biases, norms and
// embeddings compete too; here the linear matrices do. Mergeable; nothing off the mask moves,
// weight decay included. No HF PEFT type; with that mask it is PEFT's SHiRA.
#include <ATen/ATen.h>

#include <map>
#include <nlohmann/json.hpp>

#include "kernels/gemm/gemm.h"
#include "peft/linear_method.h"
#include "peft/sparse_delta.h"

namespace graft::peft {
namespace {

using FishMaskCounts = std::map<std::string, int64_t>;  ///< values of each slot

struct FishMaskConfig {
  Targets targets{.modules = {"all-linear"}};
  double keep = 0.005;
  int num_samples = 1024;
  FishMaskCounts counts = {};  ///< of the adapter it goes on from

  void fields(configs::Fields& f) {
    f("keep", keep, f.positive().at_most(1), "share of the values that is trained");
    f("num_samples", num_samples, f.range(1, 1 << 30),
      "documents that the Fisher information sums");
  }
  static PeftForm peft_form() { return {.ours = {"keep", "num_samples"}}; }
};

class FishMaskLinear : public SparseLinear {
 public:
  static constexpr bool kIsSparse = true;
  FishMaskLinear(const FishMaskConfig& c, const LinearSite& site, kernels::Key, at::Device device)
      : SparseLinear(site.name, "fish_places", site.info.out, site.info.in) {
    const auto options = at::TensorOptions().device(device);
    const int64_t size = in_ * out_;
    const auto known = c.counts.find(site.name);
    // Until the choice is made, the share of each matrix stands for it.
    const int64_t n = known != c.counts.end()
                          ? known->second
                          : static_cast<int64_t>(c.keep * static_cast<double>(size));
    GRAFT_CHECK(n <= size, ExitCode::kData, "peft: ", site.name, ": ", n,
                " chosen values, the matrix has ", size);
    places_ = register_buffer("fish_places", at::zeros({2, n}, options.dtype(at::kInt)));
    values_ = register_parameter("fish_values", at::zeros({n}, options.dtype(at::kFloat)));
  }
  static std::vector<Leaf> leaves() {
    return {{"fish_values", "fish_values"}, {"fish_places", "fish_places"}};
  }
  /// @param numbers  row-major, ascending
  void choose(const Tensor& numbers) {
    const Tensor places = places_of(numbers, in_, places_.device());
    places_.set_data(at::empty_like(places));
    places_.copy_(places);  // a write, by which delta_ knows that they are others
    values_.set_data(at::zeros({numbers.numel()}, values_.options().requires_grad(false)));
  }
  int64_t count() const { return values_.numel(); }
};

class FishMask : public LinearMethod<FishMaskConfig, FishMaskLinear> {
 public:
  Calibration calibration() const override {
    return {.rows = config_.num_samples, .gradients = true, .one_document = true};
  }
  std::vector<const LinearSite*> start_sites() const override { return sites_; }
  void observe(const LinearSite& site, const Observation& seen) override {
    const Tensor squares = kernels::gemm(seen.dy.t(), seen.x).square_();
    Tensor& sum = fisher_[site.name];
    sum = sum.defined() ? sum.add_(squares) : squares;
  }
  double share_chosen() const override { return config_.keep; }
  Tensor scores(const LinearSite& site) override {
    const auto sum = fisher_.extract(site.name);
    GRAFT_CHECK(!sum.empty(), ExitCode::kData,
                "peft: fish_mask: no document of data.train has a target");
    return sum.mapped().flatten().cpu();
  }
  void adopt(const LinearSite& site, const std::vector<Tensor>& numbers) override {
    adapter(site).choose(numbers.front());
  }

  void continue_from(const SavedAdapter& adapter) override {
    const nlohmann::json counts = adapter.facts.value("counts", nlohmann::json::object());
    for (const auto& [slot, count] : counts.items()) {
      GRAFT_CHECK(count.is_number_unsigned(), ExitCode::kData, "fish_mask: counts.", slot, " = ",
                  count.dump(), ", expected a number of values");
      config_.counts[slot] = count.get<int64_t>();
    }
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    LinearMethod::from_peft_config(adapter);
    continue_from(adapter);
  }
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    nlohmann::json config = LinearMethod::to_peft_config(slots);
    for (size_t i = 0; i < sites_.size(); ++i)
      config[kOwnEntries]["counts"][sites_[i]->name] = adapters_[i]->count();
    return config;
  }

 private:
  FishMaskLinear& adapter(const LinearSite& site) {
    const auto found = std::find(sites_.begin(), sites_.end(), &site);
    return *adapters_[static_cast<size_t>(found - sites_.begin())];
  }
  std::map<std::string, Tensor> fisher_;  ///< of the slots that this rank watches
};

}  // namespace

void register_fish_mask(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<FishMask>(); }});
}

}  // namespace graft::peft
