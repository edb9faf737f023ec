#!/usr/bin/env python3
"""Prompts of HF PEFT, and what it computes while their encoders are there.

    peft_prompts.py --models DIR --output DIR [NAME...]

OUTPUT/<name>/: as peft_methods.py has it. PEFT's own file of a prompt holds `prompt_embeddings` alone; here what they
came out of stands beside them under PEFT's names of it (prompt_encoder.mlp_head.0.weight), as Graft saves it. The base
is MODELS/qwen2/model, of ADAPTION_PROMPT, which takes H d = D for granted, MODELS/llama_square/model.

PEFT's own loss of prompt_tuning and p_tuning has one target more where a row's first label is not -100: the last row of
the prompt predicts it. Graft's first tokens are no targets; check_loss() shows that this is all the difference.
"""

import argparse
import pathlib
import shutil
import warnings

import peft
import torch
from make_fixtures import copies_of
from peft_methods import Case, wrap, write_case
from rule import fill, loss_of, rows_and_labels
from safetensors.torch import load_file, save_file

CASES = {
    "prompt_tuning": Case(peft.PromptTuningConfig, num_virtual_tokens=5),
    "p_tuning_mlp": Case(peft.PromptEncoderConfig, num_virtual_tokens=5, encoder_hidden_size=24),
    "p_tuning_lstm": Case(peft.PromptEncoderConfig, num_virtual_tokens=5, encoder_hidden_size=24, encoder_dropout=0.25,
                          encoder_reparameterization_type="LSTM"),
    "prefix_tuning": Case(peft.PrefixTuningConfig, num_virtual_tokens=5),
    "prefix_projection": Case(peft.PrefixTuningConfig, num_virtual_tokens=5, encoder_hidden_size=24, prefix_projection=True),
    "adaption_prompt": Case(peft.AdaptionPromptConfig, base="llama_square", adapter_len=5, adapter_layers=2, target_modules="self_attn"),
}


def check_loss(model, batch, logits, count):
    """Of `count` virtual rows in front."""
    input_ids, labels = batch["input_ids"], batch["labels"]
    ours = loss_of(logits[:, count:], labels)
    assert torch.allclose(model(**batch).loss, ours, rtol=1e-5), "PEFT's loss where the first label is -100"
    first = labels.clone()
    first[:, 0] = input_ids[:, 0]
    padded = torch.cat([torch.full((len(first), count), -100), first], dim=1)
    theirs = model(input_ids=input_ids, labels=first).loss
    assert torch.allclose(theirs, loss_of(logits, padded), rtol=1e-5), "PEFT's loss with a target more in each row"
    assert (theirs - ours).abs() > 1e-3, "the first tokens' loss shows"


def write_prompt(base, case, directory):
    shutil.rmtree(directory, ignore_errors=True)
    model = wrap(base, case)
    encoder = dict(model.prompt_encoder["default"].named_parameters())
    with torch.no_grad():
        for name, parameter in encoder.items():
            parameter.copy_(fill(name, parameter.shape, 1.0 if name == "embedding.weight" else 0.3))
    input_ids, labels = rows_and_labels()
    all_logits = model(input_ids=input_ids).logits
    logits = all_logits[:, -input_ids.shape[1]:]
    loss = loss_of(logits, labels)
    loss.backward()
    if all_logits.shape[1] > input_ids.shape[1]:
        with torch.no_grad():
            check_loss(model, {"input_ids": input_ids, "labels": labels}, all_logits, case.fields["num_virtual_tokens"])
    keys = {"embedding.weight": "prompt_embeddings"}
    if len(encoder) > 1:
        keys = {name: "prompt_encoder." + name for name in encoder}
    model.save_pretrained(directory)
    save_file({"logits": logits.detach().contiguous(), "loss": loss.detach().reshape(1),
               **{f"grad.{keys[name]}": p.grad.clone() for name, p in encoder.items()}}, directory / "oracle.safetensors")
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path) | {keys[name]: p.detach().clone() for name, p in encoder.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def write(models, output, names=()):
    """Beside those of peft_methods.py."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names or CASES:
            write_one = write_case if name == "adaption_prompt" else write_prompt
            write_one(copies_of(models / CASES[name].base / "model"), CASES[name], output / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    write(arguments.models, arguments.output, arguments.names)


if __name__ == "__main__":
    main()
