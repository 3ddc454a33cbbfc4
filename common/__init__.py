"""What every other folder uses: errors, atomic files, the flag parser, running a script. Imports nothing of ours.

Until `common.cli.run` begins, a script imports. Ctrl-C is one line then, too, and never lost: what a library or a
callback swallows meanwhile is found by `run`.
"""

import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

interrupts: list[int] = []  # SIGINTs so far, until `run` begins


def interrupt(number: int, frame: FrameType | None) -> None:
    """Python's own handler of SIGINT, which also keeps that there was one."""
    interrupts.append(number)
    raise KeyboardInterrupt


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line and exit code 130 for Ctrl-C, of which an extension may have made an ImportError; no traceback."""
    if interrupts or issubclass(kind, KeyboardInterrupt):
        print("\nstopped.", file=sys.stderr)
        sys.exit(130)
    else:
        sys.__excepthook__(kind, error, trace)


def _swallowed(unraisable: Any) -> None:
    """Nothing for Ctrl-C within a callback, where Python ignores all exceptions."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


if sys.excepthook is sys.__excepthook__:  # a notebook has its own
    sys.excepthook, sys.unraisablehook = _quiet, _swallowed
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # imported by a thread
            signal.signal(signal.SIGINT, interrupt)
