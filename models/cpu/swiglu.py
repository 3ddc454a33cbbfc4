"""SwiGLU for mlx-lm on Linux CPU in a quarter of the time.

On an x86 CPU mlx's sigmoid takes 14 ns per element, its power 3 ns; SwiGLU took a third of a forward pass at hidden
size 256. Only float32 is replaced; everything else remains mlx-lm's.
"""

import math

import mlx.core as mx
from mlx_lm.models import activations

from models.cpu.replace import replace_in_mlx_lm

_MINUS_LOG2_E = -math.log2(math.e)
_original = activations.swiglu


@mx.custom_function
def _parts(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """silu(gate) * x, silu(gate) and sigmoid(gate); where the power overflows, the sigmoid is 0."""
    sigmoid = 1 / (1 + mx.power(mx.array(2.0), gate * _MINUS_LOG2_E))
    silu = gate * sigmoid
    return silu * x, silu, sigmoid


@_parts.vjp
def _parts_vjp(primals, cotangents, outputs):
    """Explicit, because the gradient of power is NaN on overflow. Only the first output is ever used."""
    _, x = primals
    _, silu, sigmoid = outputs
    return cotangents[0] * x * (sigmoid + silu * (1 - sigmoid)), cotangents[0] * silu


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x for two arrays of one shape; within 1e-6 of mlx-lm's, as are the gradients."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32:
        return _original(gate, x)
    return _parts(gate, x)[0]


def install() -> None:
    """Replace mlx-lm's SwiGLU."""
    replace_in_mlx_lm(_original, swiglu)
