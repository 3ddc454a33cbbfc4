"""Calling a user's own code: whatever it raises is one line, sys.exit included, and what never returns is ended.

The time limit is by SIGALRM, so it holds in the main thread only; code in C that never looks at signals outlasts it.
"""

import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from common.cli import Stopped
from common.errors import UserError

TIMEOUT = 600.0  # seconds a call may take, by default
AGAIN = 1.0  # seconds after which the limit is raised anew, where the code has swallowed it


class _TooLong(BaseException):
    """No Exception, which a user's code may catch."""


@contextmanager
def user_code(what: str, seconds: float = 0.0, fails: str = "failed") -> Iterator[None]:
    """Run the block as a user's code. what: how errors refer to it; seconds: the limit (0: none);
    fails: the verb of the line.

    Raises UserError for whatever the block raises, with its type, message, file and line.
    """
    try:
        with _time_limit(seconds), _same_folder():
            yield
    except (UserError, Stopped, KeyboardInterrupt):
        raise
    except _TooLong as error:
        where = _place(error)
        remedy = "fix it, or give a longer --reward-timeout (0: no limit)"
        raise UserError(f"{what} has not returned after {seconds:g} s{where}; {remedy}") from None
    except BaseException as error:
        raise UserError(f"{what} {fails}: {error_summary(error)}; fix it") from error


@contextmanager
def _same_folder() -> Iterator[None]:
    """Come back to the working folder, which the paths of flags are relative to, if the block leaves it."""
    before = os.getcwd()
    try:
        yield
    finally:
        if os.getcwd() != before:
            os.chdir(before)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def error_summary(error: BaseException) -> str:
    """Type, message and location of an exception, in one line."""
    try:
        message = " ".join(str(error).split())[:500]
    except Exception:  # noqa: BLE001  (whose text is a user's code, too)
        message = "its text cannot be read"
    return ": ".join(filter(None, [type(error).__name__, message])) + _place(error)


def _place(error: BaseException) -> str:
    """Where a user's code raised it: " (FILE, line N)", or nothing."""
    # Frames of this package and of the import machinery are not informative; a SyntaxError names its line itself.
    ours = Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    frames = [frame for frame in frames if Path(frame.filename).parent != ours and "contextlib" not in frame.filename]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
