// SHiRA: y = (W + S) x, S sparse.      Bhardwaj et al. 2024, "Sparse High Rank Adapters",
//                                      arXiv:2406.13175
// Trains r (in + out) values of S (zeros: the model is unchanged at step 0), as many as LoRA of
// rank r. Their places are drawn once and saved; the mask is the paper's SHiRA-Rand, its others can
// be read from files. Mergeable. Builds S in every pass: r (in + out) scattered products a token
// are no faster than the matrix product. Fields and files are those of HF PEFT's ShiraConfig; with
// a random_seed the places are PEFT's.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/sparse_delta.h"

namespace graft::peft {
namespace {

struct ShiraConfig {
  Targets targets;
  int r = 32;
  std::optional<int> random_seed;
  bool init_weights = true;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 1 << 20), "r (in + out) values are trained");
    f("random_seed", random_seed, f.at_least(0),
      "of the places, the same ones in slots of one shape; null: the run's seed and the slot");
    f("init_weights", init_weights, "false: normal numbers, not as the base");
  }
  static PeftForm peft_form() { return {.type = "SHIRA", .inert = {"mask_type"}}; }
  bool starts_as_base() const { return init_weights; }
};

class ShiraLinear : public SparseLinear {
 public:
  static constexpr bool kIsSparse = true;
  ShiraLinear(const ShiraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : SparseLinear(site.name, "shira_indices", site.info.out, site.info.in) {
    const int64_t n = c.r * (in_ + out_);
    GRAFT_CHECK(n <= in_ * out_, "peft: ", site.name, ": r = ", c.r, " means ", n,
                " values, the matrix has ", in_ * out_, "; r is at most ",
                in_ * out_ / (in_ + out_));
    const uint64_t seed = c.random_seed ? static_cast<uint64_t>(*c.random_seed) : random.stream;
    const Tensor numbers = std::get<0>(first_of_randperm(in_ * out_, n, seed).sort());
    places_ = register_buffer("shira_indices", places_of(numbers, in_, device));
    values_ = register_parameter("shira_weight",
                                 draw_normal({n}, c.init_weights ? 0 : 1, random, device));
  }
  static std::vector<Leaf> leaves() {
    return {{"shira_weight", "shira_weight"}, {"shira_indices", "shira_indices"}};
  }
};

}  // namespace

void register_shira(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<ShiraConfig, ShiraLinear>>(); }});
}

}  // namespace graft::peft
