#include "peft/prompt.h"

#include <ATen/ATen.h>

#include <cmath>

#include "kernels/random/random.h"
#include "models/nn/sequence.h"

namespace graft::peft {

PromptRows::PromptRows(Shape shape, kernels::Key random, at::Device device)
    : shape_(std::move(shape)) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  const Tensor table = at::empty({shape_.count, shape_.widths.front()}, options);
  kernels::normal(table, random);
  table_ = register_parameter("table", table);
  for (size_t i = 1; i < shape_.widths.size(); ++i) {
    const int64_t in = shape_.widths[i - 1], out = shape_.widths[i];
    const auto draw = [&](at::IntArrayRef sizes, int part) {
      const Tensor t = at::empty(sizes, options);
      kernels::uniform(t, kernels::derive(random, i, part));
      return t.mul_(2).sub_(1).mul_(1 / std::sqrt(static_cast<double>(in)));
    };
    const std::string number = std::to_string(i - 1);
    weights_.push_back(register_parameter("weight" + number, draw({out, in}, 0)));
    biases_.push_back(register_parameter("bias" + number, draw({out}, 1)));
  }
  if (has_encoder()) output_ = at::zeros({shape_.count, shape_.widths.back()}, options);
}

Tensor PromptRows::columns(int64_t begin, int64_t size) const {
  if (!has_encoder()) return table_.narrow(1, begin, size);
  Tensor x = table_;
  for (size_t i = 0; i + 1 < weights_.size(); ++i) {
    x = at::linear(x, weights_[i], biases_[i]);
    x = shape_.activation == Shape::Activation::kTanh ? at::tanh(x) : at::relu(x);
  }
  return at::linear(x, weights_.back().narrow(0, begin, size),
                    biases_.back().narrow(0, begin, size));
}

void PromptRows::attach(AttachContext& context, int stage, int last_stage) {
  const auto add = [&](const std::string& name, const std::string& key, const Tensor& value) {
    Param param;
    param.name = context.prefix + "prompt." + name;
    param.hf_key = key;
    param.value = value;
    param.stage = stage, param.last_stage = last_stage;
    context.params.add(std::move(param));
  };
  add("table", has_encoder() ? kPromptTable : "prompt_embeddings", table_);
  for (size_t i = 0; i < weights_.size(); ++i) {  // an activation has a number of its own
    const std::string layer = shape_.layers + "." + std::to_string(2 * i);
    add(layer + ".weight", "prompt_encoder." + layer + ".weight", weights_[i]);
    add(layer + ".bias", "prompt_encoder." + layer + ".bias", biases_[i]);
  }
  if (has_encoder()) {
    context.params.add(
        Constant{context.prefix + "prompt.rows", "prompt_embeddings", output_, true});
  }
}

void PromptRows::refresh() {
  const at::NoGradGuard no_grad;
  if (has_encoder()) output_.copy_(all());
}

PromptBase PromptBase::of(const AttachContext& context) {
  PromptBase base{context.info.hidden_size, 0, context.info.num_layers};
  for (const LinearSite& site : context.slots.linears) {
    if (site.role == "attn.q") base.num_attention_heads = site.info.out / context.info.head_dim;
  }
  return base;
}

nlohmann::json write_prompt_form(const PeftForm& form, const configs::FieldDoc& fields,
                                 const PromptBase& base) {
  nlohmann::json config = write_peft_entries(form, fields);
  config["token_dim"] = base.token_dim;
  config["num_attention_heads"] = base.num_attention_heads;
  config["num_layers"] = base.num_layers;
  config["num_transformer_submodules"] = 1;
  config["modules_to_save"] = nullptr;
  return config;
}

void read_prompt_form(const PeftForm& form, const SavedAdapter& adapter,
                      const std::function<void(configs::Fields&)>& fields) {
  PeftConfigReader config(adapter);
  config.ignore({"token_dim", "num_attention_heads", "num_layers"});  // the tensor has them
  const auto& parts = config.entry("num_transformer_submodules");
  GRAFT_CHECK(parts.is_null() || parts == 1, ExitCode::kData,
              "adapter_config.json: num_transformer_submodules = ", parts.dump(),
              " is not supported, only 1 is");
  read_peft_entries(form, config, nullptr, fields);
}

PromptInput::PromptInput(std::shared_ptr<PromptRows> rows) : rows_(std::move(rows)) {
  register_module("rows", rows_);
}

models::Carry PromptInput::edit(models::Carry carry, const models::Pass& pass) {
  if (pass.cache != nullptr && pass.cache->length > 0)
    return models::shift_positions(carry, rows_->count());
  return models::put_before_documents(carry, rows_->all());
}

void attach_prompt(AttachContext& context, const std::shared_ptr<PromptRows>& rows) {
  const auto* input = context.slots.find_input();
  GRAFT_CHECK(input != nullptr,
              "peft: this model has no place for a prompt in front of its tokens");
  input->slot->push(std::make_shared<PromptInput>(rows));
  rows->attach(context, input->stage, input->stage);
}

}  // namespace graft::peft
