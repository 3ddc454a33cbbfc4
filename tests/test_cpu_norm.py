"""RMSNorm for Linux CPU: mlx's own to the bit, and its gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from models.cpu import norm


def layer_of(eps=1e-5):
    layer = nn.RMSNorm(6, eps)
    layer.weight = mx.random.normal((6,), key=mx.random.key(3))
    return layer


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_values_are_mlx_s_to_the_bit_and_gradients_within_rounding(shape, eps):
    layer, (x, weights) = layer_of(eps), mx.random.normal((2, *shape), key=mx.random.key(1))
    found = []
    for call in (norm._original, norm.rms_norm):

        def weighted(x, weight, call=call):
            layer.weight = weight
            out = call(layer, x)
            return (out * weights).sum(), out

        (_, out), gradients = mx.value_and_grad(weighted, argnums=(0, 1))(x, layer_of().weight)
        found.append([np.array(array) for array in (out, *gradients)])
    np.testing.assert_array_equal(found[1][0], found[0][0])
    for got, expected in zip(found[1][1:], found[0][1:], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_row_by_hand():
    layer, x = nn.RMSNorm(2, 1e-12), mx.array([3.0, 4.0])  # of root mean square 5 / sqrt 2
    out, (by_x,) = mx.vjp(lambda x: norm.rms_norm(layer, x), [x], [mx.array([1.0, 0.0])])
    np.testing.assert_allclose(out[0], np.array([3.0, 4.0]) * 2**0.5 / 5, rtol=1e-6)
    np.testing.assert_allclose(by_x, np.array([16.0, -12.0]) * 2**0.5 / 125, rtol=1e-5)


def test_half_precision_is_left_to_mlx(monkeypatch):
    monkeypatch.setattr(norm, "_original", lambda *call: call)
    layer, x = layer_of(), mx.ones((2, 6), mx.float16)
    assert norm.rms_norm(layer, x) == (layer, x)
