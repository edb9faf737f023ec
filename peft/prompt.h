// Soft prompts: what the methods of the group prompt share. Their rows come out of a table that is
// trained itself or through an encoder; PEFT's files hold the rows alone, as `prompt_embeddings`,
// ours keep the encoder beside them, so that a run can go on.
#pragma once

#include <string>
#include <vector>

#include "peft/attach.h"
#include "peft/peft_config.h"
#include "peft/peft_form.h"

namespace graft::peft {

/// rows = table, MLP(table) or MLP(LSTM(table)).
class PromptRows : public torch::nn::Module {
 public:
  struct Shape {
    int64_t count;                ///< of rows
    std::vector<int64_t> widths;  ///< of the table, then of each layer's output
    enum class Activation { kRelu, kTanh } activation = Activation::kRelu;  ///< between layers
    std::string layers = {};  ///< PEFT's name of them: "mlp_head"
    int lstm_layers = 0;      ///< > 0: the first layer is a bidirectional LSTM of so many
    double lstm_dropout = 0;  ///< between those
  };
  /// The table is N(0, 1), the layers are uniform within 1 / sqrt(in), an LSTM's 1 / sqrt(hidden).
  PromptRows(Shape shape, kernels::Key random, at::Device device);

  int64_t count() const { return shape_.count; }
  bool has_encoder() const { return shape_.widths.size() > 1; }
  Tensor& table() { return table_; }
  Tensor& last_weight() { return weights_.back(); }
  Tensor& last_bias() { return biases_.back(); }
  /// Columns [begin, begin + size) of the rows, float32.
  Tensor columns(int64_t begin, int64_t size, const models::Pass& pass) const;
  Tensor all(const models::Pass& pass) const { return columns(0, shape_.widths.back(), pass); }

  /// Lists what is trained, used by these stages.
  void attach(AttachContext& context, int stage, int last_stage);
  /// Brings the rows that are saved up to date.
  void refresh();

 private:
  void make_lstm(at::Device device);
  Tensor lstm(Tensor x, const models::Pass& pass) const;

  Shape shape_;
  kernels::Key random_;
  Tensor table_, output_;
  std::vector<std::pair<std::string, Tensor>> lstm_;  ///< by PyTorch's names; eight a layer
  std::vector<Tensor> weights_, biases_;
};

/// The name of an encoder's table in our files; PEFT's have none.
inline constexpr const char* kPromptTable = "prompt_encoder.embedding.weight";

/// What PEFT writes of the base.
struct PromptBase {
  int64_t token_dim = 0, num_attention_heads = 0, num_layers = 0;

  /// Hidden size and heads of queries.
  static PromptBase of(const AttachContext& context);
};

/// Whether a directory holds the rows alone, without what they came out of.
bool is_flat_prompt(const SavedAdapter& adapter);

nlohmann::json write_prompt_form(const PeftForm& form, const configs::FieldDoc& fields,
                                 const PromptBase& base);
void read_prompt_form(const PeftForm& form, const SavedAdapter& adapter,
                      const std::function<void(configs::Fields&)>& fields);

/// Puts the rows in front of every document, of what a key/value cache continues once only.
class PromptInput : public models::SequenceAdapter {
 public:
  explicit PromptInput(std::shared_ptr<PromptRows> rows);
  models::Carry edit(models::Carry carry, const models::Pass& pass) override;

 private:
  std::shared_ptr<PromptRows> rows_;
};

/// Attaches PromptInput to the slot `input` and lists the rows.
void attach_prompt(AttachContext& context, const std::shared_ptr<PromptRows>& rows);

}  // namespace graft::peft
