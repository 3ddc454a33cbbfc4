"""When a request may be sent, and what a failed one means: the gate, the waits, the faults of an endpoint.

Leaves out the sending itself (synth/teacher/client.py).

    python -m pytest tests/test_teacher.py -k "gate or wait or fault"
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

from openai import APIConnectionError, APIStatusError, APITimeoutError

from common.errors import UserError

LONGEST_BACKOFF = 60.0  # seconds
LONGEST_PAUSE = 600.0  # seconds; an endpoint that asks for more ends the run
QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
FILTER_CODES = {"content_filter", "content_policy_violation"}
AGAIN = {408, 409, 425, 429}  # and 5xx
CROWDED = {429, 503}


class Fault(Exception):
    """A request that brought no answer. kind:

    "again": a retry may help; "crowded": so too, at a slower pace; "request": this request will never do;
    "refusal": the endpoint's filter declined it; "form": it may do in another form; "fatal": no request will do.
    wait: seconds the endpoint asked for, or None.
    """

    def __init__(self, kind: str, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.kind, self.reason, self.wait = kind, reason, wait


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by Retry-After (seconds or an HTTP date, RFC 9110, 10.2.3) or retry-after-ms; None: not said.

    now: seconds since the epoch.
    """
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        text = headers.get("retry-after", "")
        if text.strip().replace(".", "", 1).isdecimal():
            return float(text)
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError):
        return None


def backoff(attempt: int, base: float, asked: float | None = None) -> float:
    """Seconds before the next attempt, with full jitter: uniform in [0, base · 2^attempt], at most a minute.

    asked: what the endpoint asked for; the wait is then that much and a jitter of at most `base`, so that those
    who wait for the same moment do not come all at once.
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
    codes = {error.code, error.type, body.get("code"), body.get("type")}
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
            return Fault("fatal", f"{reason}; it asks to wait {wait:.0f} s: start again then")
        return Fault("crowded" if status in CROWDED else "again", reason, wait)
    return Fault("request", reason)


def _line(error: object) -> str:
    """At most 200 characters on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


class Gate:
    """Lets at most `bound` requests through at once, fewer while the endpoint is crowded.

    The width is halved when the endpoint says so (once for all requests that were sent before the last halving)
    and grows by 1 for every `width` answers. Once stopped, nobody is let in, and those who wait get the error as
    soon as nothing is in flight any more. Belongs to one event loop.
    """

    def __init__(self, bound: int):
        self.bound, self.width = bound, float(bound)
        self.in_flight = self.peak = 0
        self.stopped: UserError | None = None
        self._halved_at = self._opens_at = 0.0
        self._waiting: list[asyncio.Future] = []

    async def enter(self, reserve: Callable[[], UserError | None], not_before: float = 0.0) -> float:
        """Wait for a place and take it; returns the loop's time. `leave` gives it back.

        reserve: called when there is a place. If it returns an error, what is in flight is waited for, since it may
        cost less than was reserved; if nothing is, the gate stops with that error. not_before: on the loop's clock.
        """
        clock = asyncio.get_running_loop().time
        while True:
            await self.check()
            pause = max(self._opens_at, not_before) - clock()
            if pause <= 0 and self.in_flight < int(self.width):
                error = reserve()
                if error is None:
                    break
                if not self.in_flight:
                    self.stop(error)
                    continue
            await self._change(pause if pause > 0 else None)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        return clock()

    async def check(self) -> None:
        """Raise the error that stopped the gate, if any did, once nothing is in flight."""
        while self.stopped is not None:
            if not self.in_flight:
                raise self.stopped
            await self._change(None)

    def leave(self) -> None:
        self.in_flight -= 1
        self._wake()

    def answered(self) -> None:
        self.width = min(self.bound, self.width + 1 / self.width)

    def crowded(self, entered: float) -> None:
        """A request that entered at this time was turned away."""
        if entered >= self._halved_at:
            self.width = max(1.0, self.width / 2)
            self._halved_at = asyncio.get_running_loop().time()

    def pause(self, seconds: float) -> None:
        """Let nobody in for so long: the endpoint asked for it."""
        self._opens_at = max(self._opens_at, asyncio.get_running_loop().time() + seconds)

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
