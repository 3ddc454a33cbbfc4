"""Let a linear layer on Linux CPU give its weight's gradient as the weight lies. Importing this module sees to it.

mlx gives it transposed, and on CPU everything that then takes both takes three times as long. The same bits, for
layers without a bias in float32; only where `models.fast_blas` is wanted.
"""

import models.fast_blas  # before mlx

import mlx.core as mx
import mlx.nn as nn

_original = nn.Linear.__call__


@mx.custom_function
def _product(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


@_product.vjp
def _product_vjp(primals, cotangent, output):
    x, weight = primals
    outer = cotangent.reshape(-1, cotangent.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return cotangent @ weight, outer


def linear(layer: nn.Linear, x: mx.array) -> mx.array:
    """What `layer` makes of x (..., inputs): (..., outputs)."""
    if "bias" in layer or not x.dtype == layer.weight.dtype == mx.float32:
        return _original(layer, x)
    return _product(x, layer.weight)


if models.fast_blas.wanted():
    nn.Linear.__call__ = linear
