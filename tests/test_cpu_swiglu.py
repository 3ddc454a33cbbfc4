"""SwiGLU for Linux CPU: mlx-lm's values and gradients, also at the limits of float32."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from models.cpu import swiglu

GATES = np.concatenate([np.linspace(-30, 30, 2001), [-1e4, -200, -104, -88, 0, 88, 104, 200, 1e4]])


def exact(gate, x):
    """silu(gate) * x and its two derivatives, in float64."""
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-gate))
    return gate * sigmoid * x, x * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid


def test_values_and_gradients_are_the_exact_ones():
    x = np.random.default_rng(0).normal(size=GATES.shape)
    gate = GATES.astype(np.float32).astype(np.float64)
    x = x.astype(np.float32).astype(np.float64)
    arrays = mx.array(gate, mx.float32), mx.array(x, mx.float32)
    value = swiglu.swiglu(*arrays)
    _, gradients = mx.value_and_grad(lambda g, x: swiglu.swiglu(g, x).sum(), argnums=(0, 1))(*arrays)
    for got, expected in zip((value, *gradients), exact(gate, x), strict=True):
        np.testing.assert_allclose(np.array(got), expected, rtol=1e-6, atol=1e-6)


def test_where_numbers_end_it_is_as_mlx_s():
    ends = mx.array([math.inf, -math.inf, math.nan, 3e38, -3e38])
    one = mx.ones(5)
    assert np.array_equal(swiglu.swiglu(ends, one), nn.silu(ends), equal_nan=True)
    # A finite gate has a finite gradient, however large it is.
    _, gradient = mx.value_and_grad(lambda g: swiglu.swiglu(g, mx.ones_like(g)).sum())(ends[3:])
    assert gradient.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_left_to_mlx_lm(dtype):
    gate, x = mx.random.normal((5,)).astype(dtype), mx.random.normal((5,)).astype(dtype)
    assert mx.array_equal(swiglu.swiglu(gate, x), (nn.silu(gate) * x)).item()
