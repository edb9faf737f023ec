"""PEFT's add_weighted_adapter of type `cat`: adapters as one, each with a weight.

FILE: safetensors.  logits  float32 [2, 24, V], of PARTS of peft_methods.py with WEIGHTS, on its base and rows.
"""

import warnings

import peft
import torch
import transformers
from make_fixtures import rows_and_labels
from safetensors.torch import save_file

PARTS, WEIGHTS = ["lora", "lora_rslora"], [0.75, 0.5]


def write(model_directory, adapters, path):
    base = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32,
                                                             attn_implementation="eager").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, adapters / PARTS[0], adapter_name=PARTS[0])
        model.load_adapter(adapters / PARTS[1], adapter_name=PARTS[1])
        model.add_weighted_adapter(PARTS, WEIGHTS, "sum", combination_type="cat")
        model.set_adapter("sum")
    with torch.no_grad():
        logits = model.eval()(input_ids=rows_and_labels()[0]).logits
    save_file({"logits": logits.contiguous()}, path)
