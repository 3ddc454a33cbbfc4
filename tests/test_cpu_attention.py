"""Attention for Linux CPU: exact values and gradients with every kind of mask, and what is left to mlx-lm."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch

from models.cpu import attention

BATCH, HEADS, KV_HEADS, LENGTH, PLACES, WIDTH = 2, 4, 2, 3, 5, 8
SCALE = WIDTH**-0.5
RNG = np.random.default_rng(0)
SEEN = RNG.random((BATCH, 1, LENGTH, PLACES)) < 0.6
SEEN[..., 0] = True
MASKS = {
    "none": None,
    "causal": "causal",
    "of one head": SEEN[0, 0],
    "of each text": SEEN,
    "of each head": np.repeat(SEEN, HEADS, axis=1) ^ (np.arange(HEADS)[:, None, None] == 3) & SEEN[::-1],
    "added": RNG.normal(size=(HEADS, LENGTH, PLACES)).astype(np.float32),
}
MASKS["of each head"][..., 0] = True


def inputs(dtype=mx.float32) -> tuple[mx.array, mx.array, mx.array]:
    shapes = (HEADS, LENGTH), (KV_HEADS, PLACES), (KV_HEADS, PLACES)
    drawn = [mx.array(RNG.normal(size=(BATCH, heads, places, WIDTH))).astype(dtype) for heads, places in shapes]
    return drawn[0], drawn[1], drawn[2]


def exact(queries, keys, values, mask, weights):
    """Attention and the gradients of its weighted sum, in float64 by torch."""
    leaves = [torch.tensor(np.array(x), dtype=torch.float64, requires_grad=True) for x in (queries, keys, values)]
    shared = HEADS // KV_HEADS
    scores = leaves[0] @ leaves[1].repeat_interleave(shared, 1).mT * SCALE
    if isinstance(mask, str):
        mask = np.tri(LENGTH, PLACES, PLACES - LENGTH, dtype=bool)
    if mask is not None and mask.dtype == bool:
        scores = scores.masked_fill(~torch.tensor(mask.copy()), -math.inf)
    elif mask is not None:
        scores = scores + torch.tensor(mask, dtype=torch.float64)
    out = scores.softmax(-1) @ leaves[2].repeat_interleave(shared, 1)
    (out * torch.tensor(weights)).sum().backward()
    return [x.detach().numpy() for x in (out, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients_are_the_exact_ones(name):
    mask, arrays = MASKS[name], inputs()
    weights = RNG.normal(size=(BATCH, HEADS, LENGTH, WIDTH))
    given = mx.array(mask) if isinstance(mask, np.ndarray) else mask

    def weighted(queries, keys, values):
        out = attention.attention(queries, keys, values, None, SCALE, given)
        return (out * mx.array(weights.astype(np.float32))).sum(), out

    (_, out), gradients = mx.value_and_grad(weighted, argnums=(0, 1, 2))(*arrays)
    for got, expected in zip((out, *gradients), exact(*arrays, mask, weights), strict=True):
        np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=3e-6)


def test_what_is_not_seen_has_no_weight_and_no_gradient_however_large():
    queries, keys, values = inputs()
    hidden = mx.array([0.0, 0.0, 0.0, 1e30, -1e30])[:, None]  # at the last two places
    mask = mx.array([True, True, True, False, False])[None]

    def total(queries, keys, values):
        return attention.attention(queries, keys, values, None, SCALE, mask).sum()

    expected = total(queries, keys, values)
    assert total(queries, keys, values + hidden).item() == expected.item()
    gradients = mx.grad(total, argnums=(1, 2))(queries, keys, values)
    assert all(mx.all(gradient[:, :, 3:] == 0).item() for gradient in gradients)


def test_a_row_that_sees_nothing_is_zero_and_has_a_zero_gradient():
    """Rows of left pads in a batch of unequal prompts, from which NaN would spread."""
    mask = mx.array([[False] * PLACES] + [[True] * PLACES] * (LENGTH - 1))

    def total(queries, keys, values):
        out = attention.attention(queries, keys, values, None, SCALE, mask)
        return out.sum(), out

    (_, out), gradients = mx.value_and_grad(total, argnums=(0, 1, 2))(*inputs())
    assert mx.all(out[:, :, 0] == 0).item() and mx.all(out[:, :, 1] != 0).item()
    assert all(mx.all(mx.isfinite(gradient)).item() for gradient in gradients)


def test_scores_of_any_size_stay_finite():
    queries, keys, values = inputs()
    out = attention.attention(queries * 1e4, keys, values, None, SCALE, None)
    ours, theirs = np.array(out), np.array(attention._original(queries * 1e4, keys, values, None, SCALE, None))
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-2)  # of differences of 1e5, a float32 keeps 1e-2


def test_half_precision_sinks_and_quantized_caches_are_left_to_mlx_lm(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "_original", lambda *words: asked.append(words))
    attention.attention(*inputs(mx.bfloat16), None, SCALE, None)
    attention.attention(*inputs(), None, SCALE, None, mx.zeros(HEADS))
    attention.attention(*inputs(), SimpleNamespace(bits=4), SCALE, None)
    assert len(asked) == 3
