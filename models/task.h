// What a base's head is for. A causal language model has one over its vocabulary; a classifier has
// a `score` over labels, read at a document's last token or at every token. The model's config says
// which (`architectures`), the rest of the model is the same.
#pragma once

#include <string_view>

namespace graft::models {

enum class Task { kCausalLm, kSequenceClassification, kTokenClassification };

/// What a task is called: in train.task, at the end of transformers' class, in PEFT's task_type.
struct TaskNames {
  Task task;
  std::string_view name, hf_class, peft_type;
};

inline constexpr TaskNames kTasks[] = {
    {Task::kCausalLm, "causal_lm", "ForCausalLM", "CAUSAL_LM"},
    {Task::kSequenceClassification, "sequence_classification", "ForSequenceClassification",
     "SEQ_CLS"},
    {Task::kTokenClassification, "token_classification", "ForTokenClassification", "TOKEN_CLS"},
};

constexpr const TaskNames& names_of(Task task) { return kTasks[static_cast<size_t>(task)]; }

}  // namespace graft::models
