// Freeze layers: W' = W + dW of the top k blocks.      Lee et al. 2019, arXiv:1911.03090
// Trains whole tensors of the base, from their own values: blocks L-k to L-1, and where wanted the
// final norm, the head and the embeddings; the rest is frozen, and nothing below the lowest trained
// block runs with a graph. They are kept unquantised whatever model.quantization says, cut over the
// ranks with their gradients and moments (storage class S), and saved whole under Hugging Face's
// names. With all of it the method is `full`. Of a tied table, head and embeddings are one tensor.
#include "configs/check.h"
#include "peft/attach.h"
#include "peft/peft_form.h"

namespace graft::peft {
namespace {

class FreezeLayers : public Method {
 public:
  void fields(configs::Fields& f) override {
    f("num_layers", num_layers_, f.range(0, 1 << 20),
      "top blocks that are trained; auto: a quarter of them");
    f("final_norm", final_norm_, "train the norm behind the last block");
    f("head", head_, "train the head");
    f("embeddings", embeddings_, "train the embeddings: then nothing is left out on the way down");
  }

  void attach(AttachContext& context) override {
    check_slots(context, context.slots.weights.size(), "tensors of the base");
    const int64_t layers = context.info.num_layers;
    const int64_t top = num_layers_.value ? *num_layers_.value : std::max<int64_t>(1, layers / 4);
    GRAFT_CHECK(top <= layers, "peft: freeze_layers: num_layers = ", top, ", the model has ",
                layers);
    const bool table = embeddings_ || (head_ && context.info.tied_head);
    bool any = false;
    for (const WeightSite& site : context.slots.weights) {
      const bool wanted = site.layer >= 0                    ? site.layer >= layers - top
                          : site.name == "embed.weight"      ? table
                          : site.name == "final_norm.weight" ? final_norm_
                                                             : head_;
      if (wanted) thaw(context, site);
      any = any || wanted;
    }
    GRAFT_CHECK(any,
                "peft: freeze_layers: num_layers = 0 without final_norm, head or embeddings "
                "trains nothing");
  }

  nlohmann::json to_peft_config(const SlotMap&) const override {
    return write_peft_entries(kForm, configs::describe(*this));
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    PeftConfigReader config(adapter);
    read_peft_entries(kForm, config, nullptr, [&](configs::Fields& f) { fields(f); });
  }

 private:
  inline static const PeftForm kForm = {.ours = {"num_layers", "final_norm", "head", "embeddings"}};

  configs::Auto<int> num_layers_;
  bool final_norm_ = false, head_ = false, embeddings_ = false;
};

}  // namespace

void register_freeze_layers(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<FreezeLayers>(); }});
}

}  // namespace graft::peft
