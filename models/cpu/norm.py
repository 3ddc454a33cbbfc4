"""RMSNorm for mlx on Linux CPU whose gradient takes half the operations.

There mlx's is made of several operations, and its gradient of those of each. Only float32 is replaced; everything else
remains mlx's. Output equals mlx's to the bit.
"""

import functools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

_original = nn.RMSNorm.__call__


def rms_norm(layer: nn.RMSNorm, x: mx.array) -> mx.array:
    """x (..., H) by the root of its mean square, times the layer's weight; the gradients are within 1e-6 of mlx's."""
    if not x.dtype == layer.weight.dtype == mx.float32:
        return _original(layer, x)
    return _norm(layer.eps)(x, layer.weight)[0]


@functools.cache
def _norm(eps: float) -> Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]:
    @mx.custom_function
    def norm(x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        """What is normalised, and what x was multiplied by (..., 1)."""
        scale = mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + eps)
        return weight * (x * scale), scale

    @norm.vjp
    def norm_vjp(primals, cotangents, outputs):
        """Only the first output is ever used."""
        (x, weight), cotangent, scale = primals, cotangents[0], outputs[1]
        by_scaled = cotangent * weight
        mean = mx.mean(by_scaled * x, axis=-1, keepdims=True)
        by_weight = (cotangent * (x * scale)).reshape(-1, x.shape[-1]).sum(axis=0)
        return scale * (by_scaled - x * (mx.square(scale) * mean)), by_weight

    return norm


def install() -> None:
    """Replace mlx's RMSNorm."""
    nn.RMSNorm.__call__ = rms_norm
