"""The linear layer for Linux CPU: mlx's values, and a gradient that lies as the weight does."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from models.cpu import linear as fast_linear

SHAPES = [(7, 5), (3, 7, 5), (2, 3, 7, 5), (5,)]


def layer_of(dtype=mx.float32, bias=False):
    mx.random.seed(0)
    layer = nn.Linear(5, 6, bias=bias)
    layer.set_dtype(dtype)
    return layer


def value_and_gradients(call, layer, x):
    """The output, and the gradients for input and weight of a sum that weighs every output differently."""
    out = call(layer, x)
    scale = mx.arange(out.size, dtype=mx.float32).reshape(out.shape)

    def loss(x, weight):
        twin = nn.Linear(5, 6, bias="bias" in layer)
        twin.update({**layer.parameters(), "weight": weight})
        return (call(twin, x) * scale).sum()

    gradients = mx.grad(loss, argnums=(0, 1))(x, layer.weight)
    mx.eval(out, gradients)
    return out, *gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_mlx_s(shape, bias):
    """The same products give the same bits. The weight's gradient is the transpose of mlx's product, which some BLAS
    sum in another order; of a layer with a bias it is mlx's own.
    """
    layer, x = layer_of(bias=bias), mx.random.normal(shape)
    ours = value_and_gradients(fast_linear.linear, layer, x)
    theirs = value_and_gradients(fast_linear._original, layer, x)
    assert [array.shape for array in ours] == [array.shape for array in theirs]
    for got, expected in zip(ours[:2], theirs[:2], strict=True):
        np.testing.assert_array_equal(np.array(got), np.array(expected))
    rtol, atol = (0, 0) if bias else (1e-5, 1e-4)  # entries are up to 1,600
    np.testing.assert_allclose(np.array(ours[2]), np.array(theirs[2]), rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_weight_s_gradient_lies_by_rows_where_mlx_s_lies_by_columns(shape):
    layer, x = layer_of(), mx.random.normal(shape)
    lies = {
        call: memoryview(value_and_gradients(call, layer, x)[2]) for call in (fast_linear.linear, fast_linear._original)
    }
    assert lies[fast_linear.linear].c_contiguous
    assert not lies[fast_linear._original].c_contiguous


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_and_biases_are_left_to_mlx(dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(fast_linear, "_original", lambda *words: asked.append(words))
    fast_linear.linear(layer_of(dtype), mx.ones((2, 5), dtype))
    fast_linear.linear(layer_of(), mx.ones((2, 5), dtype))
    fast_linear.linear(layer_of(bias=True), mx.ones((2, 5)))
    assert len(asked) == 3
