"""Gradient checkpointing: the same loss and gradients with less memory, for the layers of one model only."""

import json
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import AutoModelForCausalLM

import ppo_training
import sft
from common.errors import UserError
from models.adapters import AdapterConfig, adapter_weights, attach_adapter
from models.generation import sample
from models.grad_checkpoint import checkpoint_layers
from models.loading import twin
from models.soft_prompt import soft_prompt_ids
from models.torch_grad_checkpoint import checkpoint_layers as checkpoint_torch_layers
from tests.architectures import ARCHITECTURES, build
from tests.scripts import call, fails
from training.metrics import read_metrics
from training.optimizer import loss_and_gradients

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17, 18]])


def adapted(name, kind, **settings):
    """A model with an adapter whose weights are as if trained."""
    model = build(name, **settings)
    attach_adapter(model, AdapterConfig(kind, -1, {"rank": 2, "scale": 2.0, "dropout": 0.0}, num_prompt_tokens=3))
    mx.random.seed(7)
    moved = [(key, w + 0.1 * mx.random.normal(w.shape)) for key, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    model.train()
    return model


def loss(model, tokens):
    prefix = mx.array([soft_prompt_ids(model)] * len(tokens), mx.int32)
    logits = model(mx.concatenate([prefix, tokens], axis=1))[:, -8:-1]
    return nn.losses.cross_entropy(logits, tokens[:, 1:]).mean()


def loss_and_arrays(model):
    value, gradients = loss_and_gradients(model, loss)(TOKENS)
    return value.item(), {name: np.array(gradient) for name, gradient in tree_flatten(gradients)}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(array, other[name]) for name, array in one.items())


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "lora") for name in ARCHITECTURES), *(("llama-tied", kind) for kind in ("dora", "full", "soft_prompt"))],
)
def test_loss_and_gradients_are_what_they_were(name, kind):
    value, gradients = loss_and_arrays(adapted(name, kind))
    model = adapted(name, kind)
    before = {key: np.array(array) for key, array in tree_flatten(model.parameters())}
    checkpoint_layers(model)
    again, checkpointed = loss_and_arrays(model)
    assert again == value and same(checkpointed, gradients)
    assert any(np.abs(gradient).max() > 0 for gradient in gradients.values())
    assert same({key: np.array(array) for key, array in tree_flatten(model.parameters())}, before)


def test_a_step_holds_less():
    """Of each layer's about 20 arrays of (2, 256, 64), one is kept."""

    def peak(checkpoint):
        model = adapted("llama-tied", "lora", num_hidden_layers=8, hidden_size=64, intermediate_size=256)
        tokens = mx.random.randint(0, 50, (2, 256), key=mx.random.key(0))
        if checkpoint:
            checkpoint_layers(model)
        step = nn.value_and_grad(model, lambda tokens: nn.losses.cross_entropy(model(tokens), tokens).mean())
        mx.eval(step(tokens))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(step(tokens))
        return mx.get_peak_memory() - before

    assert peak(True) < 0.5 * peak(False)


def test_other_models_and_sampling_are_left_as_they_are():
    model, other = adapted("llama-tied", "lora"), build("llama-tied")
    reference = twin(model)
    prompts = [[1, 2, 3], [4], [5, 6]]
    expected = sample(model, prompts, [], 8, temperature=0)
    layer_class = type(other.layers[0])
    checkpoint_layers(model)
    assert {type(layer) for layer in (*reference.layers, *other.layers)} == {layer_class}
    assert all(isinstance(layer, layer_class) and type(layer) is not layer_class for layer in model.layers)
    assert sample(model, prompts, [], 8, temperature=0) == expected


def test_what_cannot_be_repeated_is_refused():
    """Recomputation would draw other masks, and the gradient would not be that of the loss."""
    with pytest.raises(UserError, match="--lora-dropout 0"):
        checkpoint_layers(build("llama-tied"), dropout=0.1)
    with pytest.raises(UserError, match="no list of layers"):
        checkpoint_layers(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no list of layers"):
        checkpoint_layers(SimpleNamespace(layers=[lambda x: x]))


def test_the_same_in_torch(tiny_folder, monkeypatch):
    def gradients(checkpoint):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
        layer_calls = []
        if checkpoint:
            checkpoint_torch_layers(model)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: layer_calls.append(1))
        ids = torch.tensor(TOKENS.tolist())
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item(), {name: weight.grad.numpy() for name, weight in model.named_parameters()}, len(layer_calls)

    (value, plain, once), (again, checkpointed, twice) = gradients(False), gradients(True)
    assert value == again and same(plain, checkpointed) and (once, twice) == (1, 2)
    with pytest.raises(UserError, match="no layers to checkpoint"):
        checkpoint_torch_layers(torch.nn.Linear(2, 2))


def losses_of(run, name):
    return [row[name] for row in read_metrics(run) if name in row]


def test_both_scripts_take_the_flag(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "plot_run", lambda folder: None)
    monkeypatch.setattr(ppo_training, "plot_run", lambda folder: None)
    rows = "".join(json.dumps({"text": f"{n} {n + 2}"}) + "\n" for n in range(8))
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    words = ["--model", tiny_folder, "--train", "--data", ".", "--data-base", "", "--iters", 2, "--steps-per-report", 1]
    ppo_words = ["--model", tiny_folder, "--ground-truth-reward", "--num-steps", 1, "--batch-size", 8]
    ppo_words += ["--mini-batch-size", 4, "--max-completion-length", 4]
    for run, flag in (("plain", []), ("checkpointed", ["--grad-checkpoint"])):
        call(sft.main, *words, "--output-dir", f"sft-{run}", *flag)
        call(ppo_training.main, *ppo_words, "--output-dir", f"ppo-{run}", *flag)
    assert losses_of("sft-plain", "train_loss") == losses_of("sft-checkpointed", "train_loss")
    # Checkpointed rows have pads, plain ones lie end to end.
    assert losses_of("ppo-plain", "grad_norm") == pytest.approx(losses_of("ppo-checkpointed", "grad_norm"), rel=1e-5)
    line = fails(capsys, sft.main, *words, "--grad-checkpoint", "--lora-dropout", 0.1)
    assert line.startswith("--grad-checkpoint cannot repeat")
