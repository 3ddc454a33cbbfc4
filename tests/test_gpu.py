"""What a run asks of a GPU, on CPU as well by a simulated one; and, where there is one, whether it computes rightly.

`make test-gpu` runs the second part alone and prints what to put into a report.
"""

import functools
from pathlib import Path
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from data.batching import Example, collate
from models import gpu
from models.adapters import AdapterConfig
from models.generation import sample
from models.loading import load
from models.value_head import Policy
from tests.architectures import build
from tests.conftest import tiny_random_folder
from training.ppo_learner import build_policies, train_ppo
from training.settings import PPOSettings

ON_CPU, ON_GPU = mx.Device(mx.cpu), mx.Device(mx.gpu)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mx.is_available(ON_GPU), reason="mlx has no GPU here"),
]


def on_gpu(test):
    """A test that runs only where there is a GPU, with arrays on it by default."""

    @functools.wraps(test)
    def computed_there(*args, **kwargs):
        before = mx.default_device()
        mx.set_default_device(mx.gpu)
        try:
            return test(*args, **kwargs)
        finally:
            mx.set_default_device(before)

    for mark in needs_gpu:
        computed_there = mark(computed_there)
    return computed_there


# --- simulated ---


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the device, as names."""
    calls = Mock()
    monkeypatch.setattr(gpu, "maybe_set_recommended_wired_limit", calls.wire)
    monkeypatch.setattr(mx, "clear_cache", calls.clear)
    monkeypatch.setattr(mx, "set_memory_limit", calls.limit)
    return lambda: [name for name, _, _ in calls.mock_calls]


@pytest.mark.parametrize("simulating", [True, False])
def test_memory_is_wired_on_loading_and_given_back_after_sampling_on_a_gpu_only(
    simulating, tiny_folder, calls, monkeypatch
):
    monkeypatch.setenv("TUNER_SIMULATE_GPU", "1" if simulating else "0")
    there = simulating or mx.default_device() == ON_GPU
    model = load(str(tiny_folder)).model
    assert calls() == ["wire"] * there
    sample(model, [[1, 4, 5], [1, 6]], [], 3)
    assert calls() == ["wire", "clear"] * there


def test_where_metal_recommends_a_size_mlx_stays_within_a_share_of_it(calls, monkeypatch):
    monkeypatch.setenv("TUNER_SIMULATE_GPU", "1")
    limits: list[int] = []
    monkeypatch.setattr(mx, "set_memory_limit", limits.append)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 17_179_869_184})
    gpu.wire_memory()
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "of CUDA, which recommends none"})
    gpu.wire_memory()
    assert limits == [13_743_895_347]


def test_what_mlx_is_asked_for_is_there():
    """The names that the simulation replaces; on Linux CPU there is no recommended size, so no limit is set."""
    assert "max_recommended_working_set_size" not in mx.device_info() or gpu.on_gpu()
    before = mx.set_memory_limit(10**9)
    assert mx.set_memory_limit(before) == 10**9
    assert gpu.maybe_set_recommended_wired_limit() is None or gpu.on_gpu()
    mx.clear_cache()


class Attention(nn.Module):
    def __init__(self, heads: int, dims: int):
        super().__init__()
        self.n_heads, self.rope = heads, nn.RoPE(dims)


@pytest.mark.parametrize(
    ("cuda", "heads", "dims", "rows"),
    [
        (True, 4, 16, 127),  # a quarter of the heads goes to each row of threads: 128 of these fail on an H100
        (True, 32, 16, 15),
        (True, 9, 64, 128),
        (True, 4, 32, 128),
        (False, 4, 16, 128),
    ],
)
def test_small_heads_take_fewer_rows_at_once_on_cuda(cuda, heads, dims, rows, monkeypatch):
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    assert gpu.rows_at_once(nn.Sequential(Attention(heads, dims)), 128) == rows


def test_sampling_takes_no_more_rows_than_cuda_allows_and_draws_the_same(monkeypatch):
    model, prompts, keys = build("llama-tied"), [[1, 5], [2, 3]] * 80, np.arange(320, dtype=np.uint32).reshape(160, 2)
    expected = sample(model, prompts, [], 3, keys=keys)
    rows: list[int] = []
    forward = type(model).__call__

    def counting(self, tokens, **flags):
        rows.append(len(tokens))
        return forward(self, tokens, **flags)

    monkeypatch.setattr(type(model), "__call__", counting)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert sample(model, prompts, [], 3, keys=keys) == expected
    heads = model.args.num_attention_heads
    assert max(rows) <= 127 // -(-heads // 4) < 160


# --- on a GPU ---


def attention(queries, keys, values):
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1 / 8, mask="causal")


@on_gpu
def test_fused_and_unfused_attention_agree_in_bf16_at_head_size_64():
    q, k, v = mx.random.normal((3, 2, 4, 200, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    (with_gradient,), _ = mx.vjp(attention, [q, k, v], [mx.ones_like(q)])
    exact = attention(*(array.astype(mx.float32) for array in (q, k, v)))
    for got in (attention(q, k, v), with_gradient):
        assert mx.abs(got.astype(mx.float32) - exact).max().item() < 0.05


def losses_and_gradients(device):
    """PPO's ingredients of one small Llama on a device: a mean of logprobs, and its gradient by name."""
    with mx.stream(device):
        model = build("llama-tied")
        batch = collate([Example([1, 5, 9, 13, 2], 1), Example([1, 7, 3], 1)], 0)
        tokens = mx.array(batch.tokens)

        def loss(weights):
            model.update(weights)
            logits = model(tokens[:, :-1]).astype(mx.float32)
            chosen = mx.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
            return (mx.logsumexp(logits, axis=-1) - chosen).mean()

        value, gradients = mx.value_and_grad(loss)(model.parameters())
        return value.item(), {name: np.array(array) for name, array in tree_flatten(gradients)}


@on_gpu
def test_a_loss_and_its_gradients_are_the_cpu_s():
    """Within TF32's rounding, which is the default on CUDA and M5 (MLX_ENABLE_TF32=0 turns it off)."""
    loss, gradients = losses_and_gradients(mx.cpu)
    other, others = losses_and_gradients(mx.gpu)
    assert other == pytest.approx(loss, rel=5e-3)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(others[name], gradient, atol=1e-2 * np.abs(gradient).max() + 1e-6, err_msg=name)


@on_gpu
def test_sampling_draws_from_the_logits():
    """Greedy completions by the cache are those of full passes, and ragged prompts do not disturb each other."""
    model, prompts = build("llama-tied"), [[1], [2, 3, 4, 5, 6, 7], [8, 9]]
    together = sample(model, prompts, [], 8, temperature=0)
    for prompt, completion in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token in completion:
            logits = model(mx.array([ids]))[0, -1].astype(mx.float32)
            assert logits[token].item() >= logits.max().item() - 1e-2
            ids.append(token)


def length_of_each(prompts, completions):
    return [float(len(completion)) for completion in completions]


@on_gpu
def test_a_ppo_step_starts_at_a_ratio_of_1_and_moves_the_policy(tmp_path: Path):
    loaded = load(str(tiny_random_folder(tmp_path / "model")))
    settings = PPOSettings(num_steps=2, batch_size=8, mini_batch_size=8, ppo_epochs=1, max_completion_length=8)
    policy, reference = build_policies(loaded, settings, AdapterConfig())
    before = [np.array(array) for _, array in tree_flatten(policy.module.trainable_parameters())]
    first, second = train_ppo(policy, reference, loaded.tokenizer, ["8 20"] * 8, length_of_each, settings)
    after = [np.array(array) for _, array in tree_flatten(policy.module.trainable_parameters())]
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-3)
    assert first["skipped_updates"] == second["skipped_updates"] == 0
    assert any((old != new).any() for old, new in zip(before, after, strict=True))
    assert isinstance(policy.module, Policy)


@on_gpu
def test_released_memory_is_given_back():
    mx.eval(mx.zeros((2**22,)))
    assert mx.get_cache_memory() > 0
    gpu.wire_memory()
    gpu.release_memory()
    assert mx.get_cache_memory() == 0
