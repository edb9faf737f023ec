// GLoRA's five paths in all their forms against the definition, on a matrix with a bias.
#include <gtest/gtest.h>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

/// A path's matrix, column or number; 0 where there is none.
Tensor path(const OneSlot& slot, const std::string& name, const std::string& form) {
  if (form == "none") return at::zeros({1});
  if (form == "lora") return slot.value(name + "_Xd").mm(slot.value(name + "_Xu"));
  return slot.value(name + "_X");
}

TEST(Glora, EveryFormIsTheDefinition) {
  for (const std::string a_b : {"lora", "vector", "constant", "none"}) {
    for (const std::string c : {"lora", "vector", "none"}) {
      for (const std::string d_e : {"vector", "constant", "none"}) {
        if (a_b == "none" && c == "none" && d_e == "none") continue;
        const OneSlot slot(
            "glora", "{config_A_B: " + a_b + ", config_C: " + c + ", config_D_E: " + d_e + "}",
            "qwen2");
        const Tensor w = slot.weight(), b = slot.bias(), x = fill("x", {2, 3, w.size(1)}, 1);
        const Tensor w2 = w + w * path(slot, "glora_A", a_b) + path(slot, "glora_B", a_b);
        Tensor b2 = b + b * path(slot, "glora_D", d_e) + path(slot, "glora_E", d_e);
        if (c != "none") b2 = b2 + w.mm(path(slot, "glora_C", c)).squeeze(1);
        EXPECT_TRUE(at::allclose(slot.forward(x), at::linear(x, w2, b2), 1e-4, 1e-5))
            << a_b << " " << c << " " << d_e;
      }
    }
  }
}

TEST(Glora, NothingToTrainIsRefused) {
  models::io::expect_refused([] { OneSlot("glora", "{config_A_B: none}"); }, "nothing to train",
                             ExitCode::kUsage);
}

}  // namespace
}  // namespace graft::peft
