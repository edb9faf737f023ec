#!/usr/bin/env python3
"""Adapters of every tuner of HF PEFT that acts on a decoder's own layers, and what PEFT computes from their files.

    peft_methods.py --output DIR [--base MODEL_DIR] [NAME...]

DIR/<name>/adapter_config.json, adapter_model.safetensors    as PEFT saved them: every trained tensor away from its start
DIR/<name>/oracle.safetensors   logits        float32 [2, 24, V]
                                loss          float32 [1]           mean over the targets
                                grad.<key>    float32               of the loss, <key> as in the adapter's file
                                start.<key>                         how PEFT begins: the tensors that no global seed changes
                                after.<key>                         STEPPED: trained by STEPS steps of AdamW from the file
peft_methods_nf4/<name>/: the same of NF4 over a base whose linear layers went through bitsandbytes' NF4 and back.
The base is MODEL_DIR (make_fixtures.py: qwen2, with biases on q, k, v), or the folder beside it that a case names;
rows and labels are its rows_and_labels().
All numbers come from an adapter that PEFT loaded from the directory: a save that loses something shows here.

Prompts: see peft_prompts.py. Left out, because PEFT 0.21.2 cannot serve as an oracle for it:
XLORA                   its file loses a layer: see xlora.py
MIXED                   other adapters, several types of them in one model
ADAMSS of some spaces   they are clusters of scikit-learn's generator, which no file holds; one space needs none
SHADOW                  a second model beside the base
HIRA rank_pattern       PEFT ignores it: every matrix gets rank r, and it cannot load a file that has what it asked for
LORA use_qalora         only on bases of GPTQ; velora and monteclora change training, not the adapter
"""

import argparse
import functools
import pathlib
import shutil
import sys
import types
import warnings

import bitsandbytes
import numpy as np
import peft
import torch
import transformers
from make_fixtures import copies_of
from peft.tuners.boft import layer as boft_layer
from peft.tuners.c3a import layer as c3a_layer
from peft.tuners.poly import router as poly_router
from rule import fill, loss_of, rows_and_labels
from safetensors.torch import load_file, save_file

TARGETS = ["q_proj", "v_proj", "down_proj"]  # out = in, out < in, a feed-forward one
PATTERN = {"v_proj": 3}


class Case:
    """fields: of the type's config. scale: of what is added to the start; a number, or by a part of the key."""

    def __init__(self, config, scale=0.1, base="qwen2", **fields):
        if "target_modules" in config.__dataclass_fields__:  # prompts have none
            fields.setdefault("target_modules", TARGETS)
        self.config, self.scale, self.base, self.fields = config, scale, base, fields

    def scale_of(self, key):
        if not isinstance(self.scale, dict):
            return self.scale
        return next((scale for part, scale in self.scale.items() if part in key), 0.1)


NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
CASES = {
    # --- LoRA and its variants
    "lora": Case(peft.LoraConfig, r=4, lora_alpha=8),
    "lora_gaussian": Case(peft.LoraConfig, r=4, init_lora_weights="gaussian"),
    "lora_rslora": Case(peft.LoraConfig, r=4, use_rslora=True),
    "lora_patterns": Case(peft.LoraConfig, r=4, rank_pattern=PATTERN, alpha_pattern={"down_proj": 5}),
    "lora_bias": Case(peft.LoraConfig, r=4, lora_bias=True),
    "lora_train_biases": Case(peft.LoraConfig, r=4, bias="all"),
    "lora_whole": Case(peft.LoraConfig, r=4, target_modules=["v_proj", "down_proj"],
                       modules_to_save=["q_proj", "embed_tokens", "lm_head"]),  # q_proj with its bias
    "lora_dora": Case(peft.LoraConfig, r=4, use_dora=True),
    "lora_dora_rslora": Case(peft.LoraConfig, r=4, use_dora=True, use_rslora=True, rank_pattern=PATTERN),
    "lora_dora_embed": Case(peft.LoraConfig, r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "lora_kasa": Case(peft.LoraConfig, r=4, kasa_config=peft.tuners.lora.KasaConfig(beta=0.02, gamma=0.05)),
    "lora_trainable_tokens": Case(peft.LoraConfig, r=4, trainable_token_indices=[11, 48]),
    "adalora": Case(peft.AdaLoraConfig, init_r=6, target_r=4, total_step=20, lora_alpha=8, scale=0.5),
    "adalora_schedule": Case(peft.AdaLoraConfig, init_r=6, target_r=3, total_step=20, tinit=3, tfinal=6, deltaT=2, beta1=0.7,
                             orth_reg_weight=0.2, scale=0.5),
    # --- scales, rotations, reflections
    "ia3": Case(peft.IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3_all_outputs": Case(peft.IA3Config, feedforward_modules=[]),
    "hra": Case(peft.HRAConfig, r=4),
    "hra_odd": Case(peft.HRAConfig, r=5),
    "hra_gram_schmidt": Case(peft.HRAConfig, r=4, apply_GS=True),
    "hra_bias": Case(peft.HRAConfig, r=4, bias="hra_only"),
    "oft": Case(peft.OFTConfig, oft_block_size=8),
    "oft_terms": Case(peft.OFTConfig, oft_block_size=8, num_cayley_neumann_terms=3),
    "oft_blocks": Case(peft.OFTConfig, r=4, oft_block_size=0),
    "oft_exact": Case(peft.OFTConfig, oft_block_size=8, use_cayley_neumann=False),
    "oft_coft": Case(peft.OFTConfig, oft_block_size=8, coft=True, eps=0.5),
    "oft_coft_exact": Case(peft.OFTConfig, oft_block_size=8, coft=True, eps=0.5, use_cayley_neumann=False),
    "oft_share": Case(peft.OFTConfig, oft_block_size=8, block_share=True),
    "oft_whole": Case(peft.OFTConfig, oft_block_size=8, bias="oft_only", modules_to_save=["lm_head"]),
    "oft_default_block": Case(peft.OFTConfig),
    "boft": Case(peft.BOFTConfig, boft_block_size=4),
    "boft_num": Case(peft.BOFTConfig, boft_block_size=0, boft_block_num=8),
    "road_1": Case(peft.RoadConfig, group_size=16),
    "road_2": Case(peft.RoadConfig, group_size=16, variant="road_2"),
    "road_4": Case(peft.RoadConfig, group_size=16, variant="road_4"),
    "psoft": Case(peft.PsoftConfig, r=4),
    "psoft_alpha": Case(peft.PsoftConfig, r=4, psoft_alpha=6, psoft_mag_a=False),
    "psoft_neumann": Case(peft.PsoftConfig, r=4, use_cayley_neumann=True),
    "psoft_not_orthogonal": Case(peft.PsoftConfig, r=4, psoft_orth=False),
    # --- shared random matrices and vectors
    "vera": Case(peft.VeraConfig, r=4),
    "vera_no_projections": Case(peft.VeraConfig, r=4, save_projection=False, projection_prng_key=5),
    "pvera": Case(peft.PveraConfig, r=4),
    "pvera_no_projections": Case(peft.PveraConfig, r=4, save_projection=False),
    "randlora": Case(peft.RandLoraConfig, r=4, randlora_alpha=16),
    "randlora_no_projections": Case(peft.RandLoraConfig, r=4, randlora_alpha=16, save_projection=False),
    "randlora_sparse": Case(peft.RandLoraConfig, r=4, randlora_alpha=16, sparse=True),
    "randlora_very_sparse": Case(peft.RandLoraConfig, r=4, randlora_alpha=16, very_sparse=True),
    "vblora": Case(peft.VBLoRAConfig, r=4, num_vectors=16, vector_length=8, topk=2),
    "vblora_topk": Case(peft.VBLoRAConfig, r=4, num_vectors=16, vector_length=8, topk=3, save_only_topk_weights=True),
    "unilora": Case(peft.UniLoraConfig, r=4, theta_d_length=64, scale=0.4),
    "unilora_indices": Case(peft.UniLoraConfig, r=4, theta_d_length=64, save_indices=True, scale=0.4),
    "tinylora": Case(peft.TinyLoraConfig, r=2, u=8),
    "tinylora_tied": Case(peft.TinyLoraConfig, r=2, u=8, weight_tying=1.0),
    "tinylora_no_projections": Case(peft.TinyLoraConfig, r=2, u=8, save_projection=False),
    "frod": Case(peft.FrodConfig, sparse_rate=0.02, progressbar=False),
    "frod_no_projections": Case(peft.FrodConfig, sparse_rate=0.02, progressbar=False, save_projection=False),
    # --- other products
    "loha": Case(peft.LoHaConfig, r=4),
    "loha_patterns": Case(peft.LoHaConfig, r=4, rank_pattern=PATTERN, alpha_pattern={"down_proj": 5}),
    "loha_head": Case(peft.LoHaConfig, r=4, target_modules=["q_proj", "lm_head"]),
    "lokr": Case(peft.LoKrConfig, r=2),
    "lokr_both": Case(peft.LoKrConfig, r=2, decompose_both=True),
    "lokr_factor": Case(peft.LoKrConfig, r=2, decompose_factor=4),
    "lokr_lycoris": Case(peft.LoKrConfig, r=2, init_weights="lycoris"),
    "lokr_full": Case(peft.LoKrConfig, r=64),
    "lokr_patterns": Case(peft.LoKrConfig, r=2, rank_pattern=PATTERN, alpha_pattern={"down_proj": 5}),
    "hira": Case(peft.HiraConfig, r=4),
    "hira_embed": Case(peft.HiraConfig, r=2, target_modules=["embed_tokens", "q_proj"], init_weights=False),
    "miss": Case(peft.MissConfig, r=4),
    "miss_bat": Case(peft.MissConfig, r=4, init_weights="bat"),
    "miss_mini": Case(peft.MissConfig, r=4, mini_r=2, init_weights="mini"),
    "delora": Case(peft.DeloraConfig, r=4),
    "delora_patterns": Case(peft.DeloraConfig, r=4, rank_pattern=PATTERN, lambda_pattern={"down_proj": 5}),
    "gralora": Case(peft.GraloraConfig, r=4),
    "gralora_hybrid": Case(peft.GraloraConfig, r=8, hybrid_r=2, gralora_k=2),
    "glora": Case(peft.GloraConfig, r=4),
    "deft": Case(peft.DeftConfig, r=4),
    "deft_qr": Case(peft.DeftConfig, r=4, decomposition_method="qr"),
    "deft_para": Case(peft.DeftConfig, r=4, para=True),
    "lily": Case(peft.LilyConfig, r=4),
    "lily_share": Case(peft.LilyConfig, r=4, stride_A=2, num_B=3, target_modules="all-linear"),
    "peanut": Case(peft.PeanutConfig, r=4),
    "peanut_deep": Case(peft.PeanutConfig, r=4, depth=2, act_fn="silu"),
    "adamss": Case(peft.AdamssConfig, r=8, num_subspaces=1, subspace_rank=3),
    "adamss_asa": Case(peft.AdamssConfig, r=8, num_subspaces=1, subspace_rank=3, use_asa=True, asa_target_subspaces=2,
                       init_warmup=2, final_warmup=14, mask_interval=3, asa_schedule_exponent=2.0),
    "osf": Case(peft.OSFConfig, effective_rank=8),
    "osf_patterns": Case(peft.OSFConfig, rank_pattern={"v_proj": 3, "down_proj": 0.25}),
    "osf_anywhere": Case(peft.OSFConfig, rank_pattern={"layers.0.*v_proj": 3, "down": 0.25}),
    "poly": Case(peft.PolyConfig, r=4, n_tasks=2, scale=0.3),
    "poly_splits": Case(peft.PolyConfig, r=4, n_tasks=2, n_skills=3, n_splits=2, scale=0.3),
    # --- circulant and frequencies
    "c3a": Case(peft.C3AConfig, block_size=8),
    "c3a_pattern": Case(peft.C3AConfig, block_size=8, block_size_pattern={"v_proj": 16}),
    "fourierft": Case(peft.FourierFTConfig, n_frequency=50),
    "fourierft_pattern": Case(peft.FourierFTConfig, n_frequency=50, n_frequency_pattern={"v_proj": 20},
                              random_loc_seed=3),
    "waveft": Case(peft.WaveFTConfig, n_frequency=50),
    "waveft_proportional": Case(peft.WaveFTConfig, n_frequency=50, proportional_parameters=True, wavelet_family="db2"),
    "waveft_no_idwt": Case(peft.WaveFTConfig, n_frequency=50, use_idwt=False),
    # --- some of the base's own numbers
    "shira": Case(peft.ShiraConfig, r=2, random_seed=3),
    "supertuning": Case(peft.SupertuningConfig, sparsity=0.95),
    "supertuning_lowest": Case(peft.SupertuningConfig, sparsity=0.95, select_top=False, save_precomputed_indices=False),
    "supertuning_lora": Case(peft.SupertuningConfig, sparsity=0.95, r=4, lora_alpha=8),
    "beft": Case(peft.BeftConfig, target_modules=["v_proj", "q_proj"]),
    "ln_tuning": Case(peft.LNTuningConfig, target_modules=NORMS),
    "trainable_tokens": Case(peft.TrainableTokensConfig, token_indices=[11, 48], target_modules=["embed_tokens"]),
    "trainable_tokens_tied": Case(peft.TrainableTokensConfig, token_indices=[11, 48], target_modules=["embed_tokens"],
                                  base="llama_tied"),
}


STEPS, LEARNING_RATE, EPSILON = 20, 2e-3, 1e-5  # the last so large that no element moves by rounding errors alone
FIRST = {case.config: name for name, case in reversed(CASES.items())}
STEPPED = set(FIRST.values()) | {"adalora_schedule", "adamss_asa", "hra_gram_schmidt", "lora_dora", "lora_kasa", "oft_coft", "oft_exact",
                                 "road_4"}
NF4 = ["lora_dora", "hira", "boft", "oft", "miss_bat", "peanut", "glora", "deft", "osf", "psoft"]  # they ask for W


class KMeans:
    """Stands in for scikit-learn's, which is no requirement here: AdaMSS imports it even for one cluster."""

    def __init__(self, n_clusters, **_):
        assert n_clusters == 1

    def fit_predict(self, rows):
        return np.zeros(len(rows), np.int64)


class CorrectedConvolution:
    """C3A's own forward. PEFT's backward of it gives a wrong gradient of x (gradcheck says so), and with it wrong
    gradients of every adapter below."""

    @staticmethod
    def apply(x, w):
        blocks = x.reshape(*x.shape[:-1], *w.shape[1:])
        return torch.fft.fft(torch.einsum("...nb,mnb->...mb", torch.fft.ifft(blocks), torch.fft.fft(w))).real.flatten(-2)


def of_first_task(forward):
    """Poly's router where nobody says which tasks the rows are of."""
    return lambda self, task_ids, input_ids: forward(self, torch.zeros(len(input_ids), dtype=torch.long), input_ids)


def prepare_peft():
    """So that every type can be made here, and none is wrong."""
    for name in "sklearn", "sklearn.cluster":
        sys.modules[name] = types.ModuleType(name)
    sys.modules["sklearn.cluster"].KMeans = KMeans
    c3a_layer.BlockCircularConvolution = CorrectedConvolution
    poly_router.PolyRouter.forward = of_first_task(poly_router.PolyRouter.forward)
    boft_layer.get_fbd_cuda = lambda: None  # it would compile CUDA


def trainable(model):
    """(key in the file, parameter); of one that stands there several times, the first"""
    saved = {tensor.data_ptr(): key for key, tensor in reversed(peft.get_peft_model_state_dict(model).items())}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield saved.get(parameter.data_ptr(), name.replace(".default", "")), parameter


def wrap(base, case):
    return peft.get_peft_model(base(), case.config(task_type="CAUSAL_LM", **case.fields)).eval()


def through_nf4(model):
    """In rows of a block, since bitsandbytes' CPU dequantisation is wrong where blocks cross rows."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                blocks = module.weight.data.reshape(-1, 64)
                codes, state = bitsandbytes.functional.quantize_4bit(blocks, blocksize=64, quant_type="nf4",
                                                                     compress_statistics=False)
                dense = bitsandbytes.functional.dequantize_4bit(codes, state)
                module.weight.data = dense.reshape(module.weight.shape).contiguous()
    return model


def start_of(base, case, seed):
    torch.manual_seed(seed)
    return {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(wrap(base, case)).items()}


def trained(model, input_ids, labels):
    """after.<key>, with what the type does between the steps"""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, eps=EPSILON,
                                  weight_decay=0)
    parameters = list(trainable(model))
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = model(input_ids=input_ids, labels=labels).loss  # AdaLoRA adds its penalty here
        if getattr(model.active_peft_config, "kasa_config", None) is not None:
            loss = loss + model.base_model._get_kasa_loss()
        loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):  # AdaLoRA; AdaMSS, whose callback counts from 0
            model.base_model.update_and_allocate(step - (model.peft_type == "ADAMSS"))
    with torch.no_grad():
        model(input_ids=input_ids)  # constrained OFT changes its parameters in it
    return {f"after.{key}": parameter.detach().clone() for key, parameter in parameters}


def write_case(base, case, directory, steps=False):
    shutil.rmtree(directory, ignore_errors=True)
    start, other = start_of(base, case, 1), start_of(base, case, 2)
    torch.manual_seed(1)
    model = wrap(base, case)
    with torch.no_grad():
        for key, parameter in trainable(model):
            parameter.add_(fill(key, parameter.shape, case.scale_of(key)))
    input_ids, labels = rows_and_labels()
    with torch.no_grad():
        before = model(input_ids=input_ids).logits  # constrained OFT changes its parameters in it
        untouched = base()(input_ids=input_ids).logits
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)

    torch.manual_seed(3)
    model = peft.PeftModel.from_pretrained(base(), directory, is_trainable=True).eval()
    logits = model(input_ids=input_ids).logits
    loss = loss_of(logits, labels)
    loss.backward()
    gradients = {f"grad.{key}": p.grad.clone() for key, p in trainable(model)}
    logits, loss = logits.detach().contiguous(), loss.detach().reshape(1)
    after = trained(model, input_ids, labels) if steps else {}
    save_file({"logits": logits, "loss": loss, **gradients, **after,
               **{f"start.{key}": value for key, value in start.items() if torch.equal(value, other[key])}},
              directory / "oracle.safetensors")
    lost = (before - logits).abs().max().item()
    assert lost < 1e-3, f"{directory.name}: loaded, PEFT computes other logits, by {lost:.2e}"
    change = (logits - untouched).abs().max().item()
    assert change > 0.05, f"{directory.name}: changes logits by {change:.2e} only"
    return loss.item(), change


def write(model_directory, output, names=()):
    """DIR/<name> for those named, or for every case and nothing else; and the directory of NF4 beside it."""
    nf4 = output.parent / f"{output.name}_nf4"
    if not names:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(nf4, ignore_errors=True)
    torch.set_num_threads(1)
    prepare_peft()
    of_folder = functools.cache(lambda name: copies_of(model_directory.parent.parent / name / "model"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on models without a name
        for name in names or CASES:
            write_case(of_folder(CASES[name].base), CASES[name], output / name, name in STEPPED)
        base = of_folder("qwen2")
        for name in [name for name in NF4 if not names or name in names]:
            write_case(lambda: through_nf4(base()), CASES[name], nf4 / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--base", type=pathlib.Path, required=True, metavar="MODEL_DIR")
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    write(arguments.base, arguments.output, arguments.names)


if __name__ == "__main__":
    main()
