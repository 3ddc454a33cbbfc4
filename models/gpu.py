"""What a run asks of a GPU: memory that stays where it is, and memory given back (on CPU nothing is done); and how
much of it there was at most, on any device.

Not here: what is for mlx on Linux CPU only (see models.cpu).
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.utils import maybe_set_recommended_wired_limit

from models import cpu

MEMORY_SHARE = 0.8  # of Metal's recommended working set, for this process; the rest is for the other windows


def on_gpu() -> bool:
    """Whether arrays are computed on a GPU, or TUNER_SIMULATE_GPU=1 lets this process act as if they were."""
    return mx.default_device() == mx.Device(mx.gpu) or cpu.simulating_gpu()


def wire_memory() -> None:
    """Let Metal keep the recommended share of memory resident, as mlx-lm's trainer does; CUDA has no such limit.

    Otherwise macOS may take pages of the weights back between two passes. Where the recommended size is known, mlx runs
    no further ahead of the GPU than MEMORY_SHARE of it allows (by default, 1.5 times that size).
    """
    if not on_gpu():
        return
    maybe_set_recommended_wired_limit()
    information: dict[str, Any] = mx.device_info()
    if size := information.get("max_recommended_working_set_size"):
        mx.set_memory_limit(int(MEMORY_SHARE * size))


def release_memory() -> None:
    """Give the freed arrays that mlx keeps for reuse back to the system, between phases whose arrays differ in size."""
    if on_gpu():
        mx.clear_cache()


def memory_meter() -> Callable[[], float]:
    """A function that returns the most bytes that mlx's arrays have taken at once since now, those of now included."""
    mx.reset_peak_memory()
    return lambda: float(max(mx.get_peak_memory(), mx.get_active_memory()))
