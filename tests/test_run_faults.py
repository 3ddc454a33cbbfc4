"""A whole run against a teacher that fails in every way: it ends, nothing is lost, and every count is right.

The faults hang on the question alone, so the same run against a teacher without the passing ones is the oracle.

    python -m pytest tests/test_run_faults.py
"""

import hashlib
import sys
from collections import Counter

import pytest

import synth.teacher.client
from common.files import read_json
from synth import run as module
from synth.chat_api import SAMPLE_HEADER
from synth.offline.server import OfflineTeacher
from synth.pipeline.pass_rates import BaseModelSettings
from synth.prompts import STAGES
from synth.stages import kept, load_rows
from synth.teacher.cache import Cache
from synth.teacher.pace import backoff
from tests.faulty_server import FaultyServer
from tests.scripts import call
from tests.test_difficulty import Adder

PASSING = ["429", "429 seconds", "429 date", "500", "503", "drop", "slow", "html", "broken json", "half", "no choices"]
PASSING += ["null choice", "list"]  # these fail once
LASTING = ("refusal", "apology", "filter", "truncated", "empty", "400", "400 filter")  # each the answer of its question
SPOILED = ("fenced", "prose", "prose twice")  # the teacher's own answer, dressed up, or given at the second asking only
REFUSED = ("refusal", "apology", "filter", "400 filter")
EXPECTED = {"truncated": "no sample: truncated", "empty": "no sample: empty", "400": "no sample: failed"}
EXPECTED = {**EXPECTED, **dict.fromkeys(REFUSED, "no sample: refusal"), "prose twice": "no sample: malformed"}
WORDS = ["--task", "synth/tasks/arithmetic.yaml", "--count", 40, "--votes", 4, "--rounds", 1, "--wanted", 16]
WORDS += ["--rollouts", 2, "--max-rollouts", 2, "--concurrency", 8, "--timeout", 2, "--teacher-model", "m"]
TABLES = ("generate", "verify", "pass_rates", "difficulty", "held_out", "selection")


class FailingTeacher(FaultyServer):
    """The offline teacher, where a third of all questions ends badly and, if `passing`, most fail once at first.

    fate: how each question ends; failed: attempts that brought no answer, by kind.
    """

    def __init__(self, passing):
        super().__init__(self.decide)
        self.passing, self.teacher = passing, OfflineTeacher()
        self.attempts: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[str] = Counter()
        self.fate: dict[str, str] = {}

    def answer(self, request, body):
        super().answer(request, {**body, "sample": request.headers.get(SAMPLE_HEADER)})

    def decide(self, body, seen):
        asked = [message["content"].partition("\n\nAnswer with one JSON object")[0] for message in body["messages"]]
        if len(asked) == 1:
            return "prose"  # to the probe: no schema is obeyed
        question = f"{body['sample']} {asked[0]} {asked[1]}"
        number = int(hashlib.sha256(question.encode()).hexdigest(), 16)
        turn = "second" if len(asked) > 2 else "first"
        with self.lock:
            attempt = self.attempts[question, turn]
            self.attempts[question, turn] += 1
        new = asked[0].startswith(STAGES["new_sample"])
        place = int(body["sample"]) if new else number // 100  # the first samples take one of each
        if self.passing and attempt == 0 and (new or number % 3):
            kind = PASSING[place % len(PASSING)]
            rare = kind in ("slow", "429 date") and not (new and place < len(PASSING))  # each costs a second
            kind = "500" if rare else kind
            self.failed[kind] += 1
            return kind
        fates = (*LASTING, *SPOILED, *["ok"] * 20)
        fate = fates[place % len(fates)]
        fate = "ok" if asked[0].startswith(STAGES["pattern"]) else fate
        self.fate[question] = fate
        if fate in LASTING:
            return fate
        found = self.teacher.complete({key: body[key] for key in ("messages", "model", "temperature")}, body["sample"])
        message = found["choices"][0]["message"]
        if fate == "fenced":
            message["content"] = f"Here it is:\n```json\n{message['content']}\n```\nDone."
        elif fate == "prose twice" or (fate == "prose" and turn == "first"):
            message["content"] = "It is simple, if one thinks about it."
        return found


@pytest.fixture
def quick(monkeypatch):
    """Short waits, a base model without weights, and no training."""
    client = synth.teacher.client
    monkeypatch.setattr(client, "backoff", lambda attempt, base, asked=None: backoff(attempt, 0.02, asked))
    monkeypatch.setattr(BaseModelSettings, "open", lambda self: Adder())
    monkeypatch.setattr(module, "train_and_evaluate", lambda *_: sys.exit(0))


def run_against(server, folder):
    with server, pytest.raises(SystemExit):
        call(module.main, *WORDS, "--teacher-url", server.url, "--output-dir", folder)
    return {name: (folder / f"{name}.jsonl").read_text() for name in TABLES}


def test_a_teacher_that_fails_in_every_way_loses_nothing(tmp_path, quick, capsys):
    faulty, steady = FailingTeacher(passing=True), FailingTeacher(passing=False)
    found = run_against(faulty, tmp_path / "faulty")
    said = capsys.readouterr().out
    assert found == run_against(steady, tmp_path / "steady")  # what passes leaves no trace in any stage
    assert set(faulty.failed) == set(PASSING) and faulty.fate == steady.fate

    rows = load_rows(tmp_path / "faulty" / "generate.jsonl")
    assert [row["id"] for row in rows] == [f"g{n}" for n in range(1, 41)]
    fates = Counter(fate for question, fate in faulty.fate.items() if STAGES["new_sample"] in question)
    assert set(fates) == {*LASTING, *SPOILED, "ok"}
    reasons = Counter(row["dropped"] for row in rows if "dropped" in row)
    assert reasons == Counter(EXPECTED[fate] for fate in fates.elements() if fate in EXPECTED)
    assert f"generate: kept {40 - reasons.total()} of 40; dropped: " in said
    assert all(f"{count} {reason}" in said for reason, count in reasons.items())
    assert len(load_rows(tmp_path / "faulty" / "verify.jsonl")) == len(kept(rows))

    ledger = read_json(tmp_path / "faulty" / "ledger.json")["total"]
    assert ledger["calls"] == faulty.calls and ledger["retries"] == sum(faulty.failed.values())
    assert ledger["calls"] - ledger["retries"] == steady.calls
    calm = read_json(tmp_path / "steady" / "ledger.json")["total"]
    assert [ledger[name] - calm[name] for name in ("prompt_tokens", "completion_tokens")] == [0, 0]
    with Cache(tmp_path / "faulty" / "cache.sqlite") as one, Cache(tmp_path / "steady" / "cache.sqlite") as other:
        assert one.counts() == other.counts()
        assert one.counts()["refusal"] == sum(fate in REFUSED for fate in faulty.fate.values())
