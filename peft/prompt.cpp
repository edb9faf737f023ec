#include "peft/prompt.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "models/nn/sequence.h"
#include "peft/draws.h"

namespace graft::peft {

PromptRows::PromptRows(Shape shape, kernels::Key random, at::Device device)
    : shape_(std::move(shape)), random_(random) {
  table_ = register_parameter(
      "table", draw_normal({shape_.count, shape_.widths.front()}, 1, random, device));
  if (shape_.lstm_layers > 0) make_lstm(device);
  const size_t first = shape_.lstm_layers > 0 ? 2 : 1;
  for (size_t i = first; i < shape_.widths.size(); ++i) {
    const int64_t in = shape_.widths[i - 1], out = shape_.widths[i];
    const auto draw = [&](at::IntArrayRef sizes, int part) {
      return draw_uniform(sizes, 1 / std::sqrt(static_cast<double>(in)),
                          kernels::derive(random, i, part), device);
    };
    const std::string number = std::to_string(i - first);
    weights_.push_back(register_parameter("weight" + number, draw({out, in}, 0)));
    biases_.push_back(register_parameter("bias" + number, draw({out}, 1)));
  }
  if (has_encoder()) output_ = at::zeros({shape_.count, shape_.widths.back()}, table_.options());
}

void PromptRows::make_lstm(at::Device device) {
  const int64_t hidden = shape_.widths[1] / 2;
  for (int layer = 0; layer < shape_.lstm_layers; ++layer) {
    const int64_t in = layer == 0 ? shape_.widths[0] : 2 * hidden;
    for (const char* direction : {"", "_reverse"}) {
      const auto add = [&](const char* kind, at::IntArrayRef shape) {
        const std::string name = kind + std::to_string(layer) + direction;
        const kernels::Key key = kernels::derive(random_, 100, static_cast<int>(lstm_.size()));
        const double bound = 1 / std::sqrt(static_cast<double>(hidden));
        lstm_.emplace_back(
            name, register_parameter("lstm_" + name, draw_uniform(shape, bound, key, device)));
      };
      add("weight_ih_l", {4 * hidden, in}), add("weight_hh_l", {4 * hidden, hidden});
      add("bias_ih_l", {4 * hidden}), add("bias_hh_l", {4 * hidden});
    }
  }
}

/// Layer by layer, because what rests between them is a function of the pass.
Tensor PromptRows::lstm(Tensor x, const models::Pass& pass) const {
  const Tensor zero = at::zeros({2, 1, shape_.widths[1] / 2}, x.options());
  x = x.unsqueeze(0);
  for (size_t i = 0; i < lstm_.size(); i += 8) {
    if (i > 0) x = dropout(x, shape_.lstm_dropout, pass, kernels::derive(random_, 200, i));
    std::vector<Tensor> weights;
    for (size_t j = i; j < i + 8; ++j) weights.push_back(lstm_[j].second);
    x = std::get<0>(at::lstm(x, {zero, zero}, weights, /*has_biases=*/true, /*num_layers=*/1,
                             /*dropout=*/0, /*train=*/false, /*bidirectional=*/true,
                             /*batch_first=*/true));
  }
  return x.squeeze(0);
}

Tensor PromptRows::columns(int64_t begin, int64_t size, const models::Pass& pass) const {
  if (!has_encoder()) return table_.narrow(1, begin, size);
  Tensor x = lstm_.empty() ? table_ : lstm(table_, pass);
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
  const auto add_encoder = [&](const std::string& name, const Tensor& value) {
    add(name, "prompt_encoder." + name, value);
  };
  add("table", has_encoder() ? kPromptTable : "prompt_embeddings", table_);
  for (const auto& [name, value] : lstm_) add_encoder("lstm_head." + name, value);
  for (size_t i = 0; i < weights_.size(); ++i) {  // an activation has a number of its own
    const std::string layer = shape_.layers + "." + std::to_string(2 * i);
    add_encoder(layer + ".weight", weights_[i]);
    add_encoder(layer + ".bias", biases_[i]);
  }
  if (has_encoder()) {
    context.params.add(
        Constant{context.prefix + "prompt.rows", "prompt_embeddings", output_, true});
  }
}

void PromptRows::refresh() {
  const at::NoGradGuard no_grad;
  if (has_encoder()) output_.copy_(all({}));
}

bool is_flat_prompt(const SavedAdapter& adapter) {
  return std::find(adapter.tensors.begin(), adapter.tensors.end(), kPromptTable) ==
         adapter.tensors.end();
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
  return models::put_before_documents(carry, rows_->all(pass));
}

void attach_prompt(AttachContext& context, const std::shared_ptr<PromptRows>& rows) {
  const auto* input = context.slots.find_input();
  check_slots(context, input == nullptr ? 0 : 1, "the input, before the tokens");
  input->slot->push(std::make_shared<PromptInput>(rows));
  rows->attach(context, input->stage, input->stage);
}

}  // namespace graft::peft
