"""Heads over labels: sequence and token classification, the linear probe, their files, and lists of methods.

Oracles: transformers' ...ForSequenceClassification and ...ForTokenClassification, PEFT, and torch's L-BFGS.
"""

from __future__ import annotations

import json
import warnings

import h5py
import numpy as np
import peft
import pytest
import torch
import transformers
from graft_cli import MODEL, adapter, graft, lanes, losses, succeed, write_config, write_rows
from safetensors.torch import load_file

SEQUENCE, TOKEN = "sequence_classification", "token_classification"
AUTO = {SEQUENCE: transformers.AutoModelForSequenceClassification, TOKEN: transformers.AutoModelForTokenClassification}
NAMES = ["cat", "dog", "emu"]
LENGTHS = [9, 24, 5, 17, 12, 3, 21, 8]
TOLERANCE = 1e-5  # of logits below 1
LORA = '{"method": "lora", "r": 4, "target_modules": "all-linear"}'


def write_labelled(path, task, lengths=LENGTHS, names=NAMES, **attributes):
    """Documents with random labels; of tokens where `task` says so, then the mask is write_rows'."""
    documents, masks = write_rows(path, lengths, **attributes)
    random = np.random.default_rng(4)
    with h5py.File(path, "a") as file:
        file["labels"] = np.array([name.encode() for name in names], "S8")
        if task == TOKEN:
            file["token_labels"] = random.integers(0, len(names), sum(lengths)).astype(np.uint32)
        else:
            file["label"] = random.integers(0, len(names), len(lengths)).astype(np.int32)
        labels = file["token_labels" if task == TOKEN else "label"][:]
    return documents, masks, labels


def config_of(folder, task, *overrides, **options):
    folder.mkdir(exist_ok=True)
    write_labelled(folder / "rows.h5", task, **options)
    return write_config(folder / "run.yaml", folder / "rows.h5", f'train.task="{task}"', 'model.quantization="none"',
                        'eval.metrics=["loss", "accuracy"]', f"peft=[{LORA}]", *overrides)


def theirs(task, directory=None, base=MODEL):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a new head
        model = AUTO[task].from_pretrained(base, num_labels=len(NAMES), dtype=torch.float32, attn_implementation="eager")
        return (peft.PeftModel.from_pretrained(model, directory) if directory else model).eval()


def logits_of(model, documents):
    with torch.no_grad():
        rows = [torch.tensor(document.astype("int64"))[None] for document in documents]
        return [model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0] for row in rows]


def check_logits(file, expected):
    ours = load_file(file)
    assert len(ours) == len(expected)
    for i, logits in enumerate(expected):
        logits = logits.reshape(-1, len(NAMES))  # a sequence has one row
        assert ours[f"row.{i}"].shape == logits.shape
        torch.testing.assert_close(ours[f"row.{i}"], logits, atol=TOLERANCE * max(1, logits.abs().max()), rtol=0)


def expected_metrics(logits, masks, labels, task):
    logits = torch.cat([row.reshape(-1, len(NAMES)) for row in logits])
    labels = torch.tensor(labels.astype("int64"))
    if task == TOKEN:
        mask = torch.tensor(np.concatenate(masks) == 1)
        logits, labels = logits[mask], labels[mask]
    return (torch.nn.functional.cross_entropy(logits, labels).item(),
            (logits.argmax(-1) == labels).float().mean().item())


@pytest.mark.parametrize("task", [SEQUENCE, TOKEN])
@pytest.mark.parametrize("method", [LORA, '{"method": "p_tuning_v2", "num_virtual_tokens": 3}', '{"method": "linear_probe"}'])
def test_peft_loads_what_graft_trained_and_computes_its_logits_loss_and_accuracy(tmp_path, task, method):
    path = config_of(tmp_path / "job", task, f"peft=[{method}]")
    run = path.parent / "run"
    documents, masks, labels = write_labelled(tmp_path / "rows.h5", task)
    succeed("train", path)
    said = json.loads(succeed("eval", path, "--json", "--logits", tmp_path / "logits.safetensors").stdout)
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert config["task_type"] == {SEQUENCE: "SEQ_CLS", TOKEN: "TOKEN_CLS"}[task]
    assert config["modules_to_save"] == ["score"]
    if config["peft_type"] is None:  # PEFT has no linear probe: its head alone
        model = theirs(task)
        head = load_file(run / "adapter/adapter_model.safetensors")
        model.load_state_dict({key.removeprefix("base_model.model."): value for key, value in head.items()}, strict=False)
    else:
        model = theirs(task, run / "adapter")
    logits = logits_of(model, documents)
    check_logits(tmp_path / "logits.safetensors", logits)
    loss, accuracy = expected_metrics(logits, masks, labels, task)
    assert said["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert said["metrics"]["accuracy"] == pytest.approx(accuracy)
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("task", [SEQUENCE, TOKEN])
def test_graft_loads_what_peft_wrote_and_computes_its_logits(tmp_path, task):
    """As --adapter, and as the start of a training, whose first loss is PEFT's."""
    path = config_of(tmp_path / "job", task, f'peft=[{{"init_from": "{tmp_path / "theirs"}"}}]', "train.max_steps=1",
                     "data.packing=false", "train.gradient_accumulation_steps=8")
    documents, masks, labels = write_labelled(tmp_path / "rows.h5", task)
    torch.manual_seed(1)
    model = peft.get_peft_model(theirs(task), peft.LoraConfig(
        task_type={SEQUENCE: "SEQ_CLS", TOKEN: "TOKEN_CLS"}[task], r=4, target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "theirs")
    logits = logits_of(model, documents)
    succeed("eval", path, "--adapter", tmp_path / "theirs", "--logits", tmp_path / "a.safetensors")
    check_logits(tmp_path / "a.safetensors", logits)
    succeed("train", path)
    assert losses(path.parent / "run")[0] == pytest.approx(expected_metrics(logits, masks, labels, task)[0], rel=1e-5)


@pytest.mark.parametrize("task", [SEQUENCE, TOKEN])
def test_a_classifiers_folder_starts_from_its_own_head(tmp_path, task):
    torch.manual_seed(1)
    theirs(task).save_pretrained(tmp_path / "base")
    path = config_of(tmp_path / "job", task, f'model.name_or_path="{tmp_path / "base"}"')
    documents, _, _ = write_labelled(tmp_path / "rows.h5", task)
    succeed("eval", path, "--base", "--logits", tmp_path / "a.safetensors")
    check_logits(tmp_path / "a.safetensors", logits_of(theirs(task, base=tmp_path / "base"), documents))
    few = config_of(tmp_path / "few", task, f'model.name_or_path="{tmp_path / "base"}"', names=NAMES[:2])
    done = graft("eval", few, "--base")
    assert done.returncode == 2 and "3 labels, the data has 2" in done.stderr
    causal = write_config(tmp_path / "causal.yaml", path.parent / "rows.h5", f'model.name_or_path="{tmp_path / "base"}"')
    done = graft("train", causal)
    assert done.returncode == 2 and f"train.task: {task}" in done.stderr


def test_one_two_and_four_ranks_and_a_resumed_run_leave_the_same_bytes(tmp_path):
    """Packed rows: each document has its own last token."""
    runs = []
    for ranks in (1, 2, 4):
        path = config_of(tmp_path / str(ranks), SEQUENCE, "data.packing=true", f'model.quantization="nf4"', lanes(ranks))
        succeed("train", path, ranks=ranks)
        runs.append(path.parent / "run")
    assert adapter(runs[0]) == adapter(runs[1]) == adapter(runs[2])
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])
    path = config_of(tmp_path / "again", SEQUENCE, "data.packing=true", 'model.quantization="nf4"', "train.max_steps=2")
    succeed("train", path)
    succeed("train", path, "train.max_steps=4")
    assert adapter(path.parent / "run") == adapter(runs[0])


def test_packed_or_padded_the_loss_is_that_of_the_documents(tmp_path):
    said = []
    for packing in ("true", "false"):
        path = config_of(tmp_path / packing, SEQUENCE, f"data.packing={packing}")
        said.append(json.loads(succeed("eval", path, "--json").stdout)["metrics"])
    assert said[0]["loss"] == pytest.approx(said[1]["loss"], rel=1e-6) and said[0]["accuracy"] == said[1]["accuracy"]


def test_the_metrics_of_training_have_the_accuracy_that_eval_says(tmp_path):
    path = config_of(tmp_path / "job", SEQUENCE, "eval.eval_steps=2")
    succeed("train", path)
    said = json.loads(succeed("eval", path, "--json").stdout)["metrics"]
    lines = [json.loads(line) for line in open(path.parent / "run/metrics.jsonl", encoding="utf-8")]
    assert (lines[-1]["eval_accuracy"], lines[-1]["eval_loss"]) == (said["accuracy"], pytest.approx(said["loss"]))
    assert "eval_accuracy" not in lines[0]


def test_a_new_head_is_a_function_of_the_seed_and_no_part_of_the_bases_fingerprint(tmp_path):
    said = [json.loads(succeed("eval", config_of(tmp_path / str(i), SEQUENCE, f"train.seed={seed}"), "--json").stdout)
            for i, seed in enumerate((1, 2, 1))]
    assert said[0]["base_fingerprint"] == said[1]["base_fingerprint"]
    assert said[0]["metrics"] == said[2]["metrics"] != said[1]["metrics"]


def test_an_adapter_for_other_labels_is_not_evaluated(tmp_path):
    path = config_of(tmp_path / "job", SEQUENCE, "train.max_steps=1")
    succeed("train", path)
    write_labelled(tmp_path / "other.h5", SEQUENCE, names=NAMES[::-1])
    done = graft("eval", path, f'data.eval=["{tmp_path / "other.h5"}"]')
    assert done.returncode == 3 and "cat, dog, emu" in done.stderr


def test_a_linear_probe_ends_at_the_optimum_of_the_convex_problem(tmp_path):
    """Second formula: L-BFGS on the features that transformers computes."""
    lengths = [5] * 200
    names = NAMES[:2]
    path = config_of(tmp_path / "job", SEQUENCE, 'peft=[{"method": "linear_probe"}]', "train.max_steps=300",
                     "train.per_device_train_batch_size=50", "train.learning_rate=0.1", 'train.lr_scheduler_type="cosine"',
                     "train.max_grad_norm=0.0", "data.packing=false", 'data.shuffle=false', lengths=lengths, names=names)
    documents, _, labels = write_labelled(tmp_path / "rows.h5", SEQUENCE, lengths, names)
    succeed("train", path, seconds=300)
    found = json.loads(succeed("eval", path, "--json").stdout)["metrics"]["loss"]
    body = transformers.AutoModel.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        features = body(input_ids=torch.tensor(np.stack(documents).astype("int64"))).last_hidden_state[:, -1].double()
    head = torch.zeros(2, features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(features @ head.T, torch.tensor(labels.astype("int64")))
        value.backward()
        return value
    optimizer.step(loss)
    assert found == pytest.approx(loss().item(), abs=1e-4)
    assert list(load_file(path.parent / "run/adapter/adapter_model.safetensors")) == ["base_model.model.score.weight"]


def test_an_answer_in_the_text_is_not_read(tmp_path):
    """Documents that end with their label's tokens, as graft prepare writes them, have the loss of those without."""
    path = config_of(tmp_path / "plain", SEQUENCE)
    documents, _, labels = write_labelled(tmp_path / "rows.h5", SEQUENCE)
    answers = [np.array(answer, np.uint32) for answer in ([90, 91], [92], [93, 94, 95])]
    with_answer = [np.concatenate([document, answers[label]]) for document, label in zip(documents, labels)]
    other = config_of(tmp_path / "answered", SEQUENCE, "data.max_length=32")
    with h5py.File(other.parent / "rows.h5", "a") as file:
        for name, value in {"tokens": np.concatenate(with_answer),
                            "loss_mask": np.concatenate([np.repeat([0, 1], [len(d), len(answers[label])])
                                                         for d, label in zip(documents, labels)]).astype(np.uint8),
                            "offsets": np.cumsum([0, *map(len, with_answer)]).astype(np.uint64),
                            "label_tokens": np.concatenate(answers),
                            "label_offsets": np.cumsum([0, *map(len, answers)]).astype(np.uint64)}.items():
            if name in file:
                del file[name]
            file[name] = value
    said = [json.loads(succeed("eval", p, "--json").stdout)["metrics"]["loss"] for p in (path, other)]
    assert said[0] == pytest.approx(said[1], rel=1e-6)


@pytest.mark.parametrize("overrides, code, words", [
    (['eval.metrics=["accuracy"]', 'train.task="causal_lm"'], 2, "eval.metrics"),
    ([f'train.task="{TOKEN}"'], 3, "has no labels of its tokens"),
    (['data.eval=["OTHER"]', "eval.eval_steps=1"], 3, "has other labels than"),
    ([f"peft=[{LORA}, {{\"method\": \"linear_probe\"}}]"], 2, "trains the head"),
    (['peft=[{"method": "l2_sp"}]'], 2, "before it in the list"),
])
def test_mistakes_are_told_by_train_and_validate(tmp_path, overrides, code, words):
    write_labelled(tmp_path / "other.h5", SEQUENCE, names=NAMES[::-1])
    path = config_of(tmp_path / "job", SEQUENCE, *(o.replace("OTHER", str(tmp_path / "other.h5")) for o in overrides))
    done = graft("train", path)
    assert done.returncode == code and words in done.stderr, done.stderr
    done = graft("validate", path)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_generate_refuses_a_classifier(tmp_path):
    path = config_of(tmp_path / "job", SEQUENCE, "train.max_steps=1")
    succeed("train", path)
    run = path.parent / "run"
    done = graft("generate", run, "--prompt", "x")
    assert done.returncode == 2 and "labels, not text" in done.stderr
    causal = write_config(tmp_path / "causal.yaml", path.parent / "rows.h5", f'model.adapters=["{run / "adapter"}"]')
    done = graft("train", causal)
    assert done.returncode == 2 and "task_type SEQ_CLS" in done.stderr and SEQUENCE in done.stderr


def test_two_methods_are_saved_apart_and_peft_loads_each(tmp_path, rows):
    """Numbered by their place; a regulariser between them saves nothing."""
    path = write_config(tmp_path / "run.yaml", rows, 'model.quantization="none"',
                        f'peft=[{LORA}, {{"method": "l2_sp"}}, {{"method": "ia3"}}]')
    succeed("train", path)
    run = tmp_path / "run"
    assert sorted(part.name for part in (run / "adapter").iterdir()) == ["0", "1"]
    succeed("eval", path, "--logits", tmp_path / "both.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    for part in "0", "1":  # merged one after the other, they are the stack
        model = peft.PeftModel.from_pretrained(model, run / "adapter" / part).merge_and_unload()
    with h5py.File(rows) as file:
        document = file["tokens"][: file["offsets"][1]]
    expected = logits_of(model.eval(), [document])[0]
    torch.testing.assert_close(load_file(tmp_path / "both.safetensors")["row.0"], expected, atol=1e-4, rtol=0)


def test_l2_sp_holds_parameters_near_their_start_at_any_rank_count(tmp_path, rows):
    moved = {}
    for alpha in (0, 50):
        for ranks in (1, 2):
            folder = tmp_path / f"{alpha}-{ranks}"
            folder.mkdir()
            path = write_config(folder / "run.yaml", rows, f'peft=[{LORA}, {{"method": "l2_sp", "alpha": {alpha}}}]', lanes(ranks))
            succeed("train", path, ranks=ranks)
        assert adapter(tmp_path / f"{alpha}-1/run") == adapter(tmp_path / f"{alpha}-2/run")
        tensors = load_file(tmp_path / f"{alpha}-1/run/adapter/adapter_model.safetensors")
        moved[alpha] = sum(value.square().sum() for key, value in tensors.items() if "lora_B" in key).item()
    assert moved[50] < 0.5 * moved[0]


def test_a_mam_adapter_goes_on_where_it_was_saved(tmp_path, rows):
    fields = '"method": "mam", "prefix_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8}'
    path = write_config(tmp_path / "run.yaml", rows, f"peft=[{{{fields}}}]")
    succeed("train", path)
    said = [json.loads(succeed("eval", path, *flags, "--json").stdout)["metrics"]["loss"]
            for flags in ([], [f'peft=[{{"init_from": "{tmp_path / "run/adapter"}"}}]', f"checkpoint.output_dir={tmp_path}/none"])]
    assert said[0] == said[1]
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
