"""The teacher: one async client for any endpoint that speaks OpenAI's Chat Completions API.

Every response is committed to the cache (cache.py) before it is reported. Requests are bounded, paced and retried
(pace.py), counted and limited (limits.py), and read as JSON if a schema is given (structured.py, completions.py).
Streaming and tools are not supported.

    with Cache("runs/mine/cache.sqlite") as cache:
        async with Teacher("http://127.0.0.1:8080/v1", "default_model", cache) as teacher:
            reply = await teacher.ask([{"role": "user", "content": "What is 2 + 2?"}])
"""

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError
from pydantic import BaseModel

from common.errors import UserError
from synth.chat_api import SAMPLE_HEADER, count_tokens
from synth.teacher import structured
from synth.teacher.address import KEY_NAME, checked_urls, key_for
from synth.teacher.cache import Cache, Stored, cache_key
from synth.teacher.completions import Ask, Reply, read_completion
from synth.teacher.limits import Cost, Ledger, Limits
from synth.teacher.open_files import allow_connections
from synth.teacher.pace import LONGEST_PAUSE, Door, Fault, Gate, backoff, fault_of

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
PROBE_TOKENS = 1024  # some teachers think before they answer
RENAMED = "max_completion_tokens"  # what newer models of OpenAI call max_tokens
FEW = 3  # failures in a row that make an endpoint one to do without, where there are others
SHORT_REST = 10.0  # seconds that it is left out at first


class EndpointDown(UserError):
    """The endpoint refuses every request, or keeps failing; everything that was in flight is stored."""


class Estimate(NamedTuple):
    """What some asks may cost: prompt tokens roughly, completion tokens at most. Without retries and corrections."""

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    money: float


class Endpoint(Door):
    """One of a teacher's endpoints: where it is, how it is reached, and in which form it takes requests."""

    def __init__(self, url: str, concurrency: int, timeout: float, key: str, name: str):
        """name: by which the cache knows what was found out about it."""
        super().__init__(concurrency)
        self.url, self.name = url, name
        self.calls = 0
        self.probing = asyncio.Lock()
        self.native: bool | None = None  # whether it follows a JSON schema; None: not known
        self.not_native: set[type[BaseModel]] = set()  # schemas that it rejected
        self.renames_tokens = False  # whether max_tokens goes by the name RENAMED
        size = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        local = urlsplit(url).hostname in LOOPBACK  # a proxy from the environment could not reach it
        http = DefaultAsyncHttpxClient(limits=size, timeout=timeout, trust_env=not local)
        self.client = AsyncOpenAI(
            base_url=url, api_key=key or "none", max_retries=0, http_client=http, timeout=timeout
        )  # fmt: skip


class Teacher:
    """Asks one model, at one endpoint or several. Use it as an async context manager, within one event loop.

    url: up to and including `/v1`; several, separated by spaces, share the load by their free slots, and one that keeps
    failing is left out for a while. concurrency: maximum requests in flight, at each. retries: per request. timeout:
    seconds per attempt. breaker: consecutive failed attempts, per ask in progress, after which the last endpoint that
    is left counts as down. base_wait: seconds of the first backoff. key_name: the environment variable with the API key
    (local servers need none). endpoint: the name under which the cache knows all of them, if a port changes (default:
    the first URL). Raises UserError for a bad argument, LimitReached or EndpointDown, each once nothing is in flight
    any more.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: Cache,
        limits: Limits | None = None,
        concurrency: int = 8,
        retries: int = 6,
        timeout: float = 120.0,
        breaker: int = 10,
        base_wait: float = 1.0,
        key_name: str = KEY_NAME,
        endpoint: str | None = None,
    ):
        self.urls, self.model, self.cache = checked_urls(url), model, cache
        self.endpoint = endpoint or self.urls[0]
        self._names = [self.endpoint, *self.urls[1:]]  # by which the cache knows what was found out about each
        self.concurrency, self.retries, self.timeout = concurrency, retries, timeout
        self.breaker, self.base_wait = breaker, base_wait
        if concurrency < 1 or retries < 0 or timeout <= 0 or breaker < 1:
            raise UserError(
                f"concurrency {concurrency}, retries {retries}, timeout {timeout} and breaker {breaker}: "
                "they must be at least 1, at least 0, above 0 and at least 1"
            )
        self._keys = [key_for(url, key_name) for url in self.urls]
        self.ledger = Ledger(limits)

    async def __aenter__(self) -> "Teacher":
        allow_connections(self.concurrency * len(self.urls))
        self.endpoints = [
            Endpoint(url, self.concurrency, self.timeout, key, name)
            for url, key, name in zip(self.urls, self._keys, self._names, strict=True)
        ]
        for endpoint in self.endpoints:
            endpoint.native = self._noted(endpoint.name, "structured")
            endpoint.renames_tokens = bool(self._noted(endpoint.name, RENAMED))
        self.gate = Gate(self.endpoints)
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Semaphore(self.concurrency * len(self.urls))
        self._asking: dict[str, asyncio.Event] = {}
        self._active = 0  # asks in progress
        self._answered = False
        return self

    async def __aexit__(self, *_: Any) -> None:
        for endpoint in self.endpoints:
            await endpoint.client.close()

    async def ask(
        self,
        messages: list[dict],
        schema: type[BaseModel] | None = None,
        temperature: float = 1.0,
        max_tokens: int = 1024,
        sample: int = 0,
        stage: str = "",
    ) -> Reply:
        """One answer, from the cache or the endpoint; the arguments are those of `Ask`."""
        return await self._ask(Ask(messages, schema, temperature, max_tokens, sample, stage))

    async def ask_all(self, asks: Sequence[Ask]) -> list[Reply]:
        """The replies in the order of the asks."""
        replies: dict[int, Reply] = {}
        await self.ask_each(asks, replies.__setitem__)
        return [replies[number] for number in range(len(asks))]

    async def ask_each(self, asks: Iterable[Ask], take: Callable[[int, Reply], object]) -> None:
        """Call `take` with the number and reply of each ask, once it is stored. `asks` is read as slots get free."""
        waiting: Iterator[tuple[int, Ask]] = enumerate(asks)

        async def work() -> None:
            nonlocal waiting
            while (next_one := next(waiting, None)) is not None:
                number, ask = next_one
                try:
                    take(number, await self._ask(ask))
                except BaseException:
                    waiting = iter(())
                    raise

        workers = (work() for _ in range(self.concurrency * len(self.urls)))
        # Not a TaskGroup: it would cancel what is in flight, and that is paid for.
        for result in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def estimate(self, asks: Sequence[Ask]) -> Estimate:
        """What the asks would cost; those in the cache are counted separately. Sends nothing."""
        keys = {self._key_of(ask): ask for ask in asks}
        missing = [ask for key, ask in keys.items() if self.cache.get(key) is None]
        costs = [self._most(ask) for ask in missing]
        if any(ask.schema for ask in missing):
            probe = Ask(structured.PROBE_MESSAGES, structured.Probe, max_tokens=PROBE_TOKENS)
            costs += [self._most(probe) for name in self._names if self._noted(name, "structured") is None]
        cost = Cost(sum(c.prompt_tokens for c in costs), sum(c.completion_tokens for c in costs))
        return Estimate(len(costs), len(keys) - len(missing), *cost, self.ledger.limits.price(cost))

    async def _ask(self, ask: Ask) -> Reply:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("a Teacher belongs to the event loop it was entered in")
        async with self._begun:
            self._active += 1
            try:
                reply = await self._reply(ask)
                if reply.status != "malformed":
                    return reply
                again = replace(ask, messages=ask.messages + structured.correction(reply.text, reply.reason))
                second = await self._reply(again)
                both = Cost(*(a + b for a, b in zip(reply.usage, second.usage, strict=True)))
                return second._replace(usage=both, cached=reply.cached and second.cached)
            finally:
                self._active -= 1

    async def _reply(self, ask: Ask, only: Endpoint | None = None) -> Reply:
        """One response as a Reply, without a correction turn. only: the endpoint to ask."""
        key = self._key_of(ask, only)
        while key in self._asking:  # the same ask is in progress: its answer serves both
            await self._asking[key].wait()
        stored = self.cache.get(key)
        cached = stored is not None
        if stored is not None:
            self.ledger.found(ask.stage)
        else:
            self._asking[key] = asyncio.Event()
            try:
                unknown = [endpoint for endpoint in self.endpoints if endpoint.native is None]
                if ask.schema and unknown and ask.schema is not structured.Probe:
                    await asyncio.gather(*map(self._probe, unknown))
                stored = await self._fetch(ask, key, only)
            finally:
                self._asking.pop(key).set()
        status, reason, parsed = stored.status, stored.reason, None
        if ask.schema and status in ("ok", "malformed"):
            # Parsed again: the class may check more than its schema says, and may have changed since.
            parsed, reason = structured.read_json_answer(stored.text, ask.schema)
            status = "malformed" if parsed is None else "ok"
        return Reply(stored.text, parsed, status, Cost(stored.prompt_tokens, stored.completion_tokens), cached, reason)

    async def _fetch(self, ask: Ask, key: str, only: Endpoint | None) -> Stored:
        """An endpoint's answer, stored; or one of status "failed", which is not stored. only: the endpoint to ask."""
        fault, not_before = Fault("again", ""), 0.0
        failed: Endpoint | None = None  # the last one
        for attempt in range(1 if only and len(self.urls) > 1 else self.retries + 1):
            reserve = partial(self.ledger.reserve, ask.stage, self._most(ask), attempt > 0)
            endpoint, entered = await self.gate.enter(reserve, not_before, only, failed)
            try:
                return await self._attempt(ask, key, endpoint, entered)
            except Fault as error:
                fault, failed = error, endpoint if error.kind != "form" else None
            await self.gate.check()
            if fault.kind in ("again", "crowded"):
                not_before = self._loop.time() + backoff(attempt, self.base_wait, fault.wait)
            elif fault.kind != "form":
                break
        return Stored("", "failed", fault.reason, 0, 0)

    async def _attempt(self, ask: Ask, key: str, endpoint: Endpoint, entered: float) -> Stored:
        """Send once, through a gate that was entered, and store the answer. Raises Fault."""
        form = self._form(ask, endpoint)
        try:
            endpoint.calls += 1
            try:
                stored = read_completion(await self._post(form, ask.sample, endpoint), ask, self._safe)
            except Fault as fault:
                fault.reason = self._safe(fault.reason)
                if fault.kind != "refusal":
                    self._failed(fault, ask, form, endpoint, entered)
                    raise
                stored = Stored("", "refusal", fault.reason, 0, 0)
            self._answered = True
            endpoint.answered()
            self.ledger.receive(ask.stage, Cost(stored.prompt_tokens, stored.completion_tokens))
            self.cache.put(key, stored)
            return stored
        except UserError as error:  # from the cache: no point in paying for answers that cannot be kept
            self.gate.stop(error)
            raise
        finally:
            self.ledger.release(self._most(ask))
            self.gate.leave(endpoint)

    async def _post(self, form: dict, sample: int, endpoint: Endpoint) -> dict:
        """The response's JSON. Raises Fault.

        The package's own `create` takes a third longer per call, and returns a str for HTML with status 200.
        """
        try:
            # httpx's timeouts are between bytes, so a server that sends slowly would never reach one.
            async with asyncio.timeout(self.timeout):
                response = await endpoint.client.post(
                    "/chat/completions",
                    cast_to=httpx2.Response,
                    body=form,
                    options={"headers": {SAMPLE_HEADER: str(sample)}},
                )
            if response.content.lstrip()[:1] == b"<":
                raise Fault("again", "a web page instead of an answer (most URLs end in /v1)")
            found = json.loads(response.content)
        except (OpenAIError, TimeoutError, ValueError, RecursionError) as error:
            raise fault_of(error) from None
        if not isinstance(found, dict):
            raise Fault("again", f"the response is not a JSON object but a {type(found).__name__}")
        return found

    def _form(self, ask: Ask, endpoint: Endpoint) -> dict:
        """The request's body, in the form the endpoint accepts."""
        form = {"model": self.model, "messages": ask.messages, "temperature": ask.temperature}
        form[RENAMED if endpoint.renames_tokens else "max_tokens"] = ask.max_tokens
        form |= {"top_p": ask.top_p} if ask.top_p is not None else {}
        native = endpoint.native and ask.schema not in endpoint.not_native
        if ask.schema and (native or ask.schema is structured.Probe):
            form["response_format"] = structured.response_format(ask.schema)
        elif ask.schema:
            form["messages"] = structured.with_schema(ask.messages, ask.schema)
        return form

    async def _probe(self, endpoint: Endpoint) -> None:
        """Find out, once per endpoint and model, whether a JSON schema is accepted and followed."""
        async with endpoint.probing:
            if endpoint.native is not None:
                return
            ask = Ask(structured.PROBE_MESSAGES, structured.Probe, max_tokens=PROBE_TOKENS, stage="probe")
            status = (await self._reply(ask, endpoint)).status
            if status in ("ok", "malformed"):
                self._note(endpoint.name, "structured", status == "ok")
            endpoint.native = status == "ok"  # unknown counts as no, until the next start

    def _adapted(self, ask: Ask, form: dict, endpoint: Endpoint, fault: Fault) -> bool:
        """After a request was rejected: switch to another form of it if one may be accepted; whether there is one."""
        if "max_tokens" in form and RENAMED in fault.reason:
            endpoint.renames_tokens = True
            self._note(endpoint.name, RENAMED, True)
            return True
        if "response_format" not in form or ask.schema is None:
            return False
        if ask.schema is structured.Probe:
            self._note(endpoint.name, "structured", False)
            return False
        endpoint.not_native.add(ask.schema)
        return True

    def _failed(self, fault: Fault, ask: Ask, form: dict, endpoint: Endpoint, entered: float) -> None:
        """Change the form, slow down, leave the endpoint out, or stop, depending on how an attempt failed."""
        if fault.kind == "request" and self._adapted(ask, form, endpoint, fault):
            fault.kind = "form"
            return
        endpoint.failures += 1
        many = {"fatal": 1, "crowded": self.breaker}.get(fault.kind, FEW)
        if endpoint.failures >= many and any(e.failures < FEW for e in self.endpoints if e is not endpoint):
            seconds = endpoint.leave_out(LONGEST_PAUSE if fault.kind == "fatal" else max(SHORT_REST, fault.wait or 0))
            print(f"teacher: {endpoint.url} is left out for {seconds:.0f} s ({fault.reason})", flush=True)
            fault.kind = "again" if fault.kind == "fatal" else fault.kind
            return
        if fault.kind == "fatal":
            self.gate.stop(EndpointDown(f"{endpoint.url} refuses {self.model}: {fault.reason}"))
            return
        if fault.kind == "crowded":
            endpoint.crowded(entered)
        if fault.wait:
            endpoint.pause(fault.wait)
        # Before the first answer a rejected request is probably a wrong setting, which no other request will fix.
        each = 1 if fault.kind == "request" and not self._answered else max(1, self._active)
        if endpoint.failures >= self.breaker * each:
            self.gate.stop(
                EndpointDown(
                    f"{endpoint.url} failed {endpoint.failures} times in a row, most recently with: {fault.reason}; "
                    "check that it is running, then start again: nothing stored is asked for twice"
                )
            )

    def _most(self, ask: Ask) -> Cost:
        return Cost(count_tokens(ask.messages), ask.max_tokens)

    def _key_of(self, ask: Ask, only: Endpoint | None = None) -> str:
        parameters = {"temperature": ask.temperature, "max_tokens": ask.max_tokens}
        parameters |= (
            {"top_p": ask.top_p} if ask.top_p is not None else {}
        )  # only if it is sent, so that older keys stay valid
        schema = structured.schema_of(ask.schema) if ask.schema else None
        name = only.name if only else self.endpoint
        return cache_key(name, self.model, ask.messages, parameters, schema, ask.sample)

    def _noted(self, endpoint: str, name: str) -> bool | None:
        value = self.cache.note(f"{name} {endpoint} {self.model}")
        return None if value is None else value == "yes"

    def _note(self, endpoint: str, name: str, value: bool) -> None:
        self.cache.set_note(f"{name} {endpoint} {self.model}", "yes" if value else "no")

    def _safe(self, text: str) -> str:
        """Without the API key, if a server sends it back, and without lone surrogates, which UTF-8 cannot hold."""
        text = text.encode("utf-8", "replace").decode()
        for key in filter(None, self._keys):
            text = text.replace(key, "[key]")
        return text
