"""When a request may be sent, and what a failed one means: the gate, the backoff, the faults of an endpoint."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Generic, TypeVar

from openai import APIConnectionError, APIStatusError, APITimeoutError

from common.errors import UserError

LONGEST_BACKOFF = 60.0  # seconds
LONGEST_PAUSE = 600.0  # seconds; an endpoint that asks for more ends the run
QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
FILTER_CODES = {"content_filter", "content_policy_violation"}
AGAIN = {408, 409, 425, 429}  # and 5xx
CROWDED = {429, 503}


class Fault(Exception):
    """A request that got no answer. kind:

    "again": a retry may help; "crowded": a retry may help, at a slower pace; "request": this request will never work;
    "refusal": the endpoint's filter rejected it; "form": another form of it may work; "fatal": no request will work.
    wait: seconds the endpoint asked for, or None.
    """

    def __init__(self, kind: str, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.kind, self.reason, self.wait = kind, reason, wait


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by Retry-After (seconds or an HTTP date, RFC 9110, 10.2.3) or retry-after-ms; None if not given.

    now: seconds since the epoch.
    """
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        text = headers.get("retry-after", "")
        if text.strip().replace(".", "", 1).isdecimal():
            return float(text)
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def backoff(attempt: int, base: float, asked: float | None = None) -> float:
    """Seconds before the next attempt, with full jitter: uniform in [0, base · 2^attempt], at most a minute.

    asked: what the endpoint asked for; the wait is then that plus a jitter of at most `base`, so that requests waiting
    for the same moment are not sent all at once.
    """
    if asked is not None:
        return asked + random.uniform(0, base)
    return random.uniform(0, min(LONGEST_BACKOFF, base * 2**attempt))


def fault_of(error: Exception) -> Fault:
    """What an exception of the openai package, or of reading its response, means."""
    if isinstance(error, APITimeoutError | TimeoutError):
        return Fault("again", "no answer in time")
    if isinstance(error, APIConnectionError):
        return Fault("again", f"connection failed ({_line(error.__cause__ or error)})")
    if not isinstance(error, APIStatusError):
        return Fault("again", f"unreadable response ({type(error).__name__}: {_line(error)})")
    status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
    reason = f"HTTP {status}: {_line(body.get('message') or error.message)}"
    found = (error.code, error.type, body.get("code"), body.get("type"))
    codes = {code for code in found if isinstance(code, str)}
    if status == 402 or codes & QUOTA_CODES:
        return Fault("fatal", f"{reason}; the quota is used up: add credit or choose another teacher")
    if status == 401:
        return Fault("fatal", f"{reason}; check the key in the environment")
    if status == 404:
        return Fault("fatal", f"{reason}; check the URL (most end in /v1) and the model, or restart the server")
    if codes & FILTER_CODES:
        return Fault("refusal", reason)
    if status in AGAIN or status >= 500:
        wait = retry_after(error.response.headers, time.time())
        if wait is not None and wait > LONGEST_PAUSE:
            return Fault("fatal", f"{reason}; it asks for a wait of {wait:.0f} s: start again then")
        return Fault("crowded" if status in CROWDED else "again", reason, wait)
    return Fault("request", reason)


def _line(error: object) -> str:
    """At most 200 characters on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


class Door:
    """How many requests one endpoint is sent at once: at most `bound`, fewer while it is crowded.

    The width is halved when the endpoint is overloaded (once for all requests sent before the last halving) and grows
    by 1 for every `width` answers. Belongs to one event loop.
    """

    def __init__(self, bound: int):
        self.bound, self.width = bound, float(bound)
        self.in_flight = 0
        self.failures = 0  # attempts since the last answer
        self.opens_at = 0.0
        self._halved_at = self._rest = 0.0

    def free(self, now: float) -> int:
        """Requests that may be sent now."""
        return int(self.width) - self.in_flight if now >= self.opens_at else 0

    def answered(self) -> None:
        self.width = min(self.bound, self.width + 1 / self.width)
        self.failures, self._rest = 0, 0.0

    def crowded(self, entered: float) -> None:
        """A request that entered at this time was rejected for overload."""
        if entered >= self._halved_at:
            self.width = max(1.0, self.width / 2)
            self._halved_at = asyncio.get_running_loop().time()

    def pause(self, seconds: float) -> None:
        """Let no request in for this long, as the endpoint asked for."""
        self.opens_at = max(self.opens_at, asyncio.get_running_loop().time() + seconds)

    def leave_out(self, first: float) -> float:
        """Let no request in for a while, `first` seconds or twice the last while, and then one. Returns the seconds."""
        self._rest = min(max(first, 2 * self._rest), LONGEST_PAUSE)
        self.width = 1.0
        self.pause(self._rest)
        return self._rest


D = TypeVar("D", bound=Door)


class Gate(Generic[D]):
    """The doors of all endpoints, and who waits before them: a request takes the one with the most free slots.

    Once stopped, no request is let in, and waiting ones get the error as soon as nothing is in flight any more. Belongs
    to one event loop.
    """

    def __init__(self, doors: Sequence[D]):
        self.doors = doors
        self.peak = 0
        self.stopped: UserError | None = None
        self._waiting: list[asyncio.Future] = []

    @property
    def in_flight(self) -> int:
        return sum(door.in_flight for door in self.doors)

    async def enter(
        self,
        reserve: Callable[[], UserError | None],
        not_before: float = 0.0,
        only: D | None = None,
        rather_not: D | None = None,
    ) -> tuple[D, float]:
        """Wait for a slot and take it; returns its door and the loop's time. `leave` gives it back.

        reserve: called when a slot is free. If it returns an error, requests in flight are waited for, since they may
        cost less than was reserved; if there are none, the gate stops with that error. not_before: on the loop's clock.
        only: the door to take; rather_not: one to take only where all others are shut.
        """
        clock = asyncio.get_running_loop().time
        doors = self.doors if only is None else [only]
        while True:
            await self.check()
            now = clock()
            wanted = [door for door in doors if door is not rather_not and door.opens_at <= now] or doors
            door = max(wanted, key=lambda door: door.free(now))
            if now >= not_before and door.free(now) > 0:
                error = reserve()
                if error is None:
                    break
                if not self.in_flight:
                    self.stop(error)
                    continue
            times = [at for at in (not_before, *(door.opens_at for door in doors)) if at > now]
            await self._change(min(times) - now if times else None)
        door.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        return door, clock()

    async def check(self) -> None:
        """Raise the error that stopped the gate, if any, once nothing is in flight."""
        while self.stopped is not None:
            if not self.in_flight:
                raise self.stopped
            await self._change(None)

    def leave(self, door: D) -> None:
        door.in_flight -= 1
        self._wake()

    def stop(self, error: UserError) -> None:
        self.stopped = self.stopped or error
        self._wake()

    async def _change(self, seconds: float | None) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await asyncio.wait([future], timeout=seconds)

    def _wake(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()
