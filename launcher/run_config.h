// RunConfig: a whole run as nested structs, one per section of the YAML file. Names are Hugging
// Face's where one exists. The initialisers are the defaults; `fields` gives bounds and one line of
// help each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "configs/schema.h"

namespace graft::launcher {

using configs::Auto;
using configs::Fields;
using configs::StringOrList;

struct ModelConfig {
  std::string name_or_path;
  std::string quantization = "nf4";
  bool double_quantization = true;
  std::string dtype = "auto";
  std::string weights = "load";
  std::optional<std::string> revision;
  StringOrList adapters;
  std::vector<double> adapter_weights;
  std::vector<std::string> adapter_names;
  std::optional<std::vector<std::string>> active_adapters;
  bool any_base = false;

  void fields(Fields& f);
};

struct DataConfig {
  StringOrList train;
  StringOrList eval;
  int max_length = 256;
  bool packing = true;
  bool shuffle = true;
  std::string on_bad_sample = "stop";

  void fields(Fields& f);
};

struct TrainConfig {
  std::string task = "causal_lm";
  std::optional<int64_t> max_steps;
  std::optional<double> num_train_epochs;
  int per_device_train_batch_size = 1;
  int gradient_accumulation_steps = 1;
  double learning_rate = 2e-4;
  std::string lr_scheduler_type = "cosine";
  double warmup_ratio = 0.03;
  double weight_decay = 0.0;
  double max_grad_norm = 1.0;
  std::string optim = "adamw";
  double adam_beta1 = 0.9;
  double adam_beta2 = 0.999;
  double adam_epsilon = 1e-8;
  bool gradient_checkpointing = false;
  int64_t seed = 42;

  void fields(Fields& f);
};

struct ParallelConfig {
  std::string shard = "auto";
  int prefetch_blocks = 1;
  Auto<int> lanes_per_gather;
  std::string reduction = "auto";
  Auto<int> threads_per_rank;
  int timeout_s = 600;

  void fields(Fields& f);
};

struct CheckpointConfig {
  std::string output_dir = "runs/default";
  int64_t save_steps = 20;
  std::optional<int> save_total_limit = 2;

  void fields(Fields& f);
};

struct LogConfig {
  int64_t logging_steps = 1;

  void fields(Fields& f);
};

struct EvalConfig {
  int64_t eval_steps = 0;
  int per_device_eval_batch_size = 8;
  std::optional<int64_t> max_samples = 500;
  std::vector<std::string> metrics = {"loss"};
  bool load_best_model_at_end = false;

  bool wants(const char* metric) const {
    return std::find(metrics.begin(), metrics.end(), metric) != metrics.end();
  }
  void fields(Fields& f);
};

struct RunConfig {
  int schema = 1;
  ModelConfig model;
  DataConfig data;
  TrainConfig train;
  ParallelConfig parallel;
  CheckpointConfig checkpoint;
  LogConfig log;
  EvalConfig eval;

  /// Reports broken rules across fields too, each at its line.
  void fields(Fields& f);
};

}  // namespace graft::launcher
