// What adapters cost in a training step of the SmolLM2-135M shape, 1 x 512 tokens, NF4 base: LoRA
// r 16 on all linears over the bare step, in which gradients flow through the frozen model to its
// input and nothing is trained; and frozen LoRAs under the trained one, as one product and nested.
// All in one process and in turns, so compare the rows of a run. Beside a row's time over that
// of the bare step stands its arithmetic over the bare step's. Usage: lora_bench [threads [rounds]]
#include <ATen/Parallel.h>

#include <chrono>
#include <cstdio>

#include "tests/peft/tiny.h"

namespace {

using namespace graft;

constexpr int64_t kTokens = 512;
constexpr double kLinears = 30 * 576.0 * (576 + 2 * 192 + 576 + 3 * 1536);
constexpr double kHead = 576.0 * 49152;
constexpr double kAdapter = 30 * 16.0 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536));
/// Of a token: forward and input gradient of the frozen matrices, causal attention.
constexpr double kBareFlops = 4 * (kLinears + kHead) + 3.5 * 2 * kTokens * 576 * 30;

/// Takes no gradient of any parameter.
struct NoGradients : models::GradientSink {
  const std::vector<at::Tensor>& parameters(int) const override { return none; }
  void add(int, const models::Lane&, std::vector<at::Tensor>) override {}
  void stage_done(int) override {}
  std::vector<at::Tensor> none;
};

struct Row {
  const char* name = "";
  int num_frozen = 0;
  bool nested = false, trained = false;
  double flops = 0;  ///< of a token
  double best_ms = 1e30;
  std::unique_ptr<peft::Tiny> tiny;
};

models::Lane lane() {
  const at::Tensor tokens = (at::arange(kTokens) * 37 + 11).remainder(49151).view({1, kTokens});
  return {peft::make_batch(tokens, tokens), 0};
}

std::shared_ptr<peft::Method> lora() {
  std::shared_ptr<peft::Method> method = peft::methods().make("lora");
  peft::read_fields(*method, "{r: 16, lora_alpha: 32, target_modules: all-linear}");
  return method;
}

std::unique_ptr<peft::Tiny> make(const Row& row, at::ScalarType dtype, const std::string& frozen) {
  auto tiny = std::make_unique<peft::Tiny>(
      models::read_base_config(GRAFT_SOURCE_DIR "/configs/models/smollm2_135m.yaml"));
  for (int i = 0; i < row.num_frozen; ++i) tiny->adapters.attach_frozen(frozen);
  if (row.nested) {
    for (const auto& site : tiny->adapters.slots().linears) {
      std::vector<std::shared_ptr<models::LinearAdapter>> apart;
      for (const auto& [owner, adapter] : site.slot->frozen()) apart.push_back(adapter);
      site.slot->run_frozen(apart);
    }
  }
  if (row.trained) tiny->attach("lora", lora());
  models::LoadOptions options;
  options.compute_dtype = dtype;
  tiny->load(options);
  return tiny;
}

/// A step as the trainer takes it; without anything to train a sweep down to the embedding.
void step(peft::Tiny& tiny) {
  std::vector<models::Lane> lanes{lane()};
  if (!tiny.params().empty()) {
    tiny.step(lanes, 1);
    return;
  }
  NoGradients sink;
  tiny.trunk->sweep(lanes, sink, models::TrunkOptions{});
}

double run_ms(peft::Tiny& tiny) {
  const auto start = std::chrono::steady_clock::now();
  step(tiny);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

void bench(at::ScalarType dtype, const std::string& frozen, int threads, int rounds) {
  constexpr double kTrained = kBareFlops + 6 * kAdapter;
  std::vector<Row> rows;
  const auto add = [&](const char* name, int num_frozen, bool nested, bool trained, double flops) {
    Row& row = rows.emplace_back();
    row.name = name, row.num_frozen = num_frozen, row.nested = nested;
    row.trained = trained, row.flops = flops;
  };
  add("bare: gradient to the input only", 0, false, false, kBareFlops);
  add("LoRA r 16", 0, false, true, kTrained);
  add("LoRA r 16 over 1 frozen", 1, false, true, kTrained + 4 * kAdapter);
  add("LoRA r 16 over 8 frozen", 8, false, true, kTrained + 32 * kAdapter);
  add("LoRA r 16 over 8 frozen, nested", 8, true, true, kTrained + 32 * kAdapter);
  for (Row& row : rows) row.tiny = make(row, dtype, frozen);
  at::set_num_threads(threads);
  for (int round = -1; round < rounds; ++round) {  // round -1 warms up
    for (Row& row : rows) {
      const double ms = run_ms(*row.tiny);
      if (round >= 0) row.best_ms = std::min(row.best_ms, ms);
    }
  }
  for (const Row& row : rows) {
    std::printf("%-10s %-34s %10.1f %8.3f %8.3f\n", at::toString(dtype), row.name, row.best_ms,
                row.flops / kBareFlops, row.best_ms / rows[0].best_ms);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::stoi(argv[1]) : 2, rounds = argc > 2 ? std::stoi(argv[2]) : 7;
  const models::io::TestFolder folder;
  {
    peft::Tiny saved(
        models::read_base_config(GRAFT_SOURCE_DIR "/configs/models/smollm2_135m.yaml"));
    saved.attach("lora", lora());
    saved.load();
    saved.jitter();
    saved.save(folder.path());
  }
  std::printf("%-10s %-34s %10s %8s %8s   (over bare; best of %d, %d threads)\n", "compute", "step",
              "ms", "flops", "time", rounds, threads);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16})
    bench(dtype, folder.path(), threads, rounds);
}
