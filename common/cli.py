"""Running a script's main so that a user's mistake is one line and a stop is clean."""

import re
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

from common.errors import UserError
from common.files import why_and_remedy

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Raised when a signal stops a run; the message says how to resume it."""


class StopSignal:
    """A context in which Ctrl-C and SIGTERM only set `requested`, so that a loop can finish its step and save.

    A second Ctrl-C stops at once; what remains is the last checkpoint.
    """

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in getattr(self, "previous", {}).items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)


# What mlx (Metal, CUDA) and torch (CUDA, MPS) say where memory does not suffice, or the system killed a kernel.
MEMORY_MESSAGE = re.compile(
    r"malloc\] (Unable to allocate|Attempting to allocate|Resource limit)|Insufficient Memory|ErrorOutOfMemory"
    r"|out of memory|cudaErrorMemoryAllocation",
    flags=re.IGNORECASE,
)
KILLED_MESSAGE = re.compile(r"\[METAL\]|GPU Timeout|cudaErrorLaunchTimeout|launch timed out", flags=re.IGNORECASE)
ADVICE = (
    "try a smaller --mini-batch-size (PPO), --batch-size or --logits-memory, shorter texts, or --grad-checkpoint; "
    "--resume continues from the last checkpoint"
)


def device_advice(error: Exception) -> str:
    """A line of advice where `error` says that memory did not suffice or a kernel was killed; else an empty one."""
    said = str(error)
    first = next(iter(said.splitlines()), "")
    if isinstance(error, MemoryError) or MEMORY_MESSAGE.search(said):
        return f"the device is out of memory ({first}); {ADVICE}"
    if KILLED_MESSAGE.search(said):
        return f"the device stopped a computation ({first}); {ADVICE}"
    return ""


def run(main: Callable[[], None]) -> None:
    """Call `main`. A UserError, an OSError or a device out of memory becomes one line on stderr and exit code 2.

    Ctrl-C ends with exit code 130. No traceback, and progress bars end first, so that the line is one.
    """
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except (Stopped, KeyboardInterrupt) as stop:
        print(f"\nstopped. {stop}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        why, remedy = why_and_remedy(error)
        path = error.filename if isinstance(error.filename, str) else "a file or connection"
        _fail(f"{path} cannot be used ({why}); {remedy}")
    except (RuntimeError, MemoryError) as error:
        if not (advice := device_advice(error)):
            raise
        _fail(advice)


def _fail(message: str) -> NoReturn:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
