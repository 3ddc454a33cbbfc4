"""Bases in 4 and 8 bits (QLoRA) and in bfloat16, through SFT, reward model, PPO and fusing.

What is trained stays float32, and so does what is made of the logits.
"""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fuse
import ppo_training
import sft
from common.errors import UserError
from models.adapters import (
    AdapterConfig,
    adapter_weights,
    attach_adapter,
    fuse_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)
from models.loading import load
from models.token_stats import token_stats
from models.value_head import Policy, ScoringModel, forward, new_value_head
from rewards.reward_model import load_reward_model
from tests.architectures import build
from tests.scripts import call
from tests.test_ppo_training import Setting
from training.losses import sft_loss
from training.metrics import read_metrics
from training.optimizer import loss_and_gradients, make_optimizer, optimizer_arrays, update

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17, 18]])
FAMILIES = ("llama-tied", "mixtral", "qwen3_moe", "qwen3_next", "gemma2", "phi", "gpt2")
KINDS = ("lora", "dora", "soft_prompt")
FLOAT32 = {mx.float32}


def adapted(name, kind="lora", bits=0, dtype=mx.float32):
    """A model of few bits, or of a dtype, with an adapter whose weights are as if trained."""
    model = build(name)
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    attach_adapter(model, AdapterConfig(kind, -1, {"rank": 2, "scale": 2.0, "dropout": 0.0}, num_prompt_tokens=3))
    mx.random.seed(7)
    moved = [(key, w + 0.1 * mx.random.normal(w.shape)) for key, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    return model


def dtypes(tree):
    return {array.dtype for _, array in tree_flatten(tree)}


def whole_weight(layer):
    if "scales" not in layer:
        return layer.weight
    return mx.dequantize(
        layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits, mode=layer.mode
    )


# fusing


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fused_weight_is_within_one_step_of_its_own_grid(name, bits, kind):
    """The tolerance of a base of few bits: one scale of the weight's group.

    A group's weights are rounded to 2^bits values that are one scale apart. Half a scale would do, but mlx moves the
    grid so that 0 lies on it, which costs up to another half at its ends.
    """
    if kind == "dora" and name in ("mixtral", "qwen3_moe", "qwen3_next"):
        return  # refused: tests/test_families.py
    model = adapted(name, kind, bits)
    expected = model(TOKENS)
    exact = {key: layer.fuse(dequantize=True).weight for key, layer in model.named_modules() if hasattr(layer, "fuse")}
    fuse_adapter(model)
    layers = dict(model.named_modules())
    assert exact and all("scales" in layers[key] for key in exact)
    for key, weight in exact.items():
        step = mx.repeat(mx.abs(layers[key].scales), layers[key].group_size, axis=-1)
        assert mx.all(mx.abs(whole_weight(layers[key]) - weight) <= 1.001 * step).item(), key
    # In full precision nothing is rounded, so the logits are the adapter's own.
    model = adapted(name, kind, bits)
    fuse_adapter(model, de_quantize=True)
    np.testing.assert_allclose(model(TOKENS), expected, atol=2e-5 * mx.abs(expected).max().item(), rtol=0)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fusing_keeps_the_precision_of_the_base(kind, bits):
    """mlx-lm's DoRA gives back float32, twice the size of a bfloat16 base."""
    plain = build("llama-untied")
    plain.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(plain, group_size=32, bits=bits)
    model = adapted("llama-untied", kind, bits, mx.bfloat16)
    fuse_adapter(model)
    expected = {key: array.dtype for key, array in tree_flatten(plain.parameters())}
    assert {key: array.dtype for key, array in tree_flatten(model.parameters())} == expected
    assert model(TOKENS).dtype == mx.bfloat16


@pytest.mark.parametrize("bits", [3, 6])
def test_dora_of_odd_bits_is_refused_and_lora_works(bits):
    with pytest.raises(UserError, match=f"DoRA on bases of 4 or 8 bits, not of {bits}"):
        adapted("llama-tied", "dora", bits)
    assert adapted("llama-tied", "lora", bits)(TOKENS).shape == (2, 8, 50)


# training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "dtype"), [(4, mx.bfloat16), (8, mx.float32), (0, mx.bfloat16), (0, mx.float16)])
def test_what_is_trained_is_float32_whatever_the_base(kind, bits, dtype):
    """An update far below the precision of a bfloat16 (0.4 % of a weight) still moves every weight, by Adam's step."""
    model = adapted("llama-tied", kind, bits, dtype)
    frozen = {key: np.array(array.astype(mx.float32)) for key, array in tree_flatten(model.parameters())}
    policy = Policy(model, new_value_head(model, std=None))
    positions, targets = mx.broadcast_to(mx.arange(7), (2, 7)), TOKENS[:, 1:]
    mx.eval(targets)  # what is not would be traced back to the tokens, which are no argument there
    optimizer = make_optimizer(1e-6, 10)

    def loss(policy, tokens):
        prefix = mx.array([[50, 51, 52]] * 2) if kind == "soft_prompt" else mx.zeros((2, 0), mx.int32)
        hidden, values = policy(mx.concatenate([prefix, tokens], axis=1), positions + prefix.shape[1])
        assert hidden.dtype == dtype and values.dtype == mx.float32
        logprobs = token_stats(policy.model, hidden, targets, training=True).logprobs
        value, _ = sft_loss(logprobs, mx.ones((2, 7)))
        assert value.dtype == mx.float32  # the log-softmax is taken in float32
        return value + ((values - 1.0) ** 2).mean()

    before = {key: np.array(array) for key, array in tree_flatten(policy.trainable_parameters())}
    value, gradients = loss_and_gradients(policy, loss)(TOKENS)
    assert dtypes(policy.trainable_parameters()) == dtypes(gradients) == FLOAT32
    update(policy, optimizer, value, gradients, 1.0)
    after = policy.trainable_parameters()
    assert dtypes(after) == FLOAT32
    moments = [array for key, array in optimizer_arrays(optimizer).items() if key.endswith((".m", ".v"))]
    assert {array.dtype for array in moments} == FLOAT32 and len(moments) >= 2 * len(before)
    for key, array in tree_flatten(after):
        moved = np.abs(np.array(array) - before[key])
        assert np.median(moved) == pytest.approx(1e-6, rel=0.3), key
    for key, array in tree_flatten(model.parameters()):
        if "lora_" not in key and not key.endswith((".m", "soft_prompt")):
            assert np.array_equal(np.array(array.astype(mx.float32)), frozen[key]), key


def test_all_weights_of_a_bfloat16_base_are_trained_in_float32(tiny_folder, bases, tmp_path):
    """In bfloat16 most updates would be rounded away. Fused, they are again as precise as the base."""
    model = build("llama-tied")
    model.set_dtype(mx.bfloat16)
    attach_adapter(model, AdapterConfig("full"))
    assert dtypes(model.trainable_parameters()) == FLOAT32 and model(TOKENS).dtype == mx.float32
    loaded = load(str(bases["bf16"]))
    attach_adapter(loaded.model, AdapterConfig("full"))
    save_adapter(tmp_path / "full", loaded.model, AdapterConfig("full"))
    words = ["--model", bases["bf16"], "--adapter-file", tmp_path / "full", "--save-path", tmp_path / "fused"]
    call(fuse.main, *words)
    assert dtypes(load(str(tmp_path / "fused")).model.parameters()) == {mx.bfloat16}


def test_scores_and_hidden_states_of_a_bfloat16_base():
    model = adapted("llama-tied", dtype=mx.bfloat16)
    assert forward(model, TOKENS)[1].dtype == mx.bfloat16
    assert ScoringModel(model, new_value_head(model, std=None))(TOKENS, mx.array([8, 3])).dtype == mx.float32


# the scripts


def saved_base(folder, target, bits, dtype):
    """The tiny model in few bits, or in another precision."""
    loaded = load(str(folder))
    loaded.model.set_dtype(dtype)
    model, config = loaded.model, loaded.config
    if bits:
        model, config = mlx_lm.utils.quantize_model(model, config, group_size=32, bits=bits)
    mlx_lm.utils.save(target, folder, model, loaded.tokenizer, config)
    return target


@pytest.fixture(scope="module")
def bases(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    kinds = {"4bit": (4, mx.float32), "8bit": (8, mx.bfloat16), "bf16": (0, mx.bfloat16)}
    return {name: saved_base(tiny_folder, root / name, *kind) for name, kind in kinds.items()}


def scores_of(reward_model):
    return load_reward_model(reward_model).reward(["2", "6", "2", "6"], [" 4 x", " 8 x", " 4", " 8"])


@pytest.mark.parametrize("name", ["4bit", "8bit", "bf16"])
def test_a_base_goes_through_every_script(bases, name, tmp_path, monkeypatch):
    """SFT, fuse; reward model, fuse; PPO on the fused policy with the fused reward model, fuse."""
    monkeypatch.chdir(tmp_path)
    for script in (sft, ppo_training):
        monkeypatch.setattr(script, "plot_run", lambda folder: None)
    for split in ("train", "valid"):
        texts = [f"{2 * n} {2 * n + 2}{' x' * (n % 2)}" for n in range(16)]
        rows = [json.dumps({"text": text, "reward": float(text.endswith("x"))}) for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    words = ["--train", "--data", ".", "--data-base", "", "--iters", 4, "--save-every", 4, "--steps-per-report", 1]
    call(sft.main, "--model", bases[name], *words, "--save-file", "sft", "--output-dir", "run-sft")
    call(fuse.main, "--model", bases[name], "--adapter-file", "sft", "--save-path", "policy")
    reward = ["--reward-model", "--learning-rate", 1e-2]
    call(sft.main, "--model", bases[name], *words, *reward, "--save-file", "rm", "--output-dir", "run-rm")
    call(fuse.main, "--model", bases[name], "--adapter-file", "rm", "--save-path", "reward")
    steps = ["--num-steps", 2, "--batch-size", 8, "--mini-batch-size", 4, "--max-completion-length", 6]
    steps += ["--model", "policy", "--reward-model", "reward", "--save-file", "ppo", "--output-dir", "run-ppo"]
    call(ppo_training.main, *steps)
    call(fuse.main, "--model", "policy", "--adapter-file", "ppo", "--save-path", "final", "--de-quantize")

    losses = [row["train_loss"] for row in read_metrics("run-sft") if "train_loss" in row]
    assert losses[-1] < losses[0]
    row = read_metrics("run-ppo")[0]
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["grad_norm"] > 0
    for adapter in ("sft", "rm", "ppo"):
        assert dtypes(read_adapter(adapter).weights) == FLOAT32
    is_quantized = {folder: "quantization" in load(folder).config for folder in ("policy", "reward", "final")}
    assert is_quantized == {"policy": name != "bf16", "reward": name != "bf16", "final": False}
    call(fuse.main, "--model", bases[name], "--adapter-file", "rm", "--save-path", "whole_reward", "--de-quantize")
    scores = {folder: scores_of(folder) for folder in ("rm", "whole_reward", "reward")}
    whole, rounded = {"4bit": (1e-4, 0.6), "8bit": (0.05, 0.1), "bf16": (0.05, 0.05)}[name]
    assert scores["whole_reward"] == pytest.approx(scores["rm"], abs=whole)
    assert scores["reward"] == pytest.approx(scores["rm"], abs=rounded)
    tuned = load("policy")
    load_adapter(tuned.model, "ppo")
    difference = load("final").model(TOKENS).astype(mx.float32) - tuned.model(TOKENS).astype(mx.float32)
    assert mx.abs(difference).mean().item() < (1e-4 if name == "4bit" else 0.07)  # of logits of about 3


@pytest.mark.parametrize("name", ["4bit", "8bit", "bf16"])
def test_the_logprobs_of_a_rollout_are_float32_and_the_first_ratio_is_1(bases, name):
    setting = Setting(bases[name])
    rollout = setting.roll_out()
    for field in ("old_logprobs", "ref_logprobs", "kl", "old_values", "scores"):
        assert getattr(rollout, field).dtype == mx.float32, field
    _, stats, gradients = setting.gradient(rollout)
    assert stats["ratio_mean"] == pytest.approx(1, abs=1e-5) and stats["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert all(gradient.dtype == np.float32 for gradient in gradients.values())
