"""Running a script's main so that a user's mistake is one line and a stop is clean."""

import io
import os
import re
import select
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import common
from common.errors import UserError, one_line
from common.files import why_and_remedy
from common.progress import end_bars

LAST_WORDS = "LAST_WORDS_FD"  # the environment variable with the file descriptor that takes an error's line
# Taken out at once, since in a process that this one starts the number means something else.
_starter = os.environ.pop(LAST_WORDS, "")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """Raised when a signal stops a run; the message says how to resume it."""


class StopSignal:
    """A context in which Ctrl-C, SIGTERM and SIGHUP only set `requested`, so that a loop can finish its step and save.

    A second Ctrl-C or SIGTERM stops at once; what remains is the last checkpoint. Where SIGHUP is ignored (nohup), it
    stays so.
    """

    def __init__(self):
        self.requested = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave(lambda descriptor: stat.S_ISCHR(os.fstat(descriptor).st_mode))  # the terminal
        elif self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with reader_may_leave():
            print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """What is printed here may have no reader any more (`| head`): that is a SIGHUP, and further output is dropped."""
    try:
        yield
    except BrokenPipeError:
        _leave(_is_broken)
        signal.raise_signal(signal.SIGHUP)


def _leave(gone: Callable[[int], bool]) -> None:
    """Send nowhere what would go where it is refused."""
    for descriptor in (1, 2):
        if gone(descriptor):
            _discard(descriptor)


def _is_broken(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


# What mlx (Metal, CUDA) and torch (CUDA, MPS) say where memory does not suffice, or the system killed a kernel.
MEMORY_MESSAGE = re.compile(
    r"malloc\] (Unable to allocate|Attempting to allocate|Resource limit)|Insufficient Memory|ErrorOutOfMemory"
    r"|out of memory|cudaErrorMemoryAllocation",
    flags=re.IGNORECASE,
)
KILLED_MESSAGE = re.compile(r"\[METAL\]|GPU Timeout|cudaErrorLaunchTimeout|launch timed out", flags=re.IGNORECASE)
ADVICE = (
    "try a smaller --mini-batch-size (PPO), --batch-size or --logits-memory, shorter texts, or --grad-checkpoint; "
    "--plan says which of them is enough, and --resume continues from the last checkpoint"
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

    Ctrl-C ends with exit code 130, a closed standard output with 141. No traceback, and progress bars end first, so
    that the line is one. What standard output cannot hold is written as escapes; input that is no text, as U+FFFD.
    """
    _prepare_streams()
    if signal.getsignal(signal.SIGINT) is common.interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = sys.__unraisablehook__
    try:
        try:
            if common.interrupts:
                raise KeyboardInterrupt
            main()
            sys.stdout.flush()
        finally:
            end_bars()
    except UserError as error:
        _fail(str(error))
    except (Stopped, KeyboardInterrupt) as stop:
        _end(130, f"\nstopped. {one_line(str(stop))}".rstrip())
    except BrokenPipeError:
        _discard(1)  # or Python would complain as it flushes what is left
        _end(141, "stopped. what read the standard output has closed it")
    except OSError as error:
        why, remedy = why_and_remedy(error)
        path = error.filename if isinstance(error.filename, str) else "a file or connection"
        _fail(f"{path} cannot be used ({why}); {remedy}")
    except ValueError as error:
        if "embedded null byte" not in str(error):
            raise
        _fail("the name of a file holds a null character; take it out")
    except (RuntimeError, MemoryError) as error:
        if not (advice := device_advice(error)):
            raise
        _fail(advice)


def python_command() -> str:
    """What to type in front of a script's name, here and now, to run it by this Python."""
    found = shutil.which("python")
    if found and os.path.samefile(found, sys.executable) and Path(found).parent == Path(sys.executable).parent:
        return "python"
    place = Path(sys.executable)
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(place)


def _prepare_streams() -> None:
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # or the next file to be opened would be one of them
        pass
    os.close(descriptor)
    for name, errors in (("stdin", "replace"), ("stdout", "backslashreplace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _fail(message: str) -> NoReturn:
    line = one_line(message)
    _end(2, "" if _told_starter(line) else f"error: {line}")


def _end(code: int, line: str) -> NoReturn:
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def _told_starter(message: str) -> bool:
    """Whether the script that started this one took its last words, to say them in its own."""
    try:
        with os.fdopen(int(_starter), "w", encoding="utf-8", errors="backslashreplace") as pipe:
            pipe.write(message)
        return True
    except (OSError, ValueError):  # nobody did, or is there any more
        return False
