"""A fast BLAS for mlx on Linux CPU, loaded before the first `import mlx.core`.

The `mlx-cpu` wheel links the reference BLAS (4-5 GFLOP/s in float32). Symbols of a library that was loaded
globally before it win, so loading OpenBLAS, MKL or torch's own library first makes matmul some 30 times
faster. bfloat16 and float16 stay slow on CPU.

    python models/cpu/blas.py                 says which library is taken
    python models/cpu/blas.py --needs-mkl     exit code 0 if `pip install mkl` would help (used by the Makefile)
"""

import ctypes
import ctypes.util
import importlib.util
import os
import platform
import sys
from pathlib import Path

OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")
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


if __name__ == "__main__":
    if "--needs-mkl" in sys.argv[1:]:
        on_x86_linux = platform.system() == "Linux" and platform.machine() == "x86_64"
        sys.exit(0 if on_x86_linux and _openblas() is None and _mkl() is None else 1)
    print(load() or "none found")
