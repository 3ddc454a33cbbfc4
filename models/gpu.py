"""What a run asks of a GPU: memory that stays where it is, and memory given back (on CPU nothing is done); and how
much of it there was at most, on any device.

Not here: what is for mlx on Linux CPU only (see models.cpu).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import maybe_set_recommended_wired_limit

from models import cpu

MEMORY_SHARE = 0.8  # of Metal's recommended working set, for this process; the rest is for the other windows


SHARE = 2 / 3  # of a machine's memory that is counted on where mlx does not say; the rest is the system's


@dataclass(frozen=True)
class Machine:
    """What a run is planned for. memory: bytes that it may take."""

    name: str
    memory: float
    on_gpu: bool


def this_machine() -> Machine:
    """This machine: what Metal recommends, all that a CUDA device has, or a share of the system's memory."""
    information: dict[str, Any] = mx.device_info()
    known = information.get("max_recommended_working_set_size") or information.get("total_memory")
    return Machine("this machine", float(known or SHARE * system_memory()), on_gpu())


def a_mac(gigabytes: float) -> Machine:
    """A Mac with so much memory."""
    return Machine(f"a Mac with {gigabytes:g} GB", SHARE * gigabytes * 1e9, on_gpu=True)


def system_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def rows_at_once(model: nn.Module, wanted: int) -> int:
    """How many rows may be decoded at once, at most `wanted`: all of them, but for small heads on CUDA.

    There mlx 0.32 gives its rotary kernel a block of rows × heads / 4 threads in the third dimension, of which CUDA
    allows 64, where a head has fewer than 32 numbers to turn: from 128 on it is `invalid argument` (seen on an H100).
    """
    modules = model.modules() if mx.cuda.is_available() else []
    turned = [module.dims for module in modules if "RoPE" in type(module).__name__ and hasattr(module, "dims")]
    if not turned or min(turned) >= 32:
        return wanted
    heads = max(getattr(module, "n_heads", getattr(module, "num_heads", 1)) for module in modules)
    return min(wanted, max(1, 127 // -(-heads // 4)))


def release_memory() -> None:
    """Give the freed arrays that mlx keeps for reuse back to the system, between phases whose arrays differ in size."""
    if on_gpu():
        mx.clear_cache()


def memory_meter(outside: Callable[[], int] = lambda: 0) -> Callable[[], float]:
    """A function that returns the most bytes that mlx's arrays have taken at once since now, those of now included.

    outside: bytes of arrays that mlx does not count.
    """
    mx.reset_peak_memory()
    return lambda: float(max(mx.get_peak_memory(), mx.get_active_memory()) + outside())
