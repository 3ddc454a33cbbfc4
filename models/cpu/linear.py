"""A linear layer for mlx on Linux CPU whose weight gradient has the memory layout of the weight.

mlx's gradient is transposed, which makes every operation on both take three times as long on CPU. Only for float32
layers without a bias; everything else remains mlx's. Output and input gradient equal mlx's to the bit; so does the
weight's gradient unless the BLAS sums a transposed product in another order.
"""

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
    """Apply `layer` to x (..., inputs). Returns (..., outputs).

    A frozen weight has no gradient to lie in any way, so that mlx's own product, of fewer operations, serves.
    """
    frozen = "weight" in layer._no_grad
    if frozen or "bias" in layer or not x.dtype == layer.weight.dtype == mx.float32:
        return _original(layer, x)
    return _product(x, layer.weight)


def install() -> None:
    """Replace mlx's linear layer."""
    nn.Linear.__call__ = linear
