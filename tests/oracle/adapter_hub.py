#!/usr/bin/env python3
"""What AdapterHub's `adapters` computes: bottleneck adapters, MAM, prefixes, prompts.

    adapter_hub.py --models DIR --output DIR         run with cluster/requirements-adapters.txt in front of the path

OUTPUT/<name>.safetensors  logits        float32 [2, 24, V]   of the rows of rule.py
                           skip_logits   float32 [2, 24, V]   with skip_layers = [0]; of bottleneck adapters
                           loss          float32 [1]          mean over the targets
                           value.<key>   float32              what is trained, away from its start; <key> as in the model
                           grad.<key>    float32              of the loss
The base of each is MODELS/<base>/model (make_fixtures.py); tests/peft/adapter_hub_test.cpp has the same names and bases.
`adapters` has no prompt tuning on Llama: its PromptTuning module is put before the model by hand.
"""

import argparse
import pathlib
import shutil

import adapters
import torch
import transformers
from adapters import configuration
from adapters.methods.prompt_tuning import PromptTuning
from rule import fill, loss_of, rows_and_labels
from safetensors.torch import load_file, save_file

PREFIX = dict(prefix_length=5, bottleneck_size=24)
CASES = {
    "houlsby": ("llama_tied", configuration.DoubleSeqBnConfig(reduction_factor=8)),
    "pfeiffer": ("llama_tied", configuration.SeqBnConfig(reduction_factor=8)),
    "leave_out": ("llama_tied", configuration.SeqBnConfig(reduction_factor=8, leave_out=[0])),
    "parallel": ("llama_tied", configuration.ParBnConfig(scaling=1.0)),
    "scaled_parallel": ("llama_tied", configuration.ParBnConfig()),
    "learned_parallel": ("llama_tied", configuration.ParBnConfig(scaling="learned")),
    "prefix": ("llama_heads", configuration.PrefixTuningConfig(**PREFIX)),
    "prefix_flat": ("llama_square", configuration.PrefixTuningConfig(prefix_length=5, flat=True)),
    "mam": ("llama_heads", configuration.MAMConfig(configuration.PrefixTuningConfig(**PREFIX))),
    "prompt": ("llama_tied", configuration.PromptTuningConfig(prompt_length=5)),
}


def load_base(directory):
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


class Prompted(torch.nn.Module):
    """Logits of the tokens alone, as the heads of `adapters` give them."""

    def __init__(self, model, config):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prompt = PromptTuning("a", config, model.config, model.get_input_embeddings())

    def forward(self, input_ids):
        rows, count = self.prompt(self.model.get_input_embeddings()(input_ids))
        output = self.model(inputs_embeds=rows)
        output.logits = output.logits[:, count:]
        return output


def adapted(model, config):
    if isinstance(config, configuration.PromptTuningConfig):
        return Prompted(model, config).eval()
    adapters.init(model)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    return model.eval()


def write_case(models, base, config, path):
    input_ids, labels = rows_and_labels()
    model = adapted(load_base(models / base / "model"), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.add_(fill(name, parameter.shape, 1.0 if "wte" in name else 0.2))
    logits = model(input_ids=input_ids).logits
    loss = loss_of(logits, labels)
    loss.backward()
    tensors = {"logits": logits.detach().contiguous(), "loss": loss.detach().reshape(1)}
    if isinstance(config, configuration.BnConfig):
        model.set_active_adapters("a", skip_layers=[0])
        with torch.no_grad():
            tensors["skip_logits"] = model(input_ids=input_ids).logits
    for name, parameter in trained.items():
        tensors["value." + name], tensors["grad." + name] = parameter.detach().clone(), parameter.grad.clone()
    save_file(tensors, path)
    print(f"adapters, {path.stem}: loss {loss.item():.6f}, {len(trained)} tensors")



def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(1)
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    known = load_file(arguments.models / "llama_tied/oracle.safetensors")
    with torch.no_grad():
        base = load_base(arguments.models / "llama_tied/model")(input_ids=known["input_ids"]).logits
    difference = (base - known["logits"]).abs().max().item()
    assert difference < 1e-5, f"this transformers ({transformers.__version__}) computes another base, by {difference:.2e}"
    for name, (base, config) in CASES.items():
        write_case(arguments.models, base, config, arguments.output / f"{name}.safetensors")


if __name__ == "__main__":
    main()
