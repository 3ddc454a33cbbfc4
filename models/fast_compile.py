"""Let mx.compile on Linux CPU keep the trace of a function without fusing its operations. Importing this sets it.

There mlx fuses by writing C++ and calling a compiler, about a second for a function of six operations. Its mode that
only keeps the trace saves what Python takes to build the graph anew, a tenth of a PPO step of a small model. The mode
has no name in Python, so the library itself is asked.
"""

import contextlib
import ctypes
from pathlib import Path

import models.fast_blas  # before mlx

import mlx.core as mx

_SET_MODE = "_ZN3mlx4core16set_compile_modeENS0_11CompileModeE"  # mlx::core::set_compile_mode(CompileMode)
_NO_FUSE = 2  # of enum CompileMode in mlx/compile.h


def _stop_fusing() -> bool:
    with contextlib.suppress(OSError, AttributeError):  # where the library or the function in it has another name
        library = ctypes.CDLL(str(Path(mx.__file__).parent / "lib" / "libmlx.so"))
        getattr(library, _SET_MODE)(_NO_FUSE)
        return True
    return False


KEEPS_TRACES = models.fast_blas.wanted() and _stop_fusing()


def pays() -> bool:
    """Whether mx.compile is worth its first call: on a GPU, and where traces are kept without fusing."""
    return KEEPS_TRACES or mx.default_device() == mx.Device(mx.gpu)
