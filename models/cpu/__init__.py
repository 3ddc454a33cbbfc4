"""Speed-ups for mlx on Linux CPU: a fast BLAS, process settings, and faster attention, rotary embedding,
RMSNorm, SwiGLU, exp and linear layers.

Entry points call `enable()` once, before mlx is imported. It does nothing on a Mac or with a CUDA build. The rest of
the project runs without it, more slowly.

For tests only, TUNER_SIMULATE_GPU=1 makes the Linux CPU build do what a GPU would be given: mlx's own operations, and
mx.compile's fusing. Only the BLAS and the settings of the process remain.
"""

import importlib.metadata
import os
import platform
import sys
from typing import Any

from models.cpu import blas, process

BLAS: str | None = None  # what `enable` loaded: openblas, mkl, torch or none; None where it had nothing to do


def wanted() -> bool:
    """Whether this machine's mlx is the Linux CPU build.

    `pip install "mlx[cuda13]"` leaves mlx-cpu installed beside mlx-cuda-13, so the one has to be there and the other
    not.
    """
    if platform.system() != "Linux":
        return False
    names = {distribution.name.lower().replace("_", "-") for distribution in importlib.metadata.distributions()}
    return "mlx-cpu" in names and not any(name.startswith("mlx-cuda") for name in names)


def simulating_gpu() -> bool:
    """Whether TUNER_SIMULATE_GPU=1 asks that this process does on CPU what it would do on a GPU."""
    return os.environ.get("TUNER_SIMULATE_GPU") == "1"


def replacing() -> bool:
    """Whether parts of mlx and mlx-lm are replaced on this machine, and mx.compile disabled."""
    return wanted() and not simulating_gpu()


def enable() -> None:
    """Load a BLAS, set up this process, and replace the parts of mlx and mlx-lm that are slow on CPU.

    Call it before `mlx.core` is imported: a BLAS loaded later has no effect. If none is found, one line on stderr says
    what to install; if TUNER_BLAS names one that is not there, the process ends with such a line. Further calls change
    nothing.
    """
    global BLAS
    if not wanted():
        return
    if "mlx.core" not in sys.modules:
        BLAS = _load_blas()
        process.use_batch_scheduling()
        process.keep_freed_memory()
    if not replacing():
        return
    import mlx.core as mx

    from models.cpu import attention, exponential, linear, norm, rope, swiglu

    # On CPU mx.compile calls a C++ compiler, which takes a second for a function of six operations.
    mx.disable_compile()
    attention.install()
    exponential.install()
    linear.install()
    norm.install()
    rope.install()
    swiglu.install()
    if blas.has_one_thread():
        process.compute_after(lambda: mx.eval(mx.zeros(1)))


def prepare_for(hidden_size: int) -> None:
    """Let all cores compute if a model of this hidden size, which the process has opened, gains by it.

    Not in the processes of a launch, which share the cores of a machine.
    """
    if BLAS == "mkl" and hidden_size >= blas.WIDE and not process.is_rank():
        blas.take_all_threads()
        if not blas.has_one_thread():
            process.compute_on_all_cores()


def _load_blas() -> str:
    try:
        asked_for = blas.asked_for()
        name, _ = blas.load(asked_for)
    except ValueError as error:  # scripts call `enable` among their imports, where nothing would catch it
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if name == "none" and asked_for is None:
        print(blas.ADVICE, file=sys.stderr)
    return name


def describe_device(device: Any) -> str:
    """A device of mlx as a run's first line names it, on Linux CPU with the BLAS: the CPU (MKL)."""
    import mlx.core as mx

    name = f"the {device.type.name.upper()}"
    if device.type.name == "cpu":
        return f"{name} ({blas.TITLES[BLAS]})" if BLAS else name
    return f"{name} (CUDA; a first run waits minutes for mlx to compile)" if mx.cuda.is_available() else name
