"""Progress of a job: a bar on a terminal, which is gone when the job is done; elsewhere a plain line now and then.

Both go to stderr, so that what a script prints can be piped.
"""

import sys
import time
from contextlib import suppress
from types import TracebackType

from tqdm import tqdm

FORMAT = "{desc}: {n_fmt} of {total_fmt} {unit}s |{bar}| {elapsed}, {remaining} left{postfix}"
PLAIN_EVERY = 60.0  # seconds between plain lines
TOO_FEW, EARLY = 5, 0.02  # things done, and their share, below which nothing is said of the time left


class PlainProgress:
    """Lines such as `sft: 120 of 600 steps, 4 min left`, at most one every PLAIN_EVERY seconds."""

    def __init__(self, total: int, description: str, unit: str, done: int = 0):
        self.total, self.description, self.unit, self.n, self.first = total, description, unit, done, done
        self.started = self.said = time.monotonic()
        self.postfix = ""

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        self.n += count
        now = time.monotonic()
        if now - self.said >= PLAIN_EVERY:
            self.said = now
            done = self.n - self.first
            left = duration((now - self.started) / max(done, 1) * (self.total - self.n))
            # Of things that are done side by side the first take the time of many.
            ends = [f"{left} left"] if done >= TOO_FEW or done >= EARLY * self.total else []
            ends += [self.postfix] if self.postfix else []
            line = ", ".join([f"{self.description}: {self.n:,} of {self.total:,} {self.unit}s", *ends])
            print(line, file=sys.stderr, flush=True)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What stands at the end of the next lines."""
        self.postfix = text

    def close(self) -> None:
        """As of a bar; there is nothing to remove."""

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


Progress = tqdm | PlainProgress


def progress(total: int, description: str, unit: str, done: int = 0, scale: bool = False) -> Progress:
    """The progress of `total` things, each a `unit` (in the singular), of which `done` are done.

    scale: show thousands as k. Use it as a context, or close it.
    """
    if not sys.stderr.isatty():
        return PlainProgress(total, description, unit, done)
    return tqdm(
        total=total, initial=done, desc=description, unit=unit, unit_scale=scale, bar_format=FORMAT, dynamic_ncols=True,
        leave=False, mininterval=0.2,
    )  # fmt: skip


def end_bars() -> None:
    """End every bar where it stands, so that what is printed next has a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        with suppress(ValueError):  # stderr may be closed
            bar.leave = True
            bar.close()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 12 s, 4 min, 1 h 05 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
