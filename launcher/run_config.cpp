// The fields of each section, in the order of the file, with the rules that tie them together.
#include "launcher/run_config.h"

#include "launcher/optim/names.h"

namespace graft::launcher {

void ModelConfig::fields(Fields& f) {
  f("name_or_path", name_or_path, "Hugging Face directory or GGUF file");
  f.require(!name_or_path.empty(), "name_or_path",
            "is missing: the path of a Hugging Face directory or a GGUF file");
  f("quantization", quantization, f.one_of({"none", "nf4", "fp4", "int8"}),
    "how the frozen weights are stored");
  f("double_quantization", double_quantization, "also quantise the scales of 4-bit weights");
  f("dtype", dtype, f.one_of({"auto", "float32", "bfloat16"}),
    "compute type; auto: bfloat16 on a GPU, float32 on a CPU");
  f("weights", weights, f.one_of({"load", "random"}),
    "random: for benchmarks and tests, name_or_path may then be a shape");
  f("revision", revision, "revision of the model, recorded with the run");
  f("adapters", adapters, "PEFT directories kept frozen and live under what is trained");
  f("adapter_weights", adapter_weights,
    "how much of what each of adapters adds counts; empty: all of it");
  f.require(adapter_weights.empty() || adapter_weights.size() == adapters.values.size(),
            "adapter_weights", "needs one number for each of model.adapters");
  f("adapter_names", adapter_names, "what active_adapters calls them; empty: their directories");
  f.require(adapter_names.empty() || adapter_names.size() == adapters.values.size(),
            "adapter_names", "needs one name for each of model.adapters");
  f("active_adapters", active_adapters, "names of those that run; null: all");
  f("any_base", any_base,
    "true: adapters and init_from may have been trained on a base with another fingerprint");
}

void DataConfig::fields(Fields& f) {
  f("train", train, "shards to train on; globs allowed");
  f("eval", eval, "held-out shards; globs allowed");
  f.require(!train.values.empty() || !eval.values.empty(), "train",
            "is missing: the shards to train on (or data.eval, for an evaluation only)");
  f("max_length", max_length, f.range(1, 1 << 20), "tokens; longer documents are cut and counted");
  f("packing", packing,
    "several documents a row, which never see each other; false: one a row, padded");
  f("shuffle", shuffle, "false: rows in file order");
  f("on_bad_sample", on_bad_sample, f.one_of({"stop", "skip"}),
    "an unreadable row ends the run, or is skipped by all ranks and recorded");
}

void TrainConfig::fields(Fields& f) {
  f("task", task, f.one_of({"causal_lm", "sequence_classification", "token_classification"}),
    "what is learnt: the next token, a label of the document or of each token");
  f("max_steps", max_steps, f.at_least(1), "optimiser steps; or num_train_epochs, not both");
  f("num_train_epochs", num_train_epochs, f.positive(), "passes over data.train");
  f.require(!(max_steps && num_train_epochs), "num_train_epochs",
            "is set beside max_steps: set one of them to null");
  f("per_device_train_batch_size", per_device_train_batch_size, f.at_least(1),
    "rows of a micro-batch (lane)");
  f("gradient_accumulation_steps", gradient_accumulation_steps, f.at_least(1),
    "micro-batches of a rank in one step");
  f("learning_rate", learning_rate, f.positive(), "peak learning rate");
  f("lr_scheduler_type", lr_scheduler_type, f.one_of({"constant", "linear", "cosine", "wsd"}),
    "how the learning rate moves after the warm-up");
  f("warmup_ratio", warmup_ratio, f.range(0, 1), "share of the steps that warm up");
  f("weight_decay", weight_decay, f.at_least(0), "decoupled weight decay");
  f("max_grad_norm", max_grad_norm, f.at_least(0), "gradients are clipped to this norm; 0: never");
  f("optim", optim, f.one_of(step_rule_names()),
    "optimiser; paged: its state in the host's memory, 8bit: in a quarter of it");
  f("adam_beta1", adam_beta1, f.range(0, 1).below(1),
    "of the first moment; of lion: what its sign is taken of");
  f("adam_beta2", adam_beta2, f.range(0, 1).below(1),
    "of the second moment; of lion: of its only one (the paper's is 0.99)");
  f("adam_epsilon", adam_epsilon, f.at_least(0), "added to the root of the second moment");
  f("gradient_checkpointing", gradient_checkpointing, "recompute: time for memory");
  f("seed", seed, f.at_least(0), "of everything random");
}

void ParallelConfig::fields(Fields& f) {
  f("shard", shard, f.one_of({"auto", "replicate", "node", "world"}),
    "where the frozen base is cut up");
  f("prefetch_blocks", prefetch_blocks, f.range(0, 1), "blocks gathered ahead of use");
  f("lanes_per_gather", lanes_per_gather, f.at_least(1),
    "micro-batches that share one gather of each block; auto: all that fit");
  f("reduction", reduction, f.one_of({"auto", "tree", "nccl"}),
    "tree: the same bits at any world size; nccl: fastest");
  f("threads_per_rank", threads_per_rank, f.range(1, 4096),
    "CPU threads; equal results are promised for equal threads");
  f("timeout_s", timeout_s, f.range(5, 1'000'000),
    "seconds that a rank may wait for another inside one collective; then the job names it, ends");
}

void CheckpointConfig::fields(Fields& f) {
  f("output_dir", output_dir, "what the run leaves goes here");
  f.require(!output_dir.empty(), "output_dir", "is empty: name a directory");
  f("save_steps", save_steps, f.at_least(0), "steps between checkpoints; 0: only at the end");
  f("save_total_limit", save_total_limit, f.at_least(1), "checkpoints kept; null: all");
}

void LogConfig::fields(Fields& f) {
  f("logging_steps", logging_steps, f.at_least(1), "steps between lines of metrics.jsonl");
}

void EvalConfig::fields(Fields& f) {
  f("eval_steps", eval_steps, f.at_least(0), "steps between evaluations; 0: none while training");
  f("per_device_eval_batch_size", per_device_eval_batch_size, f.at_least(1), "rows of a batch");
  f("max_samples", max_samples, f.at_least(1), "rows evaluated; null: all");
  f("metrics", metrics, f.one_of({"loss", "accuracy"}),
    "what graft eval measures; accuracy: the share of labels that are right");
  f("load_best_model_at_end", load_best_model_at_end, "the adapter with the lowest eval loss wins");
  f.require(!load_best_model_at_end || eval_steps > 0, "load_best_model_at_end",
            "needs eval.eval_steps above 0: there is no best without evaluations");
}

void RunConfig::fields(Fields& f) {
  f("schema", schema, f.range(1, 1), "version of the file format");
  f.require(f.given("schema"), "schema", "is missing: write `schema: 1`");
  f("model", model, "the frozen base");
  f("data", data, "rows to train and evaluate on");
  f("train", train, "the optimisation");
  f("parallel", parallel, "ranks, sharding, reduction");
  f("checkpoint", checkpoint, "what is kept, and where");
  f("log", log, "what is reported");
  f("eval", eval, "held-out measurements");

  const bool trains = !data.train.values.empty();
  f.require(!trains || train.max_steps || train.num_train_epochs, "train.max_steps",
            "is missing: set train.max_steps or train.num_train_epochs");
  f.require(train.task != "causal_lm" || !eval.wants("accuracy"), "eval.metrics",
            "has accuracy, which is of labels: train.task is causal_lm");
  f.require(eval.eval_steps == 0 || !data.eval.values.empty(), "eval.eval_steps",
            "is above 0 but data.eval names no shards");
}

}  // namespace graft::launcher
