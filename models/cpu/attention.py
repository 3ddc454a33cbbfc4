"""Attention for mlx-lm on Linux CPU in half the time.

On an x86 CPU mlx's exponential takes 12 ns per element, its power 4 ns, and attention needs one for every score.
Forward and backward over 128 texts of 80 tokens (8 heads of 8) took 155 to 180 ms and now take 76 to 79. Only float32
with plain key-value caches is replaced; everything else remains mlx-lm's.
"""

import functools
import math

import mlx.core as mx
from mlx_lm.models import base

from models.cpu.replace import replace_in_mlx_lm

_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # below every score, above masked ones
_original = base.scaled_dot_product_attention


@mx.custom_function
def _softmax(exponents: mx.array) -> mx.array:
    """2^x, normalised over the last axis; exactly 0 at −inf. Not every exponent of a row is −inf."""
    powers = mx.power(mx.array(2.0), exponents - exponents.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@mx.custom_function
def _softmax_or_zero(exponents: mx.array) -> mx.array:
    """`_softmax` that is all 0 in a row of only −inf."""
    powers = mx.power(mx.array(2.0), exponents - mx.maximum(exponents.max(axis=-1, keepdims=True), _LOWEST))
    return powers / mx.maximum(powers.sum(axis=-1, keepdims=True), 1e-30)


def _softmax_vjp(primals, cotangent, output):
    """Explicit, because the gradient of power is NaN at −inf."""
    mean = (cotangent * output).sum(axis=-1, keepdims=True)
    return (1 / _LOG2_E) * output * (cotangent - mean)


_softmax.vjp(_softmax_vjp)
_softmax_or_zero.vjp(_softmax_vjp)


def attention(queries, keys, values, cache, scale: float, mask=None, sinks=None) -> mx.array:
    """softmax(queries · keysᵀ · scale + mask) · values; accurate to 3e-6, as are the gradients.

    queries: (B, heads, L, D); keys, values: (B, kv_heads, S, D); mask: None, "causal", booleans (true: visible) or
    an additive mask, of a shape that broadcasts to (B, heads, L, S). Returns (B, heads, L, D of values).
    """
    if queries.dtype != mx.float32 or sinks is not None or hasattr(cache, "bits"):
        return _original(queries, keys, values, cache, scale, mask, sinks)
    batch, heads, length, width = queries.shape
    kv_heads, places = keys.shape[1], keys.shape[2]
    shared = heads // kv_heads  # query heads per key head, merged into one in the products
    queries = (queries * (scale * _LOG2_E)).reshape(batch, kv_heads, shared * length, width)
    exponents = queries @ keys.swapaxes(-1, -2)
    if mask is not None:
        exponents = exponents.reshape(batch, heads, length, places) + _added(mask, length, places)
        exponents = exponents.reshape(batch, kv_heads, shared * length, places)
    softmax = _softmax if mask is None or isinstance(mask, str) else _softmax_or_zero
    return (softmax(exponents) @ values).reshape(batch, heads, length, -1)


def _added(mask: mx.array | str, length: int, places: int) -> mx.array:
    """The mask as an addend to the exponents: −inf at invisible positions."""
    if isinstance(mask, str):
        return _causal(length, places)
    if mask.dtype == mx.bool_:
        return mx.where(mask, 0.0, -math.inf)
    return mask * _LOG2_E


@functools.lru_cache(maxsize=1)  # a pass asks for the same in every layer
def _causal(length: int, places: int) -> mx.array:
    return mx.where(mx.arange(places - length, places)[:, None] >= mx.arange(places), 0.0, -math.inf)


def install() -> None:
    """Replace mlx-lm's attention."""
    replace_in_mlx_lm(_original, attention)
