// The contract's clause for a GPU: from the same seed and the same base, a CPU and a GPU compute
// the same, for every registered method on every tiny model. What is compared is the program's own
// workbench, sweep and optimiser. Needs a GPU, else every test skips itself.
#include <ATen/Context.h>

#include "launcher/workbench.h"
#include "tests/peft/all_methods.h"
#include "tests/peft/tiny.h"

namespace graft::peft {

namespace {

struct Case {
  std::string method, model, options;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.method << " on " << c.model << " " << c.options;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const char* model : {"llama", "mistral", "qwen2", "qwen3"}) {
    for (const std::string& method : registry().names()) {
      if (registry().make(method)->calibration().rows == 0)  // a random base comes without rows
        all.push_back({method, model, defaults(method)});
    }
    all.push_back({"lora", model,
                   "{target_modules: [all-linear, embed], lora_dropout: 0.25, bias: all,"
                   " modules_to_save: head}"});
  }
  return all;
}

launcher::Run run_of(const Case& c, const std::string& dtype) {
  launcher::Run run;
  run.model.name_or_path = GRAFT_SOURCE_DIR "/configs/models/tiny_" + c.model + ".yaml";
  run.model.weights = "random";
  run.model.dtype = dtype;
  if (c.method == "full") run.model.quantization = "none";
  run.peft = {{c.method, registry().make(c.method), {}}};
  read_fields(*run.peft.front().method, c.options);
  return run;
}

/// A lane of packed rows: two documents each, the second row padded. The CPU takes documents one by
/// one, the GPU masks them.
models::Lane packed_lane(int64_t number) {
  models::Lane lane = make_lane(number);
  data::Batch& batch = lane.batch;
  batch.documents_BL.slice(1, 7).fill_(1);
  batch.positions_BL.slice(1, 7).sub_(7);
  batch.documents_BL[1].slice(0, 10).fill_(-1);
  const Tensor ends = batch.documents_BL.ne(batch.documents_BL.roll(-1, 1));
  batch.labels_BL.masked_fill_(ends.logical_or(batch.documents_BL.lt(0)), -100);
  batch.num_targets = batch.labels_BL.ge(0).sum().item<int64_t>();
  return lane;
}

/// What a sweep over two lanes computes.
struct Sweep {
  double loss = 0;   ///< mean over the targets
  Tensor gradients;  ///< of all parameters, one after the other
  Tensor logits;     ///< of both lanes
};

/// A base with adapters on one device, and its training.
class Twin {
 public:
  Twin(const Case& c, at::Device device, const std::string& dtype) : run_(run_of(c, dtype)) {
    world_.host = dist::make_single_comm();
    world_.device = device;
    bench_ = std::make_unique<launcher::Workbench>(launcher::build_workbench(world_, run_));
    const at::NoGradGuard no_grad;
    for (const Param& p : params().all()) {  // none at a special value: B of LoRA is zero
      Tensor(p.value).add_(fill(p.name, p.value.sizes(), 0.3).to(device));
    }
    bench_->adapters->publish();
    optimizer_ = std::make_unique<launcher::AdamW>(params());
    gradients_ = std::make_unique<launcher::Gradients>(params(), bench_->model->num_stages(), 2,
                                                       launcher::Reduction::kTree, &world_.comm());
  }

  std::string base_hash() const { return bench_->store->hash(); }

  Sweep sweep() {
    std::vector<models::Lane> lanes = {make_lane(0), packed_lane(1)};
    int64_t num_targets = 0;
    for (models::Lane& lane : lanes) {  // as the trainer does: documents stay on the host
      data::Batch& batch = lane.batch;
      for (Tensor* t : {&batch.tokens_BL, &batch.positions_BL, &batch.labels_BL})
        *t = t->to(world_.device);
      num_targets += batch.num_targets;
    }
    models::Pass pass;
    pass.want = models::Want::kLogits;
    Sweep result;
    result.logits = at::cat(bench_->trunk->forward(lanes, pass));
    models::TrunkOptions options;
    options.random = kernels::derive({7, 1}, optimizer_->num_steps());
    options.lowest_trained = params().lowest_stage();
    bench_->trunk->sweep(lanes, *gradients_, options);
    gradients_->reduce(*world_.host, static_cast<double>(num_targets));
    std::vector<Tensor> flat;
    for (const Tensor& gradient : gradients_->of()) flat.push_back(gradient.flatten());
    result.gradients = at::cat(flat);
    result.loss = (lanes[0].loss_sum + lanes[1].loss_sum) / static_cast<double>(num_targets);
    return result;
  }

  Sweep after_steps(int num_steps) {
    for (int i = 0; i < num_steps; ++i) {
      sweep();
      const StepInfo info{optimizer_->num_steps(), 100};
      bench_->adapters->after_reduce(info);
      optimizer_->step(gradients_->of(), 1e-2);
      bench_->adapters->after_step(info);
    }
    return sweep();
  }

 private:
  const ParamSet& params() const { return bench_->adapters->params(); }

  launcher::Run run_;
  launcher::World world_;
  std::unique_ptr<launcher::Workbench> bench_;
  std::unique_ptr<launcher::AdamW> optimizer_;
  std::unique_ptr<launcher::Gradients> gradients_;
};

/// |a - b| / |b|, Euclidean.
double distance(const Tensor& a, const Tensor& b) {
  const Tensor exact = b.detach().cpu().to(at::kDouble);
  return ((a.detach().cpu().to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
}

void expect_near(const Sweep& actual, const Sweep& expected, double tolerance) {
  EXPECT_NEAR(actual.loss, expected.loss, tolerance * expected.loss);
  EXPECT_LE(distance(actual.logits, expected.logits), tolerance);
  EXPECT_LE(distance(actual.gradients, expected.gradients), tolerance);
}

class CudaContract : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "no GPU here";
    at::set_num_threads(1);  // tiny products
  }
  static Twin twin(at::Device device, const std::string& dtype) {
    return {GetParam(), device, dtype};
  }
};

TEST_P(CudaContract, BaseHasTheSameBytes) {
  EXPECT_EQ(twin(at::kCUDA, "float32").base_hash(), twin(at::kCPU, "float32").base_hash());
}

TEST_P(CudaContract, Float32AgreesBeforeTheFirstStep) {
  expect_near(twin(at::kCUDA, "float32").sweep(), twin(at::kCPU, "float32").sweep(), 2e-5);
}

// AdamW divides by the size of a gradient, so it magnifies what rounding leaves of a small one.
TEST_P(CudaContract, Float32AgreesAfterTwoSteps) {
  const Sweep gpu = twin(at::kCUDA, "float32").after_steps(2);
  expect_near(gpu, twin(at::kCPU, "float32").after_steps(2), 1e-4);
}

// How far bfloat16 may be from float32 is what it is on the CPU, where it is rounded elsewhere.
TEST_P(CudaContract, Bfloat16IsAsNearToFloat32AsOnTheCpu) {
  const Sweep exact = twin(at::kCPU, "float32").after_steps(2);
  const Sweep cpu = twin(at::kCPU, "bfloat16").after_steps(2);
  const Sweep gpu = twin(at::kCUDA, "bfloat16").after_steps(2);
  EXPECT_LE(distance(gpu.logits, exact.logits), 2 * distance(cpu.logits, exact.logits));
  EXPECT_LE(distance(gpu.gradients, exact.gradients), 2 * distance(cpu.gradients, exact.gradients));
}

INSTANTIATE_TEST_SUITE_P(Methods, CudaContract, testing::ValuesIn(cases()), [](const auto& info) {
  const bool is_default = info.param.options == defaults(info.param.method);
  return info.param.method + (is_default ? "" : "2") + "_" + info.param.model;
});

}  // namespace
}  // namespace graft::peft
