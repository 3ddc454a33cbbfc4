"""Rotary position embedding for mlx on Linux CPU with a third of the operations.

mlx's makes sines and cosines anew in every call, and its gradient goes through slices. Here queries and keys of all
layers share a table, and the gradient is the rotation back. Only float32 and whole heads, not in pairs of neighbours,
are replaced; everything else remains mlx's. The result equals mlx's to the bit.
"""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

_original = nn.RoPE.__call__
_newest: tuple[tuple, Callable[[mx.array], mx.array]] | None = None


def rope(layer: nn.RoPE, x: mx.array, offset: int | mx.array = 0) -> mx.array:
    """Rotate x (B, heads, L, D) by its places, which begin at `offset`: of all rows, or (B,) of each."""
    if layer.traditional or x.dtype != mx.float32 or layer.dims != x.shape[-1] or x.ndim != 4:
        return _original(layer, x, offset)
    return _rotation(layer, x.shape[2], offset)(x)


def _rotation(layer: nn.RoPE, length: int, offset: int | mx.array) -> Callable[[mx.array], mx.array]:
    """That of so many places; the newest is kept for the next call, which mostly asks for the same."""
    global _newest
    if isinstance(offset, mx.array):  # which a cache may change in place
        return _make(layer, length, offset)
    key = (length, layer.dims, layer.base, layer.scale, offset)
    if _newest is None or _newest[0] != key:
        _newest = key, _make(layer, length, offset)
    return _newest[1]


def _make(layer: nn.RoPE, length: int, offset: int | mx.array) -> Callable[[mx.array], mx.array]:
    half = layer.dims // 2
    if isinstance(offset, mx.array) and offset.ndim:
        offset = offset[:, None, None]
    places = (mx.arange(length, dtype=mx.float32) + offset) * mx.array(layer.scale)
    frequencies = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * mx.array(math.log(layer.base) / half))
    angles = places[..., None] * frequencies
    sines, cosines = mx.sin(angles), mx.cos(angles)
    cosines, sines = mx.concatenate([cosines, cosines], -1), mx.concatenate([-sines, sines], -1)

    @mx.custom_function
    def rotate(x: mx.array) -> mx.array:
        return x * cosines + _swapped(x) * sines

    @rotate.vjp
    def rotate_back(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return cotangent * cosines - _swapped(cotangent) * sines

    return rotate


def _swapped(x: mx.array) -> mx.array:
    """The second half of the last axis, then the first."""
    half = x.shape[-1] // 2
    return mx.concatenate([x[..., half:], x[..., :half]], axis=-1)


def install() -> None:
    """Replace mlx's rotary embedding."""
    nn.RoPE.__call__ = rope
