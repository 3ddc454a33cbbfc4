"""What every other folder uses: errors, atomic files, the flag parser, running a script. Imports nothing of ours."""

import _thread
import sys
import threading
from types import TracebackType
from typing import Any


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C before `common.cli.run` has begun, while a script still imports: one line, no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _once_more(unraisable: Any) -> None:
    """Ctrl-C that fell into a callback, as imports have, where Python ignores all exceptions: a moment later again."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


if sys.excepthook is sys.__excepthook__:  # a notebook has its own
    sys.excepthook, sys.unraisablehook = _quiet, _once_more
