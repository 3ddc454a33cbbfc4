"""A fast BLAS for mlx on Linux CPU, loaded before the first `import mlx.core`.

The `mlx-cpu` wheel links the reference BLAS (4-5 GFLOP/s in float32). Symbols of a library that was loaded
globally before it win, so loading OpenBLAS, MKL or torch's own library first makes matmul some 30 times
faster. bfloat16 and float16 stay slow on CPU.

The environment variable TUNER_BLAS names the library: openblas, mkl, torch, or none. Without it the first one found is
taken, in this order.

    python models/cpu/blas.py                 says which library is taken
    python models/cpu/blas.py --needs-mkl     exit code 0 if `pip install mkl` would help (used by the Makefile)
"""

import ctypes
import ctypes.util
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")
THREAD_COUNTS = ("openblas_get_num_threads", "MKL_Get_Max_Threads")
WIDE = 512  # hidden size of a model from which MKL's threads serve (see `_one_thread_at_first`)
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
    # How many milliseconds its threads wait for the next product without giving up their cores; 200 by default. With 0
    # they are woken for each, which takes 0.14 ms, where a product of one head's attention takes 0.002 to 0.03.
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    # Without this the same product may differ in its last bit with the alignment, and a resumed run from the whole.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    library_folder = Path(sys.prefix) / "lib"
    for mkl in sorted(library_folder.glob("libmkl_rt.so*"), reverse=True):
        for runtime in sorted(library_folder.glob("libiomp5.so")):
            _load(str(runtime))
        if _load(str(mkl)):
            if _one_thread_at_first():
                _tell_mkl(1)
            return str(mkl)
    return None


def _one_thread_at_first() -> bool:
    """Whether MKL gets one thread until a wide model is opened (`take_all_threads`): unless the user set a number.

    On two cores a PPO step with two threads took 1.3 times as long as with one at hidden size 64 and 0.7 times at 576;
    beside other work, 1.6 times at 384 and 1.1 at 576 (docs/speed.md).
    """
    return not {"MKL_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys()


def _tell_mkl(threads: int) -> None:
    """Let MKL compute with so many threads, if it is loaded."""
    library = ctypes.CDLL(None)
    if hasattr(library, "MKL_Set_Num_Threads"):
        library.MKL_Set_Num_Threads(threads)


def take_all_threads() -> None:
    """Let MKL compute with one thread per core, unless the user set a number."""
    if _one_thread_at_first():
        _tell_mkl(len(os.sched_getaffinity(0)))


def has_one_thread() -> bool:
    """Whether the BLAS that is loaded computes by the thread that calls it alone; False where it cannot be asked."""
    library = ctypes.CDLL(None)
    counts = [getattr(library, name)() for name in THREAD_COUNTS if hasattr(library, name)]
    return set(counts) == {1}


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


LIBRARIES: dict[str, Callable[[], str | None]] = {"openblas": _openblas, "mkl": _mkl, "torch": _torch}
TITLES = {"openblas": "OpenBLAS", "mkl": "MKL", "torch": "torch's BLAS", "none": "no fast BLAS"}
REMEDIES = {
    "openblas": "install it (Debian: apt install libopenblas0-pthread)",
    "mkl": "run, on x86-64: pip install mkl",
    "torch": "install torch",
}


def asked_for() -> str | None:
    """The library that TUNER_BLAS names, if it is set. Raises ValueError, in one line, for an unknown name."""
    name = os.environ.get("TUNER_BLAS") or None
    if name is not None and name not in TITLES:
        raise ValueError(f"TUNER_BLAS is {name!r}, which is no BLAS; it can be {', '.join(TITLES)}")
    return name


def load(name: str | None = None) -> tuple[str, str | None]:
    """Load the library `name`, or the first there is, for the whole process.

    Returns its short name and its file: "none" and None if there is no library, or `name` is "none". Raises
    ValueError, in one line, if `name` is not there.
    """
    if name == "none":
        return name, None
    for found in LIBRARIES if name is None else (name,):
        if file := LIBRARIES[found]():
            return found, file
    if name is not None:
        raise ValueError(f"TUNER_BLAS is {name}, but {TITLES[name]} is not found; {REMEDIES[name]}, or unset it")
    return "none", None


def needs_mkl() -> bool:
    """Whether MKL would be used if it were installed: on x86-64, where nothing else is found or TUNER_BLAS names it."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    name = asked_for()
    return _mkl() is None and (name == "mkl" or (name is None and _openblas() is None))


def main() -> None:
    try:
        if "--needs-mkl" in sys.argv[1:]:
            sys.exit(0 if needs_mkl() else 1)
        print(load(asked_for())[1] or "none found")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
