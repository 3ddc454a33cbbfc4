"""Rows end to end, and batches in pieces: the losses, gradients and weights of the plain batch."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import sft
from common.errors import UserError
from models.adapters import AdapterConfig, attach_adapter
from models.cpu import attention as cpu_attention
from models.loading import load
from models.packing import Layout, check_packing, packed
from models.soft_prompt import soft_prompt_ids
from models.value_head import ScoringModel, forward, new_value_head
from tests.architectures import ARCHITECTURES, VOCABULARY, build
from tests.scripts import call, fails
from tests.test_dpo import pairs, write_rows
from training import optimizer, sft_loop
from training.metrics import read_metrics
from training.objectives import LanguageModelling, PackedLanguageModelling, RewardModelling, stacked
from training.preference_tuning import PreferenceTuning, Reference
from training.settings import SFTSettings

# Recurrent layers carry a state from row to row, learned positions do not begin anew, and gemma2 has its own attention.
NOT_PACKED = {
    "gemma2", "gpt2", "gpt_bigcode", "jamba", "mamba", "mamba2", "falcon_h1", "granitemoehybrid", "lfm2", "plamo2",
    "qwen3_5", "qwen3_next",
}  # fmt: skip
LENGTHS = [21, 3, 1, 30, 9]  # beyond gemma3's window of 16


class Tokenizer:
    pad_token_id = 0


def examples_of(lengths, vocabulary=VOCABULARY, prefix=(), seed=0):
    from data.batching import Example

    rng = random.Random(seed)
    texts = [[*prefix, *(rng.randrange(1, vocabulary) for _ in range(length))] for length in lengths]
    return [Example(text, max(len(prefix) + len(text) // 3, 1), ((4, 6),) if len(text) > 8 else ()) for text in texts]


def objectives_of(examples, **settings):
    """The plain and the packed objective over the same examples."""
    found = []
    for kind in (LanguageModelling, PackedLanguageModelling):
        objective = kind(Tokenizer(), [], len(examples), 2048, 0, **settings)
        objective.examples = examples
        found.append(objective)
    return found


def of_batch(model, objective, count):
    """Loss, figures and gradients of a batch of all rows."""
    arrays = objective._arrays(np.arange(count))
    (loss, figures), gradients = nn.value_and_grad(model, objective.loss)(model, *arrays)
    return loss.item(), stacked(figures).tolist(), dict(tree_flatten(gradients))


def close(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    largest = max(np.abs(np.array(array)).max() for array in expected.values())
    for name, array in expected.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(array), rtol=0, atol=tolerance * max(largest, 1))


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - NOT_PACKED))
def test_loss_and_gradients_of_every_family_are_those_of_padded_rows(name):
    """Of all weights: embeddings of pads, too, which get none."""
    model = build(name)
    model.train()
    check_packing(model)
    objectives = objectives_of(examples_of(LENGTHS))
    plain, found = (of_batch(model, objective, len(LENGTHS)) for objective in objectives)
    assert found[0] == pytest.approx(plain[0], abs=2e-5)
    assert found[1] == pytest.approx(plain[1], abs=2e-3)
    close(found[2], plain[2])
    tokens = objectives[1]._arrays(np.arange(len(LENGTHS)))[0]
    assert tokens.size < objectives[0]._arrays(np.arange(len(LENGTHS)))[0].size


@pytest.mark.parametrize("name", sorted(NOT_PACKED))
def test_a_family_that_cannot_be_packed_is_refused_by_name(name):
    with pytest.raises(UserError, match=r"--pack does not serve mlx_lm\.models\.\w+: a row would see"):
        check_packing(build(name))


def test_what_it_stands_in_for_is_put_back():
    model = build("llama-tied")
    rope, tokens = model.model.layers[0].self_attn.rope, mx.array([[1, 2, 3, 4, 5, 6, 7, 8]])
    expected = forward(model, tokens)[1]
    with packed(model, Layout.of([3, 5], 8)):
        assert model.model.layers[0].self_attn.rope is not rope
        assert not mx.allclose(forward(model, tokens)[1], expected)
    assert model.model.layers[0].self_attn.rope is rope
    assert mx.array_equal(forward(model, tokens)[1], expected)


def test_the_layout_by_hand():
    (layout,) = Layout.of([2, 3], width=6, multiple=1).levels
    assert layout.own.tolist() == [[0, 1, 0], [2, 3, 4]]
    assert layout.slots.tolist() == [0, 1, 3, 4, 5, 0]
    values = mx.arange(1, 7, dtype=mx.float32).reshape(1, 1, 6, 1)
    rows = layout.side_by_side(values)
    assert rows[:, 0, :, 0].tolist() == [[1, 2, 1], [3, 4, 5]]
    assert layout.end_to_end(rows)[0, 0, :, 0].tolist() == [1, 2, 3, 4, 5, 1]
    weights = mx.arange(6, dtype=mx.float32).reshape(1, 1, 6, 1) + 1
    gradient = mx.grad(lambda x: (layout.end_to_end(layout.side_by_side(x) ** 2) * weights).sum())(values)
    assert gradient[0, 0, :, 0].tolist() == [2, 8, 18, 32, 50, 0]  # what is past the last row gets none


@pytest.fixture
def loaded(tiny_folder):
    return load(str(tiny_folder))


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "soft_prompt"])
def test_adapters_are_trained_alike(loaded, kind):
    attach_adapter(loaded.model, AdapterConfig(kind, -1, num_prompt_tokens=3))
    loaded.model.train()
    examples = examples_of(LENGTHS, 60, soft_prompt_ids(loaded.model))
    plain, found = (of_batch(loaded.model, objective, len(LENGTHS)) for objective in objectives_of(examples))
    assert found[0] == pytest.approx(plain[0], abs=1e-5)
    close(found[2], plain[2])


def test_mlx_s_own_attention_is_packed_as_well(monkeypatch):
    """As on a Mac, where nothing of mlx-lm's is replaced."""
    from mlx_lm.models import llama

    monkeypatch.setattr(llama, "scaled_dot_product_attention", cpu_attention._original)
    model = build("llama-untied")
    objectives = objectives_of(examples_of(LENGTHS))
    plain, found = (of_batch(model, objective, len(LENGTHS)) for objective in objectives)
    assert found[0] == pytest.approx(plain[0], abs=2e-5)
    close(found[2], plain[2])


# --- a batch in pieces ---


def whole_and_pieces(module, objective, count):
    """(loss, figures, gradients) of the batch of step 0, whole and in `count` pieces."""
    gradients_of = optimizer.loss_and_gradients(module, objective.loss)
    settings = [SFTSettings(gradient_accumulation_steps=number) for number in (1, count)]
    for each in settings:
        loss, figures, gradients = sft_loop.accumulated(module, gradients_of, objective, 0, each)
        yield loss.item(), figures.tolist(), dict(tree_flatten(gradients))


@pytest.mark.parametrize("count", [2, 3, 5, 9])
@pytest.mark.parametrize("task", ["sft", "packed", "sigmoid", "ipo", "orpo", "reward model"])
def test_pieces_add_up_to_the_batch_by_tokens(loaded, tmp_path, task, count):
    """Rows of unlike numbers of tokens, so that a mean of the pieces' means would be another."""
    attach_adapter(loaded.model, AdapterConfig("full"))
    loaded.model.train()
    path, module = write_rows(tmp_path / "a.jsonl", pairs(5, seed=1)), loaded.model
    objective: Any
    if task in ("sft", "packed"):
        rows = [{"prompt": "2", "completion": " 4" * (n + 1)} for n in range(5)]
        kind = PackedLanguageModelling if task == "packed" else LanguageModelling
        objective = kind(loaded.tokenizer, [], 5, 2048, 0)
        objective.read(write_rows(tmp_path / "b.jsonl", rows))
    elif task == "reward model":
        module = ScoringModel(loaded.model, new_value_head(loaded.model, std=None))
        objective = RewardModelling(loaded.tokenizer, [], 5, 2048, 0, 0.1)
        objective.read(path)
    else:
        objective = PreferenceTuning(loaded.tokenizer, [], 5, 2048, 0, loss=task)
        objective.read(path)
        objective.refer_to(Reference(loaded.model, True))
        # Of the same policy the two texts of a pair are tied, or by rounding not.
        objective.reference += np.random.default_rng(0).normal(size=len(objective.reference)).astype(np.float32)
    plain, found = whole_and_pieces(module, objective, count)
    assert found[0] == pytest.approx(plain[0], abs=1e-4)
    assert found[1] == pytest.approx(plain[1], rel=1e-4, abs=1e-4)
    close(found[2], plain[2])


@pytest.fixture
def flags(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "plot_run", lambda folder: None)
    rng = random.Random(0)
    for split in ("train", "valid"):
        texts = [" ".join(str(2 * rng.randrange(50)) for _ in range(rng.randrange(1, 9))) for _ in range(22)]
        write_rows(tmp_path / f"text_{split}.jsonl", [{"text": text} for text in texts])
        write_rows(tmp_path / f"scored_{split}.jsonl", [{"text": t, "reward": i} for i, t in enumerate(texts)])

    def build_words(*more, run="run", **named):
        settings = {
            "model": tiny_folder, "data": tmp_path, "data-base": "text_", "iters": 8, "batch-size": 8,
            "steps-per-report": 2, "steps-per-eval": 4, "save-file": f"{run}_adapter", "output-dir": run, **named,
        }  # fmt: skip
        return ["--train", *(word for name, value in settings.items() for word in (f"--{name}", value)), *more]

    return build_words


def curve(run, name):
    return [row[name] for row in read_metrics(run) if name in row]


@pytest.mark.parametrize(
    "words", [["--pack"], ["--gradient-accumulation-steps", 3], ["--pack", "--gradient-accumulation-steps", 2]]
)
def test_a_run_packed_or_in_pieces_is_the_plain_run(flags, words):
    """The last batch of an epoch is a smaller one."""
    call(sft.main, *flags(run="plain"))
    call(sft.main, *flags(*words, run="other"))
    for name in ("train_loss", "train_accuracy", "valid_loss", "grad_norm"):
        assert curve("other", name) == pytest.approx(curve("plain", name), rel=2e-3)


def test_a_packed_run_is_resumed_to_the_bit_and_compiles(flags, monkeypatch):
    words = ["--pack", "--gradient-accumulation-steps", 2]
    call(sft.main, *flags(*words, run="whole"))
    real, done = sft_loop.update, []

    def deadly(*args):
        done.append(args)
        if len(done) > 5:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft_loop, "update", deadly)
        with pytest.raises(KeyboardInterrupt):
            call(sft.main, *flags(*words, run="cut", **{"save-every": 4}))
    call(sft.main, "--resume", "cut")
    assert curve("cut", "train_loss") == curve("whole", "train_loss")
    monkeypatch.setattr(optimizer, "compiling_pays", lambda: True)
    call(sft.main, *flags(*words, run="compiled"))
    assert curve("compiled", "valid_loss") == pytest.approx(curve("whole", "valid_loss"), abs=1e-4)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gradient-accumulation-steps", 9], "--gradient-accumulation-steps 9 is more than --batch-size 8"),
        (["--gradient-accumulation-steps", 0], "--gradient-accumulation-steps is 0"),
        (
            ["--gradient-accumulation-steps", 2, "--reward-model", "--data-base", "scored_"],
            "does not serve rows with rewards",
        ),
        (["--pack", "--reward-model", "--data-base", "scored_"], "--pack does not work with --reward-model"),
        (["--pack", "--grad-checkpoint"], "--pack does not work with --grad-checkpoint"),
        (["--pack", "--dpo"], "--pack is for SFT"),
    ],
)
def test_a_mistake_is_one_line(flags, capsys, words, named):
    assert named in fails(capsys, sft.main, *flags(*words))
    assert not Path("run").exists()
