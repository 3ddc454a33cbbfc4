"""Muon's step, written once for MLX and for PyTorch: momentum with all singular values set to about 1.

Source: kellerjordan.github.io/posts/muon. Unlike there, a step is not scaled by the matrix's shape, which differs
between the frameworks (a LoRA's factors are stored transposed): the rate is the step's spectral norm.
"""

from typing import Any

Array = Any  # an mlx.core.array or a torch.Tensor

MOMENTUM = 0.95


def muon_step(gradient: Array, average: Array) -> tuple[Array, Array]:
    """The step, to be subtracted, and the new moving average of gradients; all (..., m, n).

    The average is exponential, with Nesterov momentum.
    """
    average = MOMENTUM * average + (1 - MOMENTUM) * gradient
    return orthogonalised(MOMENTUM * average + (1 - MOMENTUM) * gradient), average


def orthogonalised(matrices: Array) -> Array:
    """Each of the matrices (..., m, n) with its singular values set to between 0.7 and 1.2; zeros stay zeros.

    Five steps of a Newton-Schulz iteration with Jordan's coefficients, in the matrices' own precision.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    upright = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.swapaxes(-1, -2) if upright else matrices
    x = x / ((x * x).sum(axis=(-1, -2), keepdims=True) ** 0.5 + 1e-7)
    for _ in range(5):
        square = x @ x.swapaxes(-1, -2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.swapaxes(-1, -2) if upright else x
