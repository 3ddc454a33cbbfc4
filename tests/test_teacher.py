"""The teacher against a server that fails in every way: the run ends, nothing is lost, the counts are right."""

import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from pydantic import BaseModel, Field, field_validator

from common.errors import UserError
from common.parser import Parser
from synth.chat_api import SAMPLE_HEADER, count_tokens
from synth.teacher import client, structured
from synth.teacher.address import OPENAI_URL
from synth.teacher.cache import Cache
from synth.teacher.client import EndpointDown, Teacher
from synth.teacher.completions import Ask, read_completion
from synth.teacher.flags import TeacherSettings, add_teacher_flags, teacher_from_mapping
from synth.teacher.limits import Cost, LimitReached, Limits
from synth.teacher.pace import LONGEST_BACKOFF, Door, Gate, backoff, retry_after
from tests.faulty_server import FaultyServer, completion, error

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-secret-0123456789"
# What each fault ends in where it stays.
FINAL = {
    "apology": "refusal",
    "refusal": "refusal",
    "filter": "refusal",
    "400 filter": "refusal",
    "truncated": "truncated",
    "empty": "empty",
    "400": "failed",
}
PASSING = ["429", "429 seconds", "500", "503", "drop", "half"]
PASSING += ["html", "broken json", "no choices", "null choice", "list"]
RETRIES = 2


class Item(BaseModel):
    question: str = Field(description="asked")
    answer: int = 0

    @field_validator("answer")
    @classmethod
    def small(cls, value):
        if value > 99:
            raise ValueError("too large")
        return value


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def say(text, **more):
    return Ask([{"role": "user", "content": text}], **more)


def content(body):
    return body["messages"][0]["content"]


def ask_all(url, asks, path, **options):
    """The replies and the teacher, after one run."""
    teacher = None

    async def main():
        nonlocal teacher
        with Cache(path) as cache:
            async with Teacher(url, "m", cache, **{"base_wait": 0.005, "timeout": 10.0, **options}) as teacher:
                return await teacher.ask_all(asks)

    return asyncio.run(main()), teacher


def test_replies_come_in_order_and_only_once(tmp_path):
    asks = [say(f"q{index % 7}", sample=index // 7, stage="vote") for index in range(20)]
    with FaultyServer(latency=0.01) as server:
        replies, teacher = ask_all(server.url, asks, tmp_path / "c", concurrency=5)
        assert [reply.text for reply in replies] == [f"answer to q{index % 7}" for index in range(20)]
        assert {(reply.status, reply.cached, reply.usage) for reply in replies} == {("ok", False, Cost(10, 5))}
        assert server.calls == teacher.ledger.total.calls == 20
        assert 1 < server.peak <= 5 and teacher.gate.peak <= 5
        again, second = ask_all(server.url + "/", asks, tmp_path / "c", concurrency=5)
        assert [reply._replace(cached=False) for reply in again] == replies and all(reply.cached for reply in again)
        assert server.calls == 20 and second.ledger.as_dict()["vote"]["cached"] == 20
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in server.bodies} == {(1.0, 1024, "m")}


def test_asks_are_made_as_slots_get_free(tmp_path):
    """Of many asks only those in progress exist, and of replies none that was taken."""
    made: list[int] = []
    taken: list[tuple[int, str]] = []
    ahead: list[int] = []

    def asks():
        for index in range(40):
            made.append(index)
            yield say(f"q{index % 30}", sample=index)

    def take(number, reply):
        ahead.append(len(made) - len(taken))
        taken.append((number, reply.text))

    async def main(url):
        with Cache(tmp_path / "c") as cache:
            async with Teacher(url, "m", cache, concurrency=5) as teacher:
                await teacher.ask_each(asks(), take)

    with FaultyServer(latency=0.01) as server:
        asyncio.run(main(server.url))
    assert sorted(taken) == [(index, f"answer to q{index % 30}") for index in range(40)]
    assert max(ahead) == 5


def test_the_sample_index_goes_along_as_a_header_only(tmp_path):
    """A server that does not know it sees the request it would have seen."""
    with FaultyServer() as server:
        ask_all(server.url, [say("q", sample=sample) for sample in range(3)], tmp_path / "c")
        assert sorted(headers[SAMPLE_HEADER] for headers in server.headers) == ["0", "1", "2"]
        assert [set(body) for body in server.bodies] == [{"model", "messages", "temperature", "max_tokens"}] * 3


def test_equal_asks_at_once_make_one_call(tmp_path):
    with FaultyServer(latency=0.05) as server:
        replies, _ = ask_all(server.url, [say("q")] * 6, tmp_path / "c")
        assert server.calls == 1 and [reply.cached for reply in replies].count(False) == 1


def test_a_faulty_teacher_loses_nothing(tmp_path):
    """Every fault, once, twice, or for good, all at the same time; then once more, by a teacher that is well."""
    times = {f"{name} x{count}": min(count, RETRIES + 1) for name in PASSING for count in (1, 2, 99)}
    times |= {"429 date x1": 1, "slow x1": 1, "ok x0": 0}
    final = {text: "ok" if count <= RETRIES else "failed" for text, count in times.items()}
    final |= {f"{name} x99": status for name, status in FINAL.items()}
    calls = {text: min(times.get(text, 0), RETRIES) + 1 for text in final}

    def plan(body, seen):
        name, count = content(body).rsplit(" x", 1)
        return name if seen < int(count) else "ok"

    asks = [say(text, stage="s") for text in final]
    with FaultyServer(plan) as server:
        options = {"retries": RETRIES, "breaker": 1000, "concurrency": 16, "timeout": 2.0}
        replies, teacher = ask_all(server.url, asks, tmp_path / "c", **options)
        found = {content(vars(ask)): reply.status for ask, reply in zip(asks, replies, strict=True)}
        assert found == final, [reply for reply in replies if reply.status == "failed"]
        assert {content(body): server.seen[json.dumps(body["messages"])] for body in server.bodies} == calls
        total = teacher.ledger.total
        assert total.calls == server.calls == sum(calls.values()) and total.retries == server.calls - len(asks)
        # A completion counts 10 + 5 tokens; the 400 of a filter, and what never came, count none.
        completed = [text for text, status in final.items() if status != "failed" and text != "400 filter x99"]
        assert total.tokens == 15 * len(completed) == sum(reply.usage.tokens for reply in replies)
        assert server.peak <= 16
        for reply in replies:
            assert (reply.reason == "") == (reply.status == "ok") and "\n" not in reply.reason

        before, server.plan = server.calls, lambda body, seen: "ok"
        again, _ = ask_all(server.url, asks, tmp_path / "c")
        failed = [status == "failed" for status in final.values()]
        assert server.calls - before == sum(failed) == len(PASSING) + 1  # nothing else is asked for again
        for first, second, lost in zip(replies, again, failed, strict=True):
            assert second.status == "ok" if lost else second == first._replace(cached=True)
    with Cache(tmp_path / "c") as cache:
        assert cache.counts() == {"ok": len(asks) - 6, "refusal": 4, "truncated": 1, "empty": 1}


def test_a_time_out_that_stays_ends(tmp_path):
    server, replies, _ = items("slow", [say("q")], tmp_path / "c", timeout=0.2, retries=1)
    assert server.calls == 2 and (replies[0].status, replies[0].reason) == ("failed", "no answer in time")


def items(plan, asks, path, **options):
    with FaultyServer(plan) as server:
        replies, teacher = ask_all(server.url, asks, path, endpoint="test", **options)
    return server, replies, teacher


def native(body):
    return "response_format" in body


def test_a_schema_that_is_obeyed_is_sent_and_found_out_once(tmp_path):
    def plan(body, seen):
        assert native(body)
        return completion('{"waves": 3}') if "waves" in json.dumps(body["response_format"]) else "json"

    asks = [say(f"q{index}", schema=Item) for index in range(4)]
    server, replies, teacher = items(plan, asks, tmp_path / "c")
    assert [reply.parsed for reply in replies] == [Item(question="What is 1 + 1?", answer=2)] * 4
    assert server.calls == 5 and teacher.ledger.stages["probe"].calls == 1
    sent = server.bodies[-1]["response_format"]["json_schema"]
    assert sent["strict"] and sent["schema"]["required"] == ["question", "answer"]
    assert sent["schema"]["additionalProperties"] is False and "default" not in json.dumps(sent)
    server, _, _ = items(plan, [say("other", schema=Item)], tmp_path / "c")
    assert server.calls == 1  # the probe's result was stored


@pytest.mark.parametrize("probe", ["400", "prose", "truncated", "refusal"])
@pytest.mark.parametrize("answer", ["json", "fenced", "repairable"])
def test_without_support_the_schema_is_in_the_prompt(tmp_path, probe, answer):
    def plan(body, seen):
        return probe if native(body) else answer

    server, replies, _ = items(plan, [say("q", schema=Item)], tmp_path / "c")
    assert replies[0].status == "ok" and replies[0].parsed.answer == 2
    assert [native(body) for body in server.bodies] == [True, False]
    assert '"description": "asked"' in content(server.bodies[1]) and content(server.bodies[1]).startswith("q\n")


def test_one_schema_that_is_declined_goes_into_the_prompt(tmp_path):
    def plan(body, seen):
        if "waves" in json.dumps(body):
            return completion('{"waves": 3}')
        return "400" if native(body) else "json"

    asks = [say(f"q{index}", schema=Item) for index in range(3)]
    server, replies, _ = items(plan, asks, tmp_path / "c", concurrency=1)
    assert {reply.status for reply in replies} == {"ok"}
    assert [native(body) for body in server.bodies] == [True, True, False, False, False]


@pytest.mark.parametrize(("second", "status", "stored"), [
    ("json", "ok", {"malformed": 1, "ok": 1}), ("prose", "malformed", {"malformed": 2}),
    ("apology", "refusal", {"malformed": 1, "refusal": 1}),
])  # fmt: skip
def test_a_malformed_answer_gets_one_correction_turn(tmp_path, second, status, stored):
    def plan(body, seen):
        if native(body):
            return "400"
        return "wrong type" if len(body["messages"]) == 1 else second

    server, replies, _ = items(plan, [say("q", schema=Item)], tmp_path / "c")
    assert replies[0].status == status and (replies[0].parsed is not None) == (status == "ok")
    assert server.calls == 3 and replies[0].usage == Cost(20, 10)
    turns = server.bodies[-1]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert "answer: Input should be a valid integer" in turns[-1]["content"]
    with Cache(tmp_path / "c") as cache:
        assert cache.counts() == stored
    server, again, _ = items("500", [say("q", schema=Item)], tmp_path / "c")
    assert server.calls == 0 and again == [replies[0]._replace(cached=True)]


def test_the_classs_own_checks_count(tmp_path):
    plan = lambda body, seen: "400" if native(body) else completion('{"question": "a", "answer": 100}')  # noqa: E731
    _, replies, _ = items(plan, [say("q", schema=Item)], tmp_path / "c")
    assert replies[0].status == "malformed" and "too large" in replies[0].reason


def test_an_answer_without_usage_is_guessed_and_half_a_character_is_kept_out(tmp_path):
    answer = {**completion("a" * 40 + "\ud800"), "usage": None}
    _, replies, teacher = items(answer, [say("q" * 8)], tmp_path / "c")
    assert replies[0].text == "a" * 40 + "?" and replies[0].usage == Cost(6, 14)
    assert teacher.ledger.total.tokens == 20


def test_content_in_parts_is_joined(tmp_path):
    answer = completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    assert items(answer, [say("q")], tmp_path / "c")[1][0].text == "ab"


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't assist with that.", True),
        ("I’m really sorry, I cannot help with this request.", True),
        ("As an AI language model, I am unable to provide medical advice.", True),
        ("Unfortunately, I won't be able to write that.", True),
        ("Sorry", False),
        ("I cannot find a mistake, so the answer is 7.", False),
        ("The clerk said: I'm sorry, I can't help you.", False),
        ("I'm sorry, but I can't help. " + "Still, here is a worked answer. " * 20, False),
        ("0", False),
    ],
)
def test_only_a_short_apology_is_a_refusal(text, refused):
    assert structured.is_refusal(text) is refused


@pytest.mark.parametrize(
    "text",
    [
        '{"question": "```a```", "answer": 1}',
        '```\n{"question": "```a```", "answer": 1}\n```',
        '<think>{"question": "no"}</think>{"question": "```a```", "answer": 1}',
        'Sure:\n```json\n{"question": "```a```", "answer": "1",}\n```\nEnjoy',
    ],
)
def test_json_is_read_out_of_what_stands_round_it(text):
    assert structured.read_json_answer(text, Item)[0] == Item(question="```a```", answer=1)


def test_half_a_surrogate_pair_becomes_a_question_mark():
    text = '{"question": "a\\ud800b", "answer": 1}'
    assert structured.read_json_answer(text, Item)[0] == Item(question="a?b", answer=1)
    response = {"choices": [{"message": {"content": "a\ud800b"}, "finish_reason": "stop"}]}
    assert read_completion(response, Ask([], None), str).text == "a?b"


@pytest.mark.parametrize("text", ["", "42", "no", "[]", "[1]", '{"answer": 1}', "{" * 5000, "__import__('os')"])
def test_other_json_is_malformed_with_a_reason(text):
    parsed, reason = structured.read_json_answer(text, Item)
    assert parsed is None and reason and "\n" not in reason


@pytest.mark.parametrize("given", [math.nan, math.inf, -(10**10), 10**400, 10**10, True, "12", None, [1], {}])
def test_usage_that_is_no_number_of_tokens_is_guessed(given):
    """Limits bind by it: NaN or a negative number would lift them."""
    response = {"choices": [{"message": {"content": "four words of answer"}}]}
    guessed = read_completion(response, Ask([{"content": "q"}], None), str)
    usage = {"prompt_tokens": given, "completion_tokens": given}
    assert read_completion({**response, "usage": usage}, Ask([{"content": "q"}], None), str) == guessed
    assert guessed.prompt_tokens > 0 and guessed.completion_tokens > 0


@pytest.mark.parametrize("code", [{"a": 1}, [1], 5, None])
def test_an_error_code_may_be_anything(tmp_path, code):
    _, replies, _ = items(lambda body, seen: error(400, "no", code), [say("0")], tmp_path / "c")
    assert replies[0].status == "failed" and "HTTP 400: no" in replies[0].reason


@pytest.mark.parametrize("url", [
    "http://127.0.0.1:99999/v1", "http://127.0.0.1:abc/v1", "http://127.0.0.1:0/v1", "http://[::1/v1", "http://a b/v1",
    "http://a..b/v1", f"http://{'a' * 64}/v1", "http://a\u2100b/v1", "http://\ud800/v1", "http://:80/v1", "http://x/v1\0",
    "ftp://x/v1", "x", "",
])  # fmt: skip
def test_an_address_that_is_none_is_refused(tmp_path, url):
    with Cache(tmp_path / "c") as cache, pytest.raises(UserError, match="is not of the form http://HOST:PORT/v1"):
        Teacher(url, "m", cache)
    with pytest.raises(UserError, match="is not of the form"):
        TeacherSettings(teacher_url=url or "x").check()


def test_what_a_run_cannot_begin_with_is_found_before_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    (tmp_path / "text").write_text("no cache")
    wrong: dict[str, dict] = {
        "characters that no header can": {"teacher_url": "http://x/v1"},
        "unable to open database": {"cache": str(tmp_path)},
        "cannot be used": {"cache": str(tmp_path / "text")}, "--concurrency is 0": {"concurrency": 0},
        "limit or price tokens": {"max_tokens": -1}, "--timeout is nan": {"timeout": math.nan},
    }  # fmt: skip
    for said, settings in wrong.items():
        with pytest.raises(UserError, match=said):
            TeacherSettings(**settings).check()
    TeacherSettings(cache=str(tmp_path / "new" / "c")).check()
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


NOW = 1_000_000_000.0


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": formatdate(NOW + 30, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(NOW - 30, usegmt=True)}, 0.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({}, None),
    ],
)
def test_the_wait_an_endpoint_asks_for_is_read(headers, wait):
    assert retry_after(headers, NOW) == wait


def test_the_wait_has_full_jitter_and_a_cap():
    random.seed(0)
    for attempt, most in ((0, 2.0), (3, 16.0), (9, LONGEST_BACKOFF)):
        waits = [backoff(attempt, 2.0) for _ in range(2000)]
        assert max(waits) <= most and min(waits) < 0.01 * most
        assert sum(waits) / 2000 == pytest.approx(most / 2, rel=0.05)
    asked = [backoff(5, 2.0, 7.0) for _ in range(2000)]
    assert min(asked) >= 7.0 and 8.9 < max(asked) <= 9.0


def test_the_wait_asked_for_is_kept_by_all(tmp_path):
    """After one request was turned away, none but those under way are sent before the time is up."""
    asked = error(429, "slow down", Retry_After="0.5")
    times = []

    def plan(body, seen):
        times.append(time.monotonic())
        if content(body) == "0" and not seen:
            return asked
        time.sleep(0.15)  # the others come back after that one
        return "ok"

    with FaultyServer(plan) as server:
        replies, _ = ask_all(server.url, [say(str(index)) for index in range(12)], tmp_path / "c", concurrency=4)
    assert {reply.status for reply in replies} == {"ok"} and len(times) == 13
    assert sum(moment - times[0] < 0.5 for moment in times) <= 4


def test_the_gate_is_halved_once_a_wave_and_grows_by_one_a_round():
    async def main():
        door = Door(8)
        gate = Gate([door])
        _, entered = await gate.enter(lambda: None)
        for _ in range(5):
            door.crowded(entered)
        assert door.width == 4
        _, entered = await gate.enter(lambda: None)
        door.crowded(entered)
        assert door.width == 2
        for _ in range(2):
            door.answered()
        assert 2.8 < door.width < 3
        for _ in range(100):
            door.answered()
        assert door.width == 8
        for _ in range(9):
            door.crowded(asyncio.get_running_loop().time())
        assert door.width == 1

    asyncio.run(main())


def test_a_crowded_endpoint_is_asked_less_at_once(tmp_path):
    """It serves 3 at once and turns the others away: the gate narrows and nothing is lost."""

    def plan(body, seen):
        return "429" if server.in_flight > 3 else "ok"

    asks = [say(str(index)) for index in range(80)]
    with FaultyServer(plan, latency=0.01) as server:
        replies, teacher = ask_all(server.url, asks, tmp_path / "c", concurrency=16, base_wait=0.05, retries=20)
    assert {reply.status for reply in replies} == {"ok"}
    assert teacher.endpoints[0].width < 16 and teacher.ledger.total.retries < 160


def stopped(plan, asks, path, kind, **options):
    with FaultyServer(plan, latency=options.pop("latency", 0.0)) as server, pytest.raises(UserError) as error:
        ask_all(server.url, asks, path, endpoint="test", **options)
    assert type(error.value) is kind and "\n" not in str(error.value)
    return server, str(error.value)


@pytest.mark.parametrize(
    ("behaviour", "word"), [("quota", "quota"), ("404", "/v1"), ("429 long", "86400 s"), (error(401, "bad key"), "key")]
)
def test_what_no_retry_mends_stops_at_once(tmp_path, behaviour, word):
    asks = [say(str(index)) for index in range(50)]
    server, text = stopped(behaviour, asks, tmp_path / "c", EndpointDown, concurrency=2)
    assert server.calls <= 2 and word in text


@pytest.mark.parametrize("behaviour", ["500", "drop", "html", "429"])
def test_an_endpoint_that_is_down_ends_the_run(tmp_path, behaviour):
    asks = [say(str(index)) for index in range(500)]
    server, text = stopped(behaviour, asks, tmp_path / "c", EndpointDown, concurrency=4, breaker=5, base_wait=0.001)
    assert 20 <= server.calls <= 24 and "in a row" in text


def test_one_bad_request_in_a_long_run_stops_nothing(tmp_path):
    def plan(body, seen):
        return "500" if content(body) == "3" else "ok"

    _, replies, _ = items(plan, [say(str(index)) for index in range(9)], tmp_path / "c", concurrency=1)
    assert [reply.status for reply in replies] == ["ok"] * 3 + ["failed"] + ["ok"] * 5


def test_no_server_at_all_is_one_line(tmp_path):
    with pytest.raises(EndpointDown, match="connection failed"):
        ask_all("http://127.0.0.1:9/v1", [say(str(i)) for i in range(9)], tmp_path / "c", breaker=2, base_wait=0.001)


def test_a_model_that_wants_max_completion_tokens_gets_them(tmp_path):
    asked = error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
    plan = lambda body, seen: asked if "max_tokens" in body else "ok"  # noqa: E731
    server, replies, _ = items(plan, [say(str(i)) for i in range(40)], tmp_path / "c", concurrency=20)
    assert {reply.status for reply in replies} == {"ok"} and server.calls <= 60
    server, _, _ = items(plan, [say("more")], tmp_path / "c")
    assert server.calls == 1


@pytest.mark.parametrize(
    ("limits", "calls"),
    [
        (Limits(calls=7), 7),
        # Each call is reserved at 5 + 20 tokens (a prompt of 4 characters) and costs 10 + 5.
        (Limits(tokens=115), 7),
        (Limits(money=115e-6, price_in=1.0, price_out=1.0), 7),
        (Limits(money=1.0, price_out=5e4), 1),
        (Limits(calls=0), 0),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_limit_stops_after_what_is_in_flight_is_stored(tmp_path, limits, calls, concurrency):
    asks = [say(f"{index:04}", max_tokens=20) for index in range(30)]
    options = {"limits": limits, "concurrency": concurrency, "latency": 0.01}
    server, text = stopped("ok", asks, tmp_path / "c", LimitReached, **options)
    assert server.calls == calls and f"after {calls} calls" in text
    with Cache(tmp_path / "c") as cache:
        assert cache.counts().get("ok", 0) == calls


def test_a_limit_counts_retries_and_not_the_cache(tmp_path):
    asks = [say(str(index), stage="s") for index in range(3)]
    plan = lambda body, seen: "ok" if seen else "500"  # noqa: E731
    options = {"limits": Limits(calls=5), "concurrency": 1}
    server, text = stopped(plan, asks, tmp_path / "c", LimitReached, **options)
    assert server.calls == 5 and "(2 retries)" in text
    server, replies, _ = items("ok", asks, tmp_path / "c", limits=Limits(calls=1))
    assert server.calls == 1 and [reply.cached for reply in replies] == [True, True, False]


@pytest.mark.parametrize("limit", [5, None])
def test_separate_asks_too_are_stored_before_a_stop_is_raised(tmp_path, limit):
    """asyncio.run cancels what is left after an error: by then nothing may be in flight."""

    async def main(url):
        with Cache(tmp_path / "c") as cache:
            async with Teacher(url, "m", cache, Limits(calls=limit)) as teacher:
                await asyncio.gather(*(teacher.ask([{"role": "user", "content": str(i)}]) for i in range(9)))

    def plan(body, seen):
        if limit is None and content(body) == "2":
            return "404"
        time.sleep(0.2)
        return "ok"

    with FaultyServer(plan) as server, pytest.raises(UserError) as error:
        asyncio.run(main(server.url))
    assert type(error.value) is (EndpointDown if limit is None else LimitReached)
    with Cache(tmp_path / "c") as cache:
        assert cache.counts() == {"ok": limit or server.calls - 1} and server.calls > 3


def test_the_estimate_is_what_is_then_spent_at_most(tmp_path):
    asks = [say("x" * 400, sample=index, max_tokens=20) for index in range(6)]
    with FaultyServer() as server:
        ask_all(server.url, asks[:2], tmp_path / "c")
        with Cache(tmp_path / "c") as cache:
            teacher = Teacher(server.url, "m", cache, Limits(price_in=2.0, price_out=10.0))
            found = teacher.estimate([*asks, asks[0]])
            assert found == (4, 2, 4 * 104, 80, pytest.approx((416 * 2 + 80 * 10) / 1e6))
            assert teacher.estimate([say("q", schema=Item)]).calls == 2  # and the probe
            assert teacher.estimate([]) == (0, 0, 0, 0, 0.0)
        assert server.calls == 2
    assert count_tokens([{"content": "ä" * 6}]) == 7


def test_the_ledger_counts_by_stage(tmp_path):
    asks = [say("a", stage="one"), say("b", stage="one"), say("c", stage="two")]
    _, _, teacher = items("ok", asks, tmp_path / "c", limits=Limits(price_in=1.0, price_out=2.0))
    rows = teacher.ledger.as_dict()
    assert (rows["one"]["calls"], rows["two"]["calls"], rows["total"]["calls"]) == (2, 1, 3)
    assert rows["total"]["money"] == pytest.approx(3 * 20e-6) and rows["total"]["prompt_tokens"] == 30
    json.dumps(rows)


@pytest.mark.parametrize(
    "plan",
    [error(401, f"Incorrect API key: {KEY}"), error(400, f"no {KEY}"), completion(f"your key is {KEY}"),
     error(500, KEY * 9), completion("", refusal=KEY)],
)  # fmt: skip
def test_the_key_occurs_nowhere_but_in_the_request(tmp_path, plan, capfd, caplog):
    caplog.set_level("DEBUG")
    said = []
    with FaultyServer(plan) as server:
        try:
            replies, teacher = ask_all(server.url, [say("q")], tmp_path / "c", retries=1)
            said += [str(replies), str(teacher.ledger.as_dict())]
        except UserError as error:
            said += [str(error), repr(error), repr(error.__cause__)]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    said += [*capfd.readouterr(), caplog.text]
    assert said[0] and not [text for text in said if KEY[:12] in text]
    for path in tmp_path.rglob("*"):
        assert KEY.encode()[:12] not in path.read_bytes()


def test_the_key_is_looked_for_under_the_name_given(tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "other-key-of-mine")
    server, _, _ = items("ok", [say("q")], tmp_path / "c", key_name="OTHER_KEY")
    assert server.headers[0]["Authorization"] == "Bearer other-key-of-mine"
    monkeypatch.delenv("OPENAI_API_KEY")
    with Cache(tmp_path / "c") as cache, pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        Teacher(OPENAI_URL, "m", cache)


@pytest.mark.parametrize("url", ["localhost:80", "ftp://a/v1", "", "http://me:word@a/v1", "http://a/v1?key=word"])
def test_a_wrong_url_is_one_line_without_its_secrets(tmp_path, url):
    with Cache(tmp_path / "c") as cache, pytest.raises(UserError) as error:
        Teacher(url, "m", cache)
    assert "word" not in str(error.value)


def test_a_limit_on_money_needs_prices():
    with pytest.raises(UserError, match="needs prices"):
        Limits(money=5.0)
    with pytest.raises(UserError, match="calls is -1"):
        Limits(calls=-1)


def test_a_cache_that_fails_stops_the_run(tmp_path, monkeypatch):
    def full(self, key, stored):
        raise UserError("disk full; make room")

    monkeypatch.setattr(Cache, "put", full)
    with FaultyServer() as server, pytest.raises(UserError, match="disk full"):
        ask_all(server.url, [say(str(index)) for index in range(40)], tmp_path / "c", concurrency=2)
    assert server.calls <= 2


def test_a_teacher_serves_one_event_loop(tmp_path):
    async def use(teacher):
        return await teacher.ask([{"role": "user", "content": "q"}])

    async def enter(teacher):
        return await teacher.__aenter__()

    with Cache(tmp_path / "c") as cache, FaultyServer() as server:
        teacher = asyncio.run(enter(Teacher(server.url, "m", cache)))
        with pytest.raises(RuntimeError, match="event loop"):
            asyncio.run(use(teacher))


CHILD = """
import asyncio, sys
from synth.teacher.cache import Cache
from synth.teacher.client import Ask, Teacher

async def main(url, path):
    with Cache(path) as cache:
        async with Teacher(url, "m", cache, concurrency=4) as teacher:
            done = lambda number, reply: print(reply.text, flush=True)
            await teacher.ask_each((Ask([{"role": "user", "content": str(i)}]) for i in range(40)), done)

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_kill_loses_at_most_what_was_in_flight(tmp_path):
    """Killed by the server in the midst of an answer, twice; what was reported as done is never asked for again."""
    child: subprocess.Popen[str]
    kills = {11, 29}

    def plan(body, seen):
        with server.lock:
            if server.calls in kills:
                kills.remove(server.calls)
                child.send_signal(signal.SIGKILL)
                child.wait()
        return "ok"

    reported: set[str] = set()
    with FaultyServer(plan, latency=0.002) as server:
        for code in (-signal.SIGKILL, -signal.SIGKILL, 0):
            before = {text: server.seen[text] for text in reported}
            with Cache(tmp_path / "c") as cache:
                missing = 40 - cache.counts().get("ok", 0)
            calls = server.calls
            command = [sys.executable, "-c", CHILD, server.url, str(tmp_path / "c")]
            child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
            lines = child.communicate()[0].splitlines()
            assert child.returncode == code
            for text, count in before.items():
                assert server.seen[text] == count
            reported = {json.dumps([{"role": "user", "content": line.split()[-1]}]) for line in lines if "to" in line}
    assert len(lines) == 40 and len(server.seen) == 40
    assert server.calls - calls == missing and 0 < server.calls - 40 <= 2 * 4


# --- several endpoints ---


def two(plans, path, asks, latencies=(0.0, 0.0), **options):
    """The servers, the replies and the teacher, after asking two endpoints at once."""
    with FaultyServer(plans[0], latencies[0]) as one, FaultyServer(plans[1], latencies[1]) as other:
        replies, teacher = ask_all(f"{one.url} {other.url}", asks, path, endpoint="test", **options)
    return (one, other), replies, teacher


def test_the_load_is_spread_by_free_slots_and_the_limit_holds_over_all(tmp_path):
    """One endpoint takes three times as long, so it gets about a third of what the other does; more, where what a call
    takes besides is slow, but not half of all."""
    asks = [say(str(index)) for index in range(120)]
    servers, replies, teacher = two(("ok", "ok"), tmp_path / "c", asks, latencies=(0.03, 0.09), concurrency=4)
    assert [reply.text for reply in replies] == [f"answer to {index}" for index in range(120)]
    assert [server.peak for server in servers] == [4, 4]
    assert [endpoint.calls for endpoint in teacher.endpoints] == [server.calls for server in servers]
    assert sum(server.calls for server in servers) == teacher.ledger.total.calls == 120
    assert 1.4 < servers[0].calls / servers[1].calls < 4.5
    with pytest.raises(LimitReached, match="after 10 calls"):
        two(("ok", "ok"), tmp_path / "other", asks, limits=Limits(calls=10))


@pytest.mark.parametrize("behaviour", ["500", "drop", "quota", "404"])
def test_an_endpoint_that_fails_is_left_out_and_the_answers_are_the_others(tmp_path, behaviour, capsys):
    asks = [say(str(index)) for index in range(200)]
    servers, replies, _ = two((behaviour, "ok"), tmp_path / "c", asks, concurrency=2, breaker=5)
    assert {reply.status for reply in replies} == {"ok"}
    assert servers[0].calls <= 3 + 2 and servers[1].calls == 200  # what was in flight when it was left out
    assert f"{servers[0].url} is left out for" in capsys.readouterr().out
    with Cache(tmp_path / "c") as cache:
        assert cache.counts() == {"ok": 200}


def test_one_that_was_left_out_is_tried_again_and_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "SHORT_REST", 0.05)
    asks = [say(str(index)) for index in range(150)]

    def plan(body, seen):
        return "500" if first.calls <= 4 else "ok"

    with FaultyServer(plan, 0.005) as first, FaultyServer("ok", 0.01) as second:
        replies, teacher = ask_all(f"{first.url} {second.url}", asks, tmp_path / "c", concurrency=2)
    assert {reply.status for reply in replies} == {"ok"}
    assert first.calls > 30 and teacher.endpoints[0].width == 2  # the faster one, once it is well


def test_where_all_endpoints_fail_the_run_ends(tmp_path):
    asks = [say(str(index)) for index in range(500)]
    with pytest.raises(EndpointDown, match="in a row"):
        two(("500", "500"), tmp_path / "c", asks, concurrency=2, breaker=5, base_wait=0.001)


def test_each_endpoint_is_asked_in_the_form_that_it_takes(tmp_path):
    def plan(body, seen):
        return completion('{"waves": 3}') if "waves" in json.dumps(body.get("response_format", "")) else "json"

    def without(body, seen):
        return "400" if native(body) else "json"

    asks = [say(f"q{index}", schema=Item) for index in range(20)]
    servers, replies, _ = two((plan, without), tmp_path / "c", asks, latencies=(0.01, 0.01), concurrency=2)
    assert {reply.status for reply in replies} == {"ok"}
    assert all(map(native, servers[0].bodies)) and not any(map(native, servers[1].bodies[1:]))
    assert min(server.calls for server in servers) > 3
    again, _, _ = two((plan, without), tmp_path / "c", [say("new", schema=Item)], concurrency=2)
    assert sum(server.calls for server in again) == 2  # the first one's form is known; the second has a port of its own


def test_several_urls_are_flags_repeated_or_a_list(tmp_path):
    parser = Parser(None)
    add_teacher_flags(parser)
    first, second = "http://x:1/v1", "http://y:2/v1/"
    assert parser.parse_args(["--teacher-url", first, "--teacher_url", second]).teacher_url == f"{first} {second}"
    (tmp_path / "c.yaml").write_text(f"teacher-url: [{first}, {second}]\n", encoding="utf-8")
    read = parser.parse_args(["-c", str(tmp_path / "c.yaml")])
    assert read.teacher_url == f"{first} {second}"
    assert parser.parse_args(["-c", str(tmp_path / "c.yaml"), "--teacher-url", second]).teacher_url == second
    assert teacher_from_mapping({"teacher_url": [first, second]}) == TeacherSettings(teacher_url=f"{first} {second}")
    with pytest.raises(UserError, match="given twice"):
        TeacherSettings(teacher_url=f"{second} http://y:2/v1").check()
    with pytest.raises(UserError, match="not of the form"):
        TeacherSettings(teacher_url=f"{first} y:2").check()
