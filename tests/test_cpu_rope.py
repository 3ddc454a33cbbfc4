"""The rotary embedding for Linux CPU: mlx's own, to the bit, and its gradient."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from models.cpu import rope

OFFSETS = {"none": 0, "an int": 5, "an array": mx.array(7), "one a row": mx.array([3, 130])}


def both(layer, x, offset, weights):
    """Values and gradients of a weighted sum, by mlx and by us."""
    for call in (rope._original, rope.rope):

        def weighted(x, call=call):
            out = call(layer, x, offset)
            return (out * weights).sum(), out

        (_, out), gradient = mx.value_and_grad(weighted)(x)
        yield np.array(out), np.array(gradient)


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("layer", [nn.RoPE(8), nn.RoPE(64, base=500_000.0, scale=0.5)], ids=["plain", "scaled"])
def test_values_and_gradients_are_mlx_s_to_the_bit(name, layer):
    x, weights = mx.random.normal((2, 2, 3, 19, layer.dims), key=mx.random.key(1))
    (out, gradient), (ours, our_gradient) = both(layer, x, OFFSETS[name], weights)
    np.testing.assert_array_equal(ours, out)
    np.testing.assert_array_equal(our_gradient, gradient)
    assert np.abs(out - np.array(x)).max() > 0.1


def test_an_offset_that_changes_in_place_is_seen():
    layer, x, offset = nn.RoPE(8), mx.ones((1, 1, 2, 8)), mx.array([3])
    rope.rope(layer, x, offset)
    offset += 1
    np.testing.assert_array_equal(rope.rope(layer, x, offset), rope._original(layer, x, 4))


def test_the_same_places_share_a_table_and_others_do_not():
    layer = nn.RoPE(8)
    assert rope._rotation(layer, 4, 1) is rope._rotation(nn.RoPE(8), 4, 1)
    for other in (rope._rotation(layer, 4, 2), rope._rotation(layer, 5, 2), rope._rotation(nn.RoPE(8, base=3), 5, 2)):
        assert rope._rotation(layer, 4, 1) is not other


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.RoPE(8, traditional=True), mx.ones((1, 2, 3, 8))),
        (nn.RoPE(4), mx.ones((1, 2, 3, 8))),
        (nn.RoPE(8), mx.ones((1, 2, 3, 8), mx.float16)),
    ],
    ids=["pairs of neighbours", "a part of a head", "half precision"],
)
def test_the_rest_is_left_to_mlx(layer, x, monkeypatch):
    monkeypatch.setattr(rope, "_original", lambda *call: call)
    assert rope.rope(layer, x, 2) == (layer, x, 2)
