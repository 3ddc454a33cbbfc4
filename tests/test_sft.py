"""sft.py on a tiny random model: what is trained, on which tokens, and that a stop loses nothing."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import sft
from common.cli import Stopped
from common.errors import UserError
from data.batching import collate, encode_text, num_targets
from data.chat import render
from models.adapters import AdapterConfig, attach_adapter, load_adapter, read_adapter, set_adapter_weights
from models.loading import load
from models.soft_prompt import soft_prompt_ids
from models.value_head import ScoringModel, new_value_head, save_value_head
from tests.scripts import ROOT, call, fails
from training import objectives, optimizer, optimizer_groups, sft_loop
from training.metrics import read_metrics
from training.objectives import LanguageModelling, RewardModelling
from training.plots import plot_run
from training.ppo import logprobs_from_logits
from training.settings import SFTSettings

SPLITS = ("train", "valid", "test")
TIMES = ("steps_per_second", "tokens_per_second", "peak_memory_gb")
KINDS: dict[str, list[Any]] = {
    "lora": ["--lora-dropout", 0.1],
    "dora": ["--fine-tune-type", "dora"],
    "full": ["--fine-tune-type", "full"],
    "soft_prompt": ["--prompt-tuning", "--num-prompt-tokens", 12],
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def even_numbers(count, seed, longest=6):
    rng = random.Random(seed)
    return [" ".join(str(2 * rng.randrange(50)) for _ in range(rng.randrange(2, longest))) for _ in range(count)]


def learnable_pairs(count, seed):
    """Texts whose reward is plain to see: one with an x is good."""
    rows = []
    for index, text in enumerate(even_numbers(count, seed)):
        good = index % 2
        rows.append({"text": text + (" x" if good else " y"), "reward": str(good / 2)})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of .jsonl files: sft_ for language modelling, reward_ for reward models."""
    folder = tmp_path_factory.mktemp("data")
    for seed, split in enumerate(SPLITS):
        write_rows(folder / f"sft_{split}.jsonl", [{"text": text} for text in even_numbers(20, seed)])
        write_rows(folder / f"reward_{split}.jsonl", learnable_pairs(40, seed))
    return folder


@pytest.fixture
def flags(tiny_folder, data, tmp_path, monkeypatch):
    """The flags of a short run in a folder of its own, whose picture is not drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "plot_run", lambda folder: None)

    def build(*more, run="run", base="sft_", **named):
        settings = {
            "model": tiny_folder, "data": data, "data-base": base, "iters": 6, "steps-per-report": 2,
            "steps-per-eval": 4, "save-every": 3, "save-file": f"{run}_adapter", "output-dir": run, **named,
        }  # fmt: skip
        return [*(word for name, value in settings.items() for word in (f"--{name}", value)), *more]

    return build


@pytest.fixture
def loaded(tiny_folder):
    return load(str(tiny_folder))


def arrays_of(path):
    """Weights and value head of an adapter, as bytes by name."""
    saved = read_adapter(path)
    head = {} if saved.value_head is None else {"value_head": saved.value_head.weight}
    return {name: np.array(array).tobytes() for name, array in {**saved.weights, **head}.items()}


def rows_of(run):
    """The metrics of a run without the times."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run)]


def curve(run, name):
    return [row[name] for row in read_metrics(run) if name in row]


def language_modelling(loaded, path, batch_size=4, max_length=2048, prefix=()):
    objective = LanguageModelling(loaded.tokenizer, list(prefix), batch_size, max_length, seed=0)
    objective.read(path)
    return objective


def gradients(module, objective, *arrays):
    (loss, _), by_name = nn.value_and_grad(module, objective.loss)(module, *arrays)
    return loss.item(), {name: np.array(array) for name, array in tree_flatten(by_name)}


# --- which tokens are trained ---


def trained(tokens, positions, mask):
    """The target tokens of a batch."""
    chosen = np.array(positions)[np.array(mask) > 0]
    return np.array(tokens)[:, 1:].ravel()[chosen].tolist()


def test_a_text_is_trained_from_its_first_token_through_its_eos(loaded, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "8 20"}])
    objective = language_modelling(loaded, path)
    arrays = objective.batch(0)
    tokenizer = loaded.tokenizer
    text = tokenizer.encode("8 20")
    assert text[0] == tokenizer.bos_token_id
    assert arrays[0][0].tolist()[: len(text) + 1] == [*text, tokenizer.eos_token_id]
    assert trained(*arrays) == [*text[1:], tokenizer.eos_token_id]


def test_of_a_pair_the_completion_and_its_eos_are_trained(loaded, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "8 20", "completion": " 22 30"}])
    arrays = language_modelling(loaded, path).batch(0)
    tokenizer = loaded.tokenizer
    assert trained(*arrays) == [
        *tokenizer.encode("8 20 22 30")[len(tokenizer.encode("8 20")) :],
        tokenizer.eos_token_id,
    ]


def test_what_stands_at_pads_changes_neither_loss_nor_gradient(loaded, data):
    attach_adapter(loaded.model, AdapterConfig("full"))
    objective = language_modelling(loaded, data / "sft_train.jsonl")
    # Rows of unlike length, so that there are pads.
    tokens, positions, mask = objective._arrays(np.array([0, 1, 2, 3, 4]))
    lengths = [len(objective.examples[row].tokens) for row in range(5)]
    assert min(lengths) < max(lengths)
    pads = mx.arange(tokens.shape[1])[None] >= mx.array(lengths)[:, None]
    noise = mx.random.randint(0, 40, tokens.shape)
    loss, expected = gradients(loaded.model, objective, tokens, positions, mask)
    noisy_loss, noisy = gradients(loaded.model, objective, mx.where(pads, noise, tokens), positions, mask)
    assert loss == noisy_loss
    for name in expected:
        np.testing.assert_allclose(noisy[name], expected[name], rtol=0, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("limit", [10**9, 16 * 4 * 64 * 20])  # bytes: all at once, or 20 targets at a time
@pytest.mark.parametrize("kind", ["lora", "full", "soft_prompt"])
def test_loss_accuracy_and_gradients_are_those_of_whole_logits(loaded, tmp_path, kind, limit):
    attach_adapter(loaded.model, AdapterConfig(kind, num_prompt_tokens=3))
    rows = [
        {"prompt": "2 4 6", "completion": " 8 10"},
        {"prompt": "2", "completion": " 4 6 8 10 12 14 16"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows * 8)
    objective = LanguageModelling(loaded.tokenizer, soft_prompt_ids(loaded.model), 16, 2048, 0, logits_bytes=limit)
    objective.read(path)
    batch = collate(objective.examples, loaded.tokenizer.pad_token_id)
    tokens, targets = mx.array(batch.tokens), mx.array(batch.targets)

    def plainly(model):
        logits = model(tokens[:, :-1])
        logprobs = logprobs_from_logits(logits, tokens[:, 1:])
        correct = (logits.argmax(axis=-1) == tokens[:, 1:]) * targets
        return -(logprobs * targets).sum() / targets.sum(), correct.sum()

    loaded.model.train()
    (loss, correct), expected = nn.value_and_grad(loaded.model, plainly)(loaded.model)
    arrays = objective._arrays(np.arange(16))
    assert arrays[1].size % 32 == 0 and arrays[2].sum() == targets.sum()
    (got, figures), found = nn.value_and_grad(loaded.model, objective.loss)(loaded.model, *arrays)
    assert got.item() == pytest.approx(loss.item(), abs=1e-5)
    assert figures.correct.item() == correct.item() and figures.count.item() == targets.sum().item()
    for (name, gradient), (_, other) in zip(tree_flatten(found), tree_flatten(expected), strict=True):
        np.testing.assert_allclose(np.array(gradient), np.array(other), rtol=0, atol=1e-5, err_msg=name)


def test_of_a_batch_of_long_prompts_only_the_targets_reach_the_output_layer(loaded, tmp_path, monkeypatch):
    rows = [{"prompt": "2 4 6 8 10 12 14 16 18 20", "completion": " 22"}] * 32
    objective = language_modelling(loaded, write_rows(tmp_path / "a.jsonl", rows), batch_size=32)
    reached: list[int] = []
    plain = objectives.token_stats

    def recorded(model, hidden, *args, **arguments):
        reached.append(len(hidden))
        return plain(model, hidden, *args, **arguments)

    monkeypatch.setattr(objectives, "token_stats", recorded)
    tokens, *arrays = objective.batch(0)
    objective.loss(loaded.model, tokens, *arrays)
    targets = sum(map(num_targets, objective.examples))
    assert targets <= reached[0] < targets + 32 < tokens.size // 3


def test_batch_mates_and_padding_width_change_nothing(loaded, data):
    attach_adapter(loaded.model, AdapterConfig("full"))
    objective = language_modelling(loaded, data / "sft_train.jsonl")
    rows = [3, 11, 7]
    _, figures = objective.loss(loaded.model, *objective._arrays(np.array(rows)))
    alone = [objective.loss(loaded.model, *objective._arrays(np.array([row])))[1] for row in rows]
    widths = {objective._arrays(np.array([row]))[0].shape[1] for row in rows}
    assert len(widths) > 1
    assert figures.loss.item() == pytest.approx(sum(one.loss.item() for one in alone), abs=1e-4)
    assert figures.count.item() == sum(one.count.item() for one in alone)
    _, backward = objective.loss(loaded.model, *objective._arrays(np.array(rows[::-1])))
    assert figures.loss.item() == pytest.approx(backward.loss.item(), abs=1e-4)


def test_an_epoch_holds_every_row_once(loaded, data):
    objective = language_modelling(loaded, data / "sft_train.jsonl", batch_size=3)
    seen = [objective.plan.rows(step).tolist() for step in range(14)]
    assert [len(rows) for rows in seen[:7]].count(3) == 6
    for epoch in (seen[:7], seen[7:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(20))
    validated = sum(arrays[0].shape[0] for arrays in objective.batches())
    assert validated == 20


def test_a_batch_depends_on_seed_and_step_alone(loaded, data):
    def tokens(step, steps_before=()):
        objective = language_modelling(loaded, data / "sft_train.jsonl")
        for other in steps_before:
            objective.batch(other)
        return np.array(objective.batch(step)[0]).tolist()

    assert tokens(9) == tokens(9, steps_before=(0, 3, 12)) != tokens(8)


def conversation(*contents):
    """A row of messages that begins with the user."""
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def test_a_conversation_trains_what_its_prompts_and_completions_would(loaded, tmp_path):
    """The embedded model's template goes on from the last message, so each turn is an example of its own."""
    talk = write_rows(tmp_path / "a.jsonl", [conversation("2 4", "6 8", "10", "12 14")])
    pairs = [{"prompt": "2 4", "completion": " 6 8"}, {"prompt": "10", "completion": " 12 14"}]
    objectives = [language_modelling(loaded, path) for path in (talk, write_rows(tmp_path / "b.jsonl", pairs))]
    assert objectives[0].examples == objectives[1].examples
    with pytest.raises(UserError, match=r"c\.jsonl:2: no message has the role"):
        language_modelling(loaded, write_rows(tmp_path / "c.jsonl", [{"text": "2"}, conversation("2")]))


def test_what_was_cut_is_said_and_in_the_summary_and_keys_have_other_names(flags, tmp_path, capsys):
    rows = [
        {"question": "2 4 6", "reply": " 8"},
        {"question": "2", "reply": " 4 6 8 10"},
        {"question": "2", "reply": " 4"},
    ]
    for split in ("train", "valid"):
        write_rows(tmp_path / f"asked_{split}.jsonl", rows[: 3 if split == "train" else 2])
    words = ["--train", "--max-length", 4, "--prompt-feature", "question", "--completion-feature", "reply"]
    call(sft.main, *flags(*words, base="asked_", data=tmp_path, iters=1))
    assert "train: 3 rows, 2 cut to 4 tokens, 1 of them with nothing left to train\n" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["truncated_rows"], summary["truncated_valid_rows"]) == (2, 2)


def test_without_the_mask_prompts_are_trained_too(flags, tmp_path):
    for split in ("train", "valid"):
        write_rows(tmp_path / f"pairs_{split}.jsonl", [{"prompt": "2 4 6 8 10 12", "completion": " 5"}] * 4)
    for name, words in {"masked": ["--mask-prompt"], "whole": ["--no-mask-prompt"]}.items():
        call(sft.main, *flags("--train", *words, base="pairs_", data=tmp_path, run=name, iters=1))
    assert curve("masked", "valid_loss") != curve("whole", "valid_loss")


def test_a_saved_data_set_trains_and_names_what_it_holds_out(flags, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    rows = [{"Input": "2 4", "Output": f" {n}"} for n in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    call(sft.main, *flags("--train", data=tmp_path / "saved", iters=1))
    said = capsys.readouterr().out
    assert "train: 18 rows of" in said and "valid: 2 rows of" in said and "last 10 %" in said


def test_rows_past_the_limit_are_cut_and_counted(loaded, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "2 4 6 8 10 12"}, {"text": "2"}])
    objective = language_modelling(loaded, path, max_length=5)
    assert objective.truncated == 1
    assert max(len(example.tokens) for example in objective.examples) == 5
    # A completion that was cut away leaves nothing to train, and no NaN.
    path = write_rows(tmp_path / "b.jsonl", [{"prompt": "2 4 6 8 10", "completion": " 12"}, {"text": "2"}])
    objective = language_modelling(loaded, path, batch_size=1, max_length=5)
    losses = [objective.loss(loaded.model, *arrays)[0].item() for arrays in objective.batches()]
    assert min(losses) == 0.0 and max(losses) > 0


def test_the_eos_is_learned(flags, loaded, tmp_path):
    write_rows(tmp_path / "own/train.jsonl", [{"text": "8 20"}])
    write_rows(tmp_path / "own/valid.jsonl", [{"text": "8 20"}])
    call(sft.main, *flags("--train", "--lora-layers", -1, data="own", base="", iters=60, **{"steps-per-eval": 100}))
    load_adapter(loaded.model, "run_adapter")
    text = loaded.tokenizer.encode("8 20")
    assert mx.argmax(loaded.model(mx.array([text]))[0], axis=-1).tolist() == [*text[1:], loaded.tokenizer.eos_token_id]


# --- dropout ---


def dropping(loaded, data, dropout):
    config = AdapterConfig(lora_parameters={"rank": 4, "scale": 10.0, "dropout": dropout})
    attach_adapter(loaded.model, config)
    for _, module in loaded.model.named_modules():
        if hasattr(module, "lora_b"):
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
    return language_modelling(loaded, data / "sft_valid.jsonl")


def test_dropout_is_off_in_evaluation_and_on_in_training(tiny_folder, data):
    with_dropout, without = load(str(tiny_folder)), load(str(tiny_folder))
    objective, _ = dropping(with_dropout, data, 0.5), dropping(without, data, 0.0)
    with_dropout.model.train()
    results = [sft.evaluate(with_dropout.model, objective) for _ in range(2)]
    assert results[0] == results[1] == sft.evaluate(without.model, objective)
    with_dropout.model.train()
    batch = objective.batch(0)
    losses = {objective.loss(with_dropout.model, *batch)[0].item() for _ in range(3)}
    assert len(losses) == 3


def test_training_goes_on_with_dropout_after_an_evaluation(flags, monkeypatch):
    modes = []
    real = LanguageModelling.loss

    def recorded(self, module, *arrays):
        modes.append(module.training)
        return real(self, module, *arrays)

    monkeypatch.setattr(LanguageModelling, "loss", recorded)
    monkeypatch.setattr(optimizer, "compiling_pays", lambda: False)  # a compiled loss is called once a shape
    call(sft.main, *flags("--train", "--val-batches", 1, "--lora-dropout", 0.1))
    # Validation of one batch before step 1, after steps 4 and 6, and for the summary.
    assert modes == [False, *[True] * 4, False, *[True] * 2, False, False]


def test_val_batches_is_a_number_of_batches(loaded, data):
    objective = language_modelling(loaded, data / "sft_valid.jsonl", batch_size=4)
    for count, batches in ((2, 2), (-1, 5), (9, 5)):
        used = [objective.loss(loaded.model, *arrays)[1] for arrays in objective.batches(count)]
        assert len(used) == batches
        loss, accuracy = sft.evaluate(loaded.model, objective, count).values()
        tokens = sum(figures.count.item() for figures in used)
        assert loss == pytest.approx(sum(figures.loss.item() for figures in used) / tokens, rel=1e-5)
        assert accuracy == pytest.approx(sum(figures.correct.item() for figures in used) / tokens, rel=1e-5)


def rows_seen(objective, count):
    """The token ids of `count` batches of a validation, row by row."""
    eos = objective.tokenizer.eos_token_id
    rows = [row for arrays in objective.batches(count) for row in arrays[0].tolist()]
    return [tuple(row[: row.index(eos) + 1]) for row in rows]


def test_a_validation_of_some_rows_is_of_all_lengths_and_always_the_same(loaded, data, tmp_path):
    texts = [{"text": " ".join(["2"] * (1 + index // 4))} for index in range(40)]  # lengths 1 to 10, four of each
    objective = language_modelling(loaded, write_rows(tmp_path / "a.jsonl", texts))
    some = rows_seen(objective, 3)
    lengths = sorted(len(row) for row in some)
    assert len(some) == 12 and lengths[0] <= 4 and lengths[-1] >= 10  # the 12 shortest end at 5 tokens
    assert [len(row) for row in some] == lengths  # neighbours in length share a batch
    objective.batch(3)
    assert rows_seen(objective, 3) == some
    other_seed = LanguageModelling(loaded.tokenizer, [], 4, 2048, seed=7)
    other_seed.read(tmp_path / "a.jsonl")
    assert rows_seen(other_seed, 3) == some
    assert len(rows_seen(objective, -1)) == 40


def test_a_reward_model_s_validation_is_of_all_lengths_too(loaded, tmp_path):
    rows = [{"chosen": " ".join(["2"] * (1 + index // 2)), "rejected": "4"} for index in range(40)]
    objective = reward_modelling(loaded, write_rows(tmp_path / "a.jsonl", rows))
    longest = [max(int(length) for length in arrays[1].tolist()) for arrays in objective.batches(2)]
    assert len(longest) == 2 and longest[1] > 12  # of the eight shortest none is above 6
    assert longest == [max(int(n) for n in arrays[1].tolist()) for arrays in objective.batches(2)]


def test_the_last_point_of_the_curve_is_the_summary_s(flags):
    call(sft.main, *flags("--train", "--val-batches", 2))
    summary = json.loads(Path("run/summary.json").read_text(encoding="utf-8"))
    assert [summary[name] for name in ("valid_loss", "valid_accuracy")] == [
        curve("run", name)[-1] for name in ("valid_loss", "valid_accuracy")
    ]


# --- whole runs ---


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_changes_the_adapter_alone(flags, loaded, monkeypatch, kind):
    before = {name: np.array(array) for name, array in tree_flatten(loaded.model.parameters())}
    monkeypatch.setattr(sft, "load", lambda name: loaded)
    call(sft.main, *flags("--train", *KINDS[kind], iters=40, **{"steps-per-eval": 20, "batch-size": 8}))

    losses = curve("run", "valid_loss")
    assert losses[-1] < losses[0] - 0.1
    assert curve("run", "valid_accuracy")[-1] > curve("run", "valid_accuracy")[0]
    saved = read_adapter("run_adapter")
    assert saved.config.fine_tune_type == kind
    assert saved.weights.keys() == dict(tree_flatten(loaded.model.trainable_parameters())).keys()
    if kind == "full":
        assert saved.weights.keys() == before.keys()
        return
    frozen = {name: array for name, array in tree_flatten(loaded.model.parameters()) if name not in saved.weights}
    assert len(frozen) == len(before)
    for name, array in frozen.items():
        own_name = name.replace(".linear.", ".").replace(".embedding.", ".")
        assert np.array(array).tobytes() == before[own_name].tobytes(), name


def test_a_run_leaves_config_metrics_summary_picture_and_adapter(flags, monkeypatch, capsys):
    monkeypatch.setattr(sft, "plot_run", plot_run)
    call(sft.main, *flags("--train", "--test", run="whole", **{"save-file": "whole/out.npz"}))
    run = Path("whole")
    assert {path.name for path in run.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "curves.png", "checkpoints", "out.npz", "out.json", "lock",
    }  # fmt: skip
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["iters"] == 6
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 6 and summary["picture"] == "whole/curves.png" and summary["adapter"] == "whole/out.npz"
    steps = [(row["step"], "valid_loss" in row) for row in rows_of(run)]
    assert steps == [(0, True), (2, False), (4, False), (4, True), (6, False), (6, True)]
    assert "test_loss: " in capsys.readouterr().out


def test_a_resumed_adapter_begins_where_it_ended(flags):
    call(sft.main, *flags("--train", run="first"))
    call(sft.main, *flags("--train", "--resume-adapter-file", "first_adapter", run="second"))
    assert curve("second", "valid_loss")[0] == curve("first", "valid_loss")[-1]
    assert curve("second", "valid_loss")[-1] < curve("first", "valid_loss")[-1]


@pytest.mark.parametrize("name", ["weights.npz", "weights.safetensors"])
def test_an_adapter_may_be_one_file(flags, name, tmp_path):
    call(sft.main, *flags("--train", run="folder"))
    call(sft.main, *flags("--train", "--save-file", name, run="file"))
    assert {path.name for path in tmp_path.glob("weights.*")} == {name, "weights.json"}
    assert arrays_of(name) == arrays_of("folder_adapter")


def test_test_reports_the_loss_of_the_adapter_on_the_test_rows(flags, loaded, data, capsys):
    call(sft.main, *flags("--train"))
    capsys.readouterr()
    call(sft.main, *flags("--test", "--resume-adapter-file", "run_adapter", run="unused"))
    load_adapter(loaded.model, "run_adapter")
    loss, accuracy = sft.evaluate(loaded.model, language_modelling(loaded, data / "sft_test.jsonl")).values()
    assert f"test_loss: {loss:.4f} | test_accuracy: {accuracy:.4f}" in capsys.readouterr().out.splitlines()
    assert not Path("unused").exists()


def test_a_loss_that_is_not_finite_skips_the_update_and_says_so(flags, monkeypatch, capsys):
    weights: list[list[bytes]] = []
    real = sft_loop.update

    def spoiled(module, optimizer, loss, by_name, limit, planned):
        bad = len(weights) == 2
        norm = real(module, optimizer, mx.array(float("nan")) if bad else loss, by_name, limit, planned)
        weights.append([np.array(array).tobytes() for _, array in tree_flatten(module.trainable_parameters())])
        return norm

    monkeypatch.setattr(sft_loop, "update", spoiled)
    call(sft.main, *flags("--train"))
    assert weights[2] == weights[1] != weights[3]
    assert "step 3: the loss or gradient is not finite; the update is skipped" in capsys.readouterr().out
    assert curve("run", "skipped_updates") == [0, 1, 1]


def test_train_sft_is_the_script_without_files(flags, loaded, data):
    call(sft.main, *flags("--train"))
    settings = SFTSettings(iters=6, steps_per_report=2, steps_per_eval=4)
    trainee = sft_loop.build_trainee(loaded, settings, AdapterConfig())
    rows = data / "sft_train.jsonl", data / "sft_valid.jsonl"
    history = sft_loop.train_sft(trainee, loaded.tokenizer, *rows, settings)
    assert [{name: value for name, value in row.items() if name not in TIMES} for row in history] == rows_of("run")
    weights = dict(tree_flatten(trainee.model.trainable_parameters()))
    assert {name: np.array(array).tobytes() for name, array in weights.items()} == arrays_of("run_adapter")
    with pytest.raises(UserError, match="--iters is 0"):
        sft_loop.train_sft(trainee, loaded.tokenizer, *rows, SFTSettings(iters=0))


# --- reward models ---


def reward_modelling(loaded, path, batch_size=4):
    objective = RewardModelling(loaded.tokenizer, [], batch_size, 2048, seed=0, center_coef=0.0)
    objective.read(path)
    return objective


def texts_of(loaded, objective, arrays):
    """The texts of a batch, as (chosen, rejected) pairs."""
    tokens, lengths, _ = (np.array(array) for array in arrays)
    texts = [loaded.tokenizer.decode(row[: n - 1].tolist()[1:]) for row, n in zip(tokens, lengths, strict=True)]
    assert all(row[n - 1] == loaded.tokenizer.eos_token_id for row, n in zip(tokens, lengths, strict=True))
    half = len(texts) // 2
    return list(zip(texts[:half], texts[half:], strict=True))


def test_rewards_are_compared_as_numbers_and_ties_are_no_pairs(loaded, tmp_path):
    rewards = {"2": "9", "4": "10", "6": 10.0, "8": "-1", "12": "1e1"}
    path = write_rows(tmp_path / "a.jsonl", [{"text": text, "reward": reward} for text, reward in rewards.items()])
    objective = reward_modelling(loaded, path)
    pairs = [pair for step in range(40) for pair in texts_of(loaded, objective, objective.batch(step))]
    assert {text for pair in pairs for text in pair} == set(rewards)
    assert all(float(str(rewards[chosen])) > float(str(rewards[rejected])) for chosen, rejected in pairs)
    assert ("4", "2") in pairs and ("2", "4") not in pairs
    assert len(set(pairs)) > 5  # drawn anew in every epoch


def test_training_ranks_all_texts_of_a_batch_and_validation_the_drawn_pairs(loaded, tmp_path):
    reward_of = {"0": 0.0, "2": 0.5, "4": 0.5, "6": 1.0}
    rows = [{"text": text, "reward": reward} for text, reward in reward_of.items()]
    objective = reward_modelling(loaded, write_rows(tmp_path / "a.jsonl", rows))
    tokens, lengths, preferred = objective.batch(0)
    halves = zip(*texts_of(loaded, objective, (tokens, lengths, preferred)), strict=True)
    rewards = [reward_of[text] for half in halves for text in half]
    assert preferred.tolist() == [[float(a > b) for b in rewards] for a in rewards]
    assert preferred.sum() > len(rewards) / 2
    (_, _, drawn), *_ = objective.batches()
    assert np.argwhere(np.array(drawn)).tolist() == [[i, i + 4] for i in range(4)]
    # The loss is the mean over the preferred pairs, worked out by hand.
    scores = mx.array([1.0, 0.0, 0.5, -1.0])
    better = mx.array([[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=mx.float32)
    loss, figures = objective.loss(lambda tokens, lengths: scores, tokens, lengths, better)
    assert loss.item() == pytest.approx(np.mean([np.log1p(np.exp(-d)) for d in (1.0, 2.0, 1.0)]), abs=1e-6)
    assert figures.count.item() == figures.correct.item() == 3


@pytest.mark.parametrize("prompt", [None, "2 4"])
def test_given_pairs_are_read_with_their_prompt(loaded, tmp_path, prompt):
    rows = [{"chosen": " 6", "rejected": " 5"}, {"chosen": " 8", "rejected": " 7 x"}]
    rows = [row if prompt is None else {"prompt": prompt, **row} for row in rows]
    objective = reward_modelling(loaded, write_rows(tmp_path / "a.jsonl", rows))
    start = "" if prompt is None else prompt
    pairs = {tuple(text.strip() for text in pair) for pair in texts_of(loaded, objective, objective.batch(0))}
    assert pairs == {(f"{start} 6".strip(), f"{start} 5".strip()), (f"{start} 8".strip(), f"{start} 7 x".strip())}


def test_pairs_of_messages_are_read_as_ppo_will_score_them(loaded, tmp_path):
    """A reward model reads prompt, completion and EOS: the same tokens in its training and in PPO."""
    asked = [{"role": "user", "content": "2 4"}]
    row = {"prompt": asked, "chosen": [{"role": "assistant", "content": "6"}], "rejected": "5"}
    objective = reward_modelling(loaded, write_rows(tmp_path / "a.jsonl", [row, row]))
    prompt = render(loaded.tokenizer, asked, reply=True)
    scored = [encode_text(loaded.tokenizer, prompt + completion).tokens for completion in (" 6", " 5")]
    assert [example.tokens for example in objective.examples] == scored * 2


def test_the_pairwise_loss_is_blind_to_pads_and_batch_mates(loaded, data):
    objective = reward_modelling(loaded, data / "reward_train.jsonl")
    module = ScoringModel(loaded.model, new_value_head(loaded.model, std=None))
    tokens, lengths, _ = objective._arrays(objective._pairs[:5])
    pads = mx.arange(tokens.shape[1])[None] >= lengths[:, None]
    assert pads.sum().item() > 0
    noisy = mx.where(pads, mx.random.randint(0, 40, tokens.shape), tokens)
    assert mx.array_equal(module(tokens, lengths), module(noisy, lengths))
    alone = [module(*objective._arrays([pair])[:2])[0].item() for pair in objective._pairs[:5]]
    np.testing.assert_allclose(np.array(module(tokens, lengths))[:5], alone, atol=1e-5)


def test_flipping_the_preference_flips_the_gradient(loaded, data):
    objective = reward_modelling(loaded, data / "reward_train.jsonl")
    module = ScoringModel(loaded.model, new_value_head(loaded.model))
    loaded.model.freeze()
    pairs = objective._pairs[:4]
    # With a head of zeros all scores are equal, so the gradient is antisymmetric.
    _, plain = gradients(module, objective, *objective._arrays(pairs))
    _, flipped = gradients(module, objective, *objective._arrays([pair[::-1] for pair in pairs]))
    assert np.abs(plain["value_head.weight"]).max() > 1e-3
    np.testing.assert_allclose(flipped["value_head.weight"], -plain["value_head.weight"], atol=1e-5)


@pytest.mark.parametrize(
    ("more", "rate", "reached"),
    # The head alone has a random model's features to go by.
    [(["--lora-layers", -1], 2e-3, 0.9), (["--lora-layers", 0], 0.1, 0.75), (["--prompt-tuning"], 1e-2, 0.8)],
    ids=["lora", "head alone", "soft prompt"],
)
def test_a_reward_model_learns_what_can_be_learned(flags, loaded, monkeypatch, more, rate, reached):
    before = {name: np.array(array) for name, array in tree_flatten(loaded.model.parameters())}
    monkeypatch.setattr(sft, "load", lambda name: loaded)
    words = {"iters": 60, "batch-size": 8, "steps-per-eval": 30, "val-batches": -1, "learning-rate": rate}
    call(sft.main, *flags("--reward-model", "--train", *more, base="reward_", **words))
    accuracies = curve("run", "valid_accuracy")
    assert accuracies[-1] >= max(reached, accuracies[0] + 0.2)
    saved = read_adapter("run_adapter")
    assert saved.value_head is not None
    if "--lora-layers" in more and 0 in more:
        assert saved.config.fine_tune_type == "none" and saved.weights == {}
        after = dict(tree_flatten(loaded.model.parameters()))
        assert all(np.array(after[name]).tobytes() == array.tobytes() for name, array in before.items())


def test_a_reward_model_of_given_pairs_and_its_test(flags, tmp_path, capsys):
    for split in SPLITS:
        rows = [{"prompt": text, "chosen": " x", "rejected": " y"} for text in even_numbers(12, seed=1)]
        write_rows(tmp_path / "own" / f"{split}.jsonl", rows)
    words = {"data": "own", "base": "", "iters": 40, "learning-rate": 2e-3, "steps-per-eval": 40, "lora-layers": -1}
    call(sft.main, *flags("--reward-model", "--train", "--test", **words))
    assert curve("run", "valid_accuracy")[-1] == 1.0
    assert "test_accuracy: 1.0000" in capsys.readouterr().out


def test_a_reward_model_without_a_trained_head_is_not_tested(flags, capsys, tiny_folder, tmp_path):
    """A random head's accuracy is about a half, and says nothing."""
    words = flags("--reward-model", "--test", base="reward_")
    assert "has no value head, so there is no reward model to test" in fails(capsys, sft.main, *words)
    call(sft.main, *flags("--train", run="plain"))
    adapter = ["--resume-adapter-file", "plain_adapter"]
    assert "plain_adapter has no value head" in fails(capsys, sft.main, *words, *adapter)
    # A model that has a head of its own is tested with that.
    shutil.copytree(tiny_folder, tmp_path / "judge")
    head = new_value_head(load(str(tiny_folder)).model, std=None)
    save_value_head(tmp_path / "judge", head)
    call(sft.main, *flags("--reward-model", "--test", base="reward_", model=tmp_path / "judge"))
    assert "test_accuracy" in capsys.readouterr().out


def test_a_head_goes_on_from_where_it_was(flags):
    words = {"base": "reward_", "lora-layers": 0}
    call(sft.main, *flags("--reward-model", "--train", run="first", **words))
    call(sft.main, *flags("--reward-model", "--train", "--resume-adapter-file", "first_adapter", run="second", **words))
    assert curve("second", "valid_loss")[0] == curve("first", "valid_loss")[-1]


# --- a stop is never a loss ---

RESUMABLE: dict[str, list[Any]] = {
    "lora": KINDS["lora"],
    "soft prompt": KINDS["soft_prompt"],
    "reward model": ["--reward-model", "--data-base", "reward_", "--lora-dropout", 0.1],
}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_after(monkeypatch, updates):
    """Let the process die in the update after so many."""
    real, done = sft_loop.update, []

    def deadly(*args):
        done.append(args)
        if len(done) > updates:
            raise Killed
        return real(*args)

    monkeypatch.setattr(sft_loop, "update", deadly)


@pytest.mark.parametrize("kind", RESUMABLE)
@pytest.mark.parametrize("killed_after", [0, 2, 5, 8])  # checkpoints are at 0, 3, 6, 9
def test_a_killed_and_resumed_run_equals_one_never_stopped(flags, monkeypatch, kind, killed_after):
    words = {"iters": 9, "lr-schedule": "cosine", "warmup-steps": 2}
    call(sft.main, *flags("--train", *RESUMABLE[kind], run="whole", **words))
    with monkeypatch.context() as patch:
        kill_after(patch, killed_after)
        with pytest.raises(Killed):
            call(sft.main, *flags("--train", *RESUMABLE[kind], run="cut", **words))
    mx.random.seed(99)
    call(sft.main, "--resume", "cut")
    assert arrays_of("cut_adapter") == arrays_of("whole_adapter")
    assert rows_of("cut") == rows_of("whole")


@pytest.mark.parametrize("stopped_at", [1, 4, 5])
def test_a_stop_ends_the_step_saves_and_says_how_to_go_on(flags, monkeypatch, stopped_at, capsys):
    """Between reports too: what a report sums up so far is part of the checkpoint."""
    words = {"iters": 9, "steps-per-report": 4}
    call(sft.main, *flags("--train", run="whole", **words))
    real, updates = sft_loop.update, []

    def interrupted(*args):
        updates.append(args)
        if len(updates) == stopped_at:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(sft, "plot_run", plot_run)
    with monkeypatch.context() as patch:
        patch.setattr(sft_loop, "update", interrupted)
        said = f"{stopped_at} of 9 steps.* in cut_adapter, its curves in cut/curves.png; .*--resume cut"
        with pytest.raises(Stopped, match=said):
            call(sft.main, *flags("--train", run="cut", **words))
    assert Path("cut/curves.png").is_file() and not Path("cut/summary.json").exists()
    (made,) = read_adapter("cut_adapter").config.provenance
    assert made["figures"]["steps"] == stopped_at
    call(sft.main, "--resume", "cut")
    assert arrays_of("cut_adapter") == arrays_of("whole_adapter")
    assert rows_of("cut") == rows_of("whole")


def test_a_stop_leaves_the_adapter_that_the_run_started_from(flags, monkeypatch):
    call(sft.main, *flags("--train", run="first"))
    before = arrays_of("first_adapter")
    real = sft_loop.update

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(sft_loop, "update", interrupted)
    words = ("--resume-adapter-file", "first_adapter", "--save-file", "./first_adapter")
    with pytest.raises(Stopped, match=r"1 of \d steps are done; its curves are in"):
        call(sft.main, *flags("--train", run="second"), *words)
    assert arrays_of("first_adapter") == before


def test_skipped_updates_are_counted_across_a_stop(flags, monkeypatch):
    real = sft_loop.update

    def skipping(module, optimizer, loss, by_name, limit, planned):
        return real(module, optimizer, mx.array(float("nan")), by_name, limit, planned)

    with monkeypatch.context() as patch:
        patch.setattr(sft_loop, "update", skipping)
        kill_after(patch, 4)
        with pytest.raises(Killed):
            call(sft.main, *flags("--train", run="cut"))
    call(sft.main, "--resume", "cut")
    assert curve("cut", "skipped_updates") == [2, 3, 3]


@pytest.mark.parametrize("kind", ["lora", "soft prompt"])
def test_a_process_stopped_by_sigterm_goes_on_as_if_never_stopped(flags, kind):
    words = flags("--train", *RESUMABLE[kind], run="cut", iters=100, **{"steps-per-eval": 50, "save-every": 1000})
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sft.py"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and len(read_metrics("cut")) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "continue with: python sft.py --resume cut" in output and "Traceback" not in output
    done = max(row["step"] for row in read_metrics("cut"))
    assert 2 <= done < 100
    call(sft.main, "--resume", "cut")
    call(
        sft.main,
        *flags("--train", *RESUMABLE[kind], run="whole", iters=100, **{"steps-per-eval": 50, "save-every": 1000}),
    )
    assert arrays_of("cut_adapter") == arrays_of("whole_adapter")
    assert rows_of("cut") == rows_of("whole")


def test_a_resumed_run_is_extended_by_more_iterations(flags, capsys):
    words = {"lr-schedule": "constant", "steps-per-report": 3}
    call(sft.main, *flags("--train", run="whole", iters=9, **words))
    call(sft.main, *flags("--train", run="short", iters=6, **words))
    call(sft.main, "--resume", "short", "--iters", 9)
    assert "short is extended from 6 to 9 steps" in capsys.readouterr().out
    assert arrays_of("short_adapter") == arrays_of("whole_adapter")
    assert curve("short", "train_loss") == curve("whole", "train_loss")
    assert json.loads(Path("short/config.json").read_text(encoding="utf-8"))["iters"] == 9
    assert "--iters 8 is less than the 9 of short" in fails(capsys, sft.main, "--resume", "short", "--iters", 8)


def test_an_extended_run_s_rate_decays_to_0_at_its_new_end(flags):
    call(sft.main, *flags("--train", iters=4, **{"lr-schedule": "linear", "learning-rate": 1e-3}))
    assert curve("run", "learning_rate") == pytest.approx([0.75e-3, 0.25e-3])
    call(sft.main, "--resume", "run", "--iters", 8)
    assert curve("run", "learning_rate")[2:] == pytest.approx([3 / 8 * 1e-3, 1 / 8 * 1e-3])


def test_the_rate_that_a_model_s_size_chose_is_kept_by_a_resume(flags, monkeypatch, capsys):
    monkeypatch.setattr(optimizer_groups, "LARGE", 1000)
    call(sft.main, *flags("--train", iters=2))
    assert "by Adam, learning rate 0.0001 (chosen by the model's size; " in capsys.readouterr().out
    assert json.loads(Path("run/config.json").read_text(encoding="utf-8"))["learning_rate"] == 1e-4
    monkeypatch.setattr(optimizer_groups, "LARGE", 10**9)
    call(sft.main, "--resume", "run", "--iters", 4)
    assert "by Adam, learning rate 0.0001\n" in capsys.readouterr().out
    assert curve("run", "learning_rate") == pytest.approx([1e-4, 1e-4])


def test_a_skipped_update_does_not_delay_the_schedule(flags, monkeypatch):
    real, seen = sft_loop.update, []

    def spoiled(module, optimizer, loss, by_name, limit, planned):
        seen.append(planned)
        return real(module, optimizer, mx.array(float("nan")) if planned in (1, 2) else loss, by_name, limit, planned)

    monkeypatch.setattr(sft_loop, "update", spoiled)
    call(sft.main, *flags("--train", **{"lr-schedule": "linear", "learning-rate": 1e-3}))
    assert seen == list(range(6))
    assert curve("run", "learning_rate")[-1] == pytest.approx(1e-3 / 6)


def test_resuming_a_finished_run_changes_nothing(flags):
    call(sft.main, *flags("--train"))
    weights, rows = arrays_of("run_adapter"), rows_of("run")
    call(sft.main, "--resume", "run")
    assert arrays_of("run_adapter") == weights and rows_of("run") == rows


def validations(monkeypatch, losses):
    """Let the validations of a run say these losses, one after another; the last for all that follow."""
    real = sft_loop.evaluate
    told: list[float] = []

    def scripted(module, objective, num_batches=-1, split="valid"):
        figures = real(module, objective, num_batches, split)
        told.append(losses[min(len(told), len(losses) - 1)])
        return {**figures, f"{split}_loss": told[-1]}

    monkeypatch.setattr(sft_loop, "evaluate", scripted)


@pytest.mark.parametrize("kind", ["lora", "soft_prompt", "full", "reward model"])
def test_the_best_adapter_by_validation_is_saved(flags, monkeypatch, kind, capsys):
    """Validations are at 0, 2, 4 and 6; the lowest is at 4: the adapter of a run of 4 steps."""
    more = RESUMABLE.get(kind) or KINDS[kind]
    words = {"steps-per-eval": 2, "lr-schedule": "constant"}
    call(sft.main, *flags("--train", *more, run="four", iters=4, **words))
    validations(monkeypatch, [2.0, 1.5, 1.0, 1.2])
    call(sft.main, *flags("--train", *more, "--save-best", run="best", **words))
    assert arrays_of("best_adapter") == arrays_of("four_adapter")
    assert "the adapter saved is that of step 4" in capsys.readouterr().out
    summary = json.loads(Path("best/summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["best_step"], summary["best_valid_loss"]) == (6, 4, 1.0)
    assert [path.name for path in Path("best/best").iterdir()] == ["000004"]
    call(sft.main, *flags("--train", *more, run="last", **words))
    assert arrays_of("last_adapter") != arrays_of("best_adapter") and not Path("last/best").exists()


@pytest.mark.parametrize("killed_after", [3, 5])
def test_the_best_is_the_same_after_a_kill(flags, monkeypatch, killed_after):
    """Killed with a best that no checkpoint knows of as yet (checkpoints are at 0, 3, 6)."""
    words = {"steps-per-eval": 2, "lr-schedule": "constant"}
    call(sft.main, *flags("--train", "--save-best", run="whole", iters=8, **words))
    with monkeypatch.context() as patch:
        kill_after(patch, killed_after)
        with pytest.raises(Killed):
            call(sft.main, *flags("--train", "--save-best", run="cut", iters=8, **words))
    call(sft.main, "--resume", "cut")
    assert arrays_of("cut_adapter") == arrays_of("whole_adapter") and rows_of("cut") == rows_of("whole")


def test_a_run_ends_where_validation_gets_no_better(flags, monkeypatch, capsys):
    words = {"steps-per-eval": 2, "steps-per-report": 3, "iters": 20, "early-stopping": 2}
    validations(monkeypatch, [2.0, 1.5, 1.0, 1.2, 1.0])
    call(sft.main, *flags("--train", **words))
    assert [row["step"] for row in rows_of("run") if "valid_loss" in row] == [0, 2, 4, 6, 8]
    assert [row["step"] for row in rows_of("run") if "train_loss" in row] == [3, 6, 8]
    said = capsys.readouterr().out
    assert "stopped early: none of the last 2 validations was better than that of step 4" in said
    assert json.loads(Path("run/summary.json").read_text(encoding="utf-8"))["steps"] == 8
    # It is over: to resume it changes nothing.
    weights, rows = arrays_of("run_adapter"), rows_of("run")
    call(sft.main, "--resume", "run")
    assert arrays_of("run_adapter") == weights and rows_of("run") == rows


@pytest.mark.parametrize(
    ("valid", "said"),
    [([2.0, 1.0, 1.1, 1.3], 1), ([2.0, 1.0, 1.005, 0.9], 0), ([2.0, 1.9, 1.8, 1.7], 0)],
    ids=["rising", "noise", "falling"],
)
def test_a_line_says_when_validation_rises_while_training_falls(flags, monkeypatch, capsys, valid, said):
    validations(monkeypatch, valid)
    words = {"steps-per-eval": 10, "iters": 30, "batch-size": 10, "learning-rate": 3e-3, "lora-layers": -1}
    call(sft.main, *flags("--train", **words))
    losses = curve("run", "train_loss")
    assert np.mean(losses[10:]) < np.mean(losses[5:10]) < np.mean(losses[:5])
    out = capsys.readouterr().out
    assert out.count("validation loss rises") == said
    if said:
        assert "validation loss rises (1 at step 10, now 1." in out and "while training loss falls (" in out


def test_no_line_where_training_does_not_fall(flags, monkeypatch, capsys):
    validations(monkeypatch, [2.0, 1.0, 1.1, 1.3])
    call(sft.main, *flags("--train", **{"steps-per-eval": 5, "iters": 20, "batch-size": 20, "learning-rate": 1e-12}))
    assert "validation loss rises" not in capsys.readouterr().out


def test_epochs_are_passes_over_the_rows(flags, capsys, tmp_path):
    """20 rows in batches of 8 are three steps a pass."""
    words = {"batch-size": 8, "lr-schedule": "linear"}
    call(sft.main, *flags("--train", run="steps", iters=6, **words))
    epochs = [word for word in flags("--train", run="epochs", **words) if word != "--iters"]
    epochs.remove(6)
    call(sft.main, *epochs, "--epochs", 2)
    assert arrays_of("epochs_adapter") == arrays_of("steps_adapter") and rows_of("epochs") == rows_of("steps")
    assert json.loads(Path("epochs/config.json").read_text(encoding="utf-8"))["iters"] == 6
    # A resumed run goes by steps; a half pass is rounded up.
    call(sft.main, "--resume", "epochs", "--iters", 7)
    assert rows_of("epochs")[-1]["step"] == 7
    call(sft.main, *epochs, "--epochs", 0.5, "--output-dir", "half")
    assert rows_of("half")[-1]["step"] == 2
    assert "--iters 6 and --epochs 2 are both given" in fails(capsys, sft.main, *flags("--train", "--epochs", 2))
    # On the command line either wins over the other in a YAML file.
    (tmp_path / "epochs.yaml").write_text("epochs: 4")
    call(sft.main, "-c", "epochs.yaml", *flags("--train", run="by_iters", iters=2))
    assert rows_of("by_iters")[-1]["step"] == 2


# --- mistakes ---


def everything_below(folder):
    return {str(path.relative_to(folder)): path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def bad_files(tmp_path):
    """Files and folders that are wrong in one way each."""
    good = [{"text": "2 4"}]
    for name in ("valid", "test"):
        write_rows(tmp_path / f"bad/json_{name}.jsonl", good)
    (tmp_path / "bad/json_train.jsonl").write_text('{"text": "2"}\n{"text": \n', encoding="utf-8")
    contents = {
        "keys": [{"words": "2"}], "numbers": [{"text": 2}], "short": [{"prompt": "2 4 6", "completion": " 8"}],
        "ties": [{"text": "2", "reward": 1}, {"text": "4", "reward": "1.0"}],
        "reward": [{"text": "2", "reward": "high"}],
        "mixed": [{"text": "2", "reward": 1}, {"chosen": "2", "rejected": "4"}],
        "prompt": [{"prompt": None, "chosen": "2", "rejected": "4"}], "empty": [], "only_train": good,
    }  # fmt: skip
    for name, rows in contents.items():
        write_rows(tmp_path / f"bad/{name}_train.jsonl", rows)
        if name != "only_train":
            write_rows(tmp_path / f"bad/{name}_valid.jsonl", rows)
    write_rows(tmp_path / "foreign/notes.txt", ["mine"])
    write_rows(tmp_path / "used/config.json", [{}])
    (tmp_path / "a_file").touch()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--train"),
        (["--train", "--data", "nowhere"], "nowhere"),
        (["--train", "--data-base", "other_"], "'reward_'"),
        (["--train", "--data", "bad", "--data-base", "json_"], "json_train.jsonl:2"),
        (["--train", "--data", "bad", "--data-base", "keys_"], "keys_train.jsonl:1"),
        (["--train", "--data", "bad", "--data-base", "numbers_"], "int"),
        (["--train", "--data", "bad", "--data-base", "empty_"], "no rows"),
        (["--train", "--data", "bad", "--data-base", "only_train_"], "only_train_valid.jsonl"),
        (["--train", "--test", "--data", "bad", "--data-base", "short_"], "short_test.jsonl"),
        (["--train", "--data", "bad", "--data-base", "short_", "--max-length", 3], "--max-length 3"),
        (["--train", "--reward-model", "--data", "bad", "--data-base", "ties_"], "2 rewards are equal"),
        (["--train", "--reward-model", "--data", "bad", "--data-base", "reward_"], "'high'"),
        (["--train", "--reward-model", "--data", "bad", "--data-base", "mixed_"], "mixes"),
        (["--train", "--reward-model", "--data", "bad", "--data-base", "prompt_"], "NoneType"),
        (["--train", "--save-file", "foreign"], "foreign"),
        (["--train", "--save-file", "a_file"], "a_file"),
        (["--train", "--output-dir", "used"], "--resume used"),
        (["--train", "--model", "./missing"], "./missing"),
        (["--train", "--resume-adapter-file", "missing"], "missing"),
        (["--train", "--lora-keys", "self_attn.nothing"], "self_attn.nothing"),
        (["--train", "--lora-layers", 0], "--lora-layers is 0"),
        (["--train", "--lora-rank", 0], "rank"),
        (["--train", "--iters", 0], "--iters is 0"),
        (["--train", "--batch-size", 0], "--batch-size is 0"),
        (["--train", "--early-stopping", -1], "--early-stopping is -1"),
        (["--train", "--val-batches", 0], "--val-batches is 0"),
        (["--train", "--learning-rate", "nan"], "--learning-rate is nan"),
        (["--train", "--optimizer", "muon"], "--optimizer muon has no default rate"),
        (["--train", "--iters", "many"], "--iters"),
        (["--resume", "foreign"], "foreign"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(flags, bad_files, tmp_path, capsys, words, named):
    before = everything_below(tmp_path)
    assert named in fails(capsys, sft.main, *flags(*words))
    assert everything_below(tmp_path) == before


def test_an_adapter_of_another_model_lists_every_tensor(flags, loaded):
    call(sft.main, *flags("--train", "--lora-rank", 3))
    saved = read_adapter("run_adapter")
    attach_adapter(loaded.model, AdapterConfig(lora_parameters={"rank": 5, "scale": 1.0, "dropout": 0.0}))
    with pytest.raises(UserError) as caught:
        set_adapter_weights(loaded.model, saved.weights, "run_adapter")
    assert all(name in str(caught.value) for name in saved.weights)


def test_a_soft_prompt_stands_before_every_training_text(loaded, data):
    attach_adapter(loaded.model, AdapterConfig("soft_prompt", num_prompt_tokens=3))
    prefix = soft_prompt_ids(loaded.model)
    objective = language_modelling(loaded, data / "sft_train.jsonl", prefix=prefix)
    tokens, positions, mask = (np.array(array) for array in objective.batch(0))
    assert (tokens[:, :3] == prefix).all()
    # Neither the soft prompt nor BOS is a target: position p predicts token p + 1.
    assert (positions[mask > 0] % (tokens.shape[1] - 1) >= 3).all()
    assert (tokens[:, 3] == loaded.tokenizer.bos_token_id).all()
