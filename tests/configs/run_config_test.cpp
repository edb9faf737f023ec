// RunConfig: the example of the interface, its rules, and that a dump reads back.
#include "launcher/run_config.h"

#include <gtest/gtest.h>

#include "configs/check.h"

namespace graft::launcher {
namespace {

// The sections of the documented example that RunConfig holds, value for value.
constexpr const char* kExample = R"(schema: 1
model:
  name_or_path: models/smollm2-135m-instruct.gguf
  quantization: nf4
  double_quantization: true
  dtype: auto
  weights: load
  revision: null
  adapters: []
data:
  train: [data/cache/python-docs/train-*.h5]
  eval: [data/cache/python-docs/eval-*.h5]
  max_length: 256
  packing: true
  shuffle: true
train:
  task: causal_lm
  max_steps: 40
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 1
  learning_rate: 2.0e-4
  lr_scheduler_type: cosine
  warmup_ratio: 0.03
  weight_decay: 0.0
  max_grad_norm: 1.0
  optim: adamw
  gradient_checkpointing: false
  seed: 42
parallel:
  shard: auto
  prefetch_blocks: 1
  lanes_per_gather: auto
  reduction: auto
  threads_per_rank: auto
checkpoint: {output_dir: runs/quickstart, save_steps: 20, save_total_limit: 2}
log: {logging_steps: 1}
eval: {eval_steps: 0, per_device_eval_batch_size: 8, max_samples: 500, metrics: [loss], load_best_model_at_end: false}
)";

// The shortest file that trains.
constexpr const char* kShortest =
    "schema: 1\nmodel: {name_or_path: m.gguf}\ndata: {train: t.h5}\ntrain: {max_steps: 1}\n";

RunConfig read(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return configs::read_text<RunConfig>(text, "run.yaml", overrides);
}

std::string problems_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  try {
    read(text, overrides);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(RunConfig, TheDocumentedExampleIsTheDefaults) {
  EXPECT_EQ(configs::dump(read(kExample)),
            configs::dump(read(
                kShortest, {"model.name_or_path=models/smollm2-135m-instruct.gguf",
                            "data.train=[data/cache/python-docs/train-*.h5]",
                            "data.eval=[data/cache/python-docs/eval-*.h5]", "train.max_steps=40",
                            "checkpoint.output_dir=runs/quickstart", "model.adapters=[]"})));
}

TEST(RunConfig, ADumpReadsBackToItself) {
  for (const char* text : {kExample, kShortest}) {
    const std::string once = configs::dump(read(text));
    EXPECT_EQ(configs::dump(read(once)), once);
  }
}

TEST(RunConfig, RulesNameTheLine) {
  EXPECT_EQ(
      problems_of("data: {}\n"),
      "run.yaml:1:1: schema: is missing: write `schema: 1`\n"
      "run.yaml:1:1: model.name_or_path: is missing: the path of a Hugging Face directory or a "
      "GGUF file\n"
      "run.yaml:1:1: data.train: is missing: the shards to train on (or data.eval, for an "
      "evaluation only)");
  const std::pair<const char*, const char*> kCases[] = {
      {"schema=2", "command line: schema: expected an integer equal to 1, got '2'"},
      {"train.max_steps=null",
       "command line: train.max_steps: is missing: set train.max_steps or train.num_train_epochs"},
      {"train.num_train_epochs=2",
       "command line: train.num_train_epochs: is set beside max_steps: set one of them to null"},
      {"train.per_device_train_batch_size=0",
       "command line: train.per_device_train_batch_size: expected an integer from 1 to 2147483647, "
       "got '0'"},
      {"train.warmup_ratio=1.5",
       "command line: train.warmup_ratio: expected a number from 0 to 1, got '1.5'"},
      {"train.optim=adam",
       "command line: train.optim: expected one of adamw, adamw_8bit, paged_adamw_32bit, "
       "paged_adamw_8bit, sgd, lion, got 'adam'; did you mean 'adamw'?"},
      {"train.learning_rte=1",
       "command line: train.learning_rte: unknown key; did you mean 'learning_rate'?"},
      {"data.max_length=1e7",
       "command line: data.max_length: expected an integer from 1 to 1048576, got '1e7'"},
      {"eval.eval_steps=5",
       "command line: eval.eval_steps: is above 0 but data.eval names no shards"},
      {"eval.load_best_model_at_end=true",
       "command line: eval.load_best_model_at_end: needs eval.eval_steps above 0: there is no best "
       "without evaluations"},
  };
  for (const auto& [assignment, message] : kCases) {
    EXPECT_EQ(problems_of(kShortest, {assignment}), message);
  }
}

TEST(RunConfig, TrainingNeedsStepsOrEpochsAtItsSection) {
  const std::string text =
      "schema: 1\nmodel: {name_or_path: m}\ndata: {train: t.h5}\ntrain:\n  seed: 1\n";
  EXPECT_EQ(problems_of(text),
            "run.yaml:4:1: train.max_steps: is missing: set train.max_steps or "
            "train.num_train_epochs");
  EXPECT_EQ(problems_of(text, {"train.num_train_epochs=0.5"}), "");
}

TEST(RunConfig, AnEvaluationNeedsNoSteps) {
  EXPECT_EQ(problems_of("schema: 1\nmodel: {name_or_path: m}\ndata: {eval: [e.h5]}\n"), "");
}

TEST(RunConfig, KeysOfUnbuiltFeaturesAreUnknown) {
  const std::string text =
      problems_of(kShortest, {"continual.policy=stack", "log.tensorboard=true"});
  EXPECT_NE(text.find("command line: continual: unknown key"), std::string::npos);
  EXPECT_NE(text.find("command line: log.tensorboard: unknown key"), std::string::npos);
}

}  // namespace
}  // namespace graft::launcher
