"""Give mlx on Linux CPU a fast BLAS, and memory that is kept. Import it before the first `import mlx.core`.

The `mlx-cpu` wheel links the reference BLAS (4-5 GFLOP/s in float32). Symbols of a library that was loaded
globally before it win, so loading OpenBLAS, MKL or torch's own library first makes matmul some 30 times
faster. On macOS mlx uses Metal and Accelerate, and nothing is done. bfloat16 and float16 stay slow on CPU.

    python models/fast_blas.py                 says which library is taken
    python models/fast_blas.py --needs-mkl     exit code 0 if `pip install mkl` would help (used by the Makefile)
"""

import contextlib
import ctypes
import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP_THRESHOLD, KEPT_BYTES = 2**25, 2**30
ADVICE = (
    "warning: no fast BLAS found, so a PPO step takes up to 15 times as long; "
    "install OpenBLAS (Debian: apt install libopenblas0-pthread) or, on x86-64, run: pip install mkl"
)


def _openblas() -> str | None:
    for name in (*OPENBLAS_NAMES, ctypes.util.find_library("openblas")):
        if name and _load(name):
            return name
    return None


def _load(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _mkl() -> str | None:
    """MKL from PyPI lies in PREFIX/lib, with its OpenMP runtime, which has to be loaded before it."""
    # Without this the same product may differ in its last bit with the alignment, and a resumed run from the whole.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    library_folder = Path(sys.prefix) / "lib"
    for mkl in sorted(library_folder.glob("libmkl_rt.so*"), reverse=True):
        for runtime in sorted(library_folder.glob("libiomp5.so")):
            _load(str(runtime))
        if _load(str(mkl)):
            return str(mkl)
    return None


def _torch() -> str | None:
    """The BLAS inside an installed torch, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        if not _load(str(folder / name)):
            return None
    return str(folder / "libtorch_cpu.so")


def load() -> str | None:
    """Load the first fast BLAS there is, for the whole process. Returns its name, or None where none is found."""
    return _openblas() or _mkl() or _torch()


def wanted() -> bool:
    """Whether this machine's mlx is the Linux CPU build (the CUDA builds bring libraries of their own)."""
    return platform.system() == "Linux" and any(importlib.metadata.distributions(name="mlx-cpu"))


def run_in_turns() -> None:
    """Let the kernel run this process's threads in turns, for those that are started from now on too.

    mlx hands each operation to a thread of its own. By default the kernel stops the one that hands over to run the
    one that takes, and back, which for a small model is a quarter of all the time.
    """
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next array, as mlx does itself on a GPU.

    By default it gives arrays of some 100 kB and more back to the kernel, which then clears every page of the next
    one: a sixth of a PPO step of 128 completions of 80 tokens.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def replace_in_mlx_lm(original: Callable, replacement: Callable) -> None:
    """Where `wanted`, put `replacement` in the place of `original` in every module of mlx-lm imported so far."""
    if not wanted():
        return
    name = original.__name__
    for module in [module for path, module in sys.modules.items() if path.startswith("mlx_lm.models.")]:
        if getattr(module, name, None) is original:
            setattr(module, name, replacement)


LOADED = None
if wanted() and "mlx.core" not in sys.modules:
    LOADED = load()
    run_in_turns()
    keep_freed_memory()
    if LOADED is None and "--needs-mkl" not in sys.argv:
        print(ADVICE, file=sys.stderr)

if __name__ == "__main__":
    if "--needs-mkl" in sys.argv[1:]:
        on_x86_linux = platform.system() == "Linux" and platform.machine() == "x86_64"
        sys.exit(0 if on_x86_linux and _openblas() is None and _mkl() is None else 1)
    print(LOADED or "none needed or none found")
