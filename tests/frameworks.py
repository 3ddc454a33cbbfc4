"""A common interface to MLX and PyTorch, so that one test checks a function of `training/` in both.

@pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)
def test_mean(framework):
    framework.close(masked_mean(framework.array(x), framework.array(mask)), expected)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import torch


@dataclass(frozen=True)
class Framework:
    """One array library at one precision. `tolerance` is relative to the largest expected number."""

    name: str
    dtype: Any
    tolerance: float

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).rpartition('.')[2]}"

    def array(self, content: Any) -> Any:
        """Floats become arrays of this precision; integers and booleans keep their type."""
        source = np.asarray(content)
        if self.name == "mlx":
            return mx.array(source.tolist(), dtype=self.dtype if source.dtype.kind == "f" else None)
        tensor = torch.from_numpy(source.copy())
        return tensor.to(self.dtype) if source.dtype.kind == "f" else tensor

    def numpy(self, array: Any) -> np.ndarray:
        if self.name == "mlx":
            return np.array(array)
        return array.detach().numpy()

    def close(self, actual: Any, expected: Any) -> None:
        """Assert equal shapes and equal numbers to within the tolerance."""
        actual, expected = self.numpy(actual), np.asarray(expected)
        assert actual.shape == expected.shape
        scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=self.tolerance * scale)

    def gradients(self, loss: Callable[..., Any], *arguments: Any) -> Sequence[np.ndarray]:
        """Gradients of a scalar function of arrays with respect to each argument."""
        arrays = [self.array(argument) for argument in arguments]
        if self.name == "mlx":
            by_list = mx.grad(lambda inputs: loss(*inputs))  # one argument by itself would come back bare
            return [np.array(gradient) for gradient in by_list(arrays)]
        arrays = [array.requires_grad_() for array in arrays]
        return [gradient.numpy() for gradient in torch.autograd.grad(loss(*arrays), arrays)]


FRAMEWORKS = [
    Framework("mlx", mx.float32, 1e-5),
    Framework("torch", torch.float32, 1e-5),
    Framework("torch", torch.float64, 1e-7),
]
