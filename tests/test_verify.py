"""The vote, held against asking everybody: the same verdict, and no answer asked for that could not change it."""

import asyncio
import itertools
import json
import random
import sys
from dataclasses import replace

import pytest

from common.errors import UserError
from rewards.answers import answer_type
from synth.pipeline import verify as module
from synth.pipeline.verify import Ballot, Voting, drop_duplicates, verify
from synth.stages import kept, load_rows, new_row, write_rows
from synth.task import Task, load_task
from tests.faulty_server import FaultyServer, completion
from tests.scripted_teacher import ScriptedTeacher, said, section, stage_of

NUMBER = answer_type("number")
TASK = Task("sums", "Add the two whole numbers.", answer=NUMBER)


def rows_of(*pairs):
    return [new_row(f"g{n}", text, output, "generated") for n, (text, output) in enumerate(pairs)]


def voted(rows, answers, task=TASK, **settings):
    """The rows after a vote. answers: f(input, sample) -> the teacher's text, or None for a refusal."""

    def script(ask):
        text = answers(section(ask, "input"), ask.sample)
        return said("I'm sorry", "refusal") if text is None else said(text)

    teacher = ScriptedTeacher(script)
    return asyncio.run(verify(rows, task, teacher, Voting(**settings))), teacher


def one(answers, own="5", **settings):
    """The row and the number of answers asked for, where the votes are `answers` in turn."""
    rows, teacher = voted(rows_of(("2 + 3 =", own)), lambda _, sample: answers[sample], **settings)
    return rows[0], len(teacher.asked)


def test_a_vote_ends_as_soon_as_it_is_decided():
    # 4 votes and the generator's own: 3 of 5 are needed, one is there.
    row, asked = one(["5", "5.0", "9", "9"], votes=4)
    assert asked == 2 and row["votes"] == {"5": 3} and (row["cast"], row["margin"]) == (3, 1.0)
    assert "dropped" not in row


def test_the_voted_answer_replaces_the_generators_or_the_sample_goes():
    row, asked = one(["6", "6", "6", "5"], votes=4)
    assert asked == 3 and row["output"] == "6" and row["outvoted"] == "5" and row["votes"] == {"5": 1, "6": 3}
    assert row["margin"] == 0.5
    row, _ = one(["6", "6", "6", "5"], votes=4, on_outvoted="drop")
    assert row["dropped"] == "outvoted" and row["output"] == "5" and row["detail"] == "3 of 4 votes say 6"


def test_the_generators_own_answer_is_a_vote_unless_it_shall_not():
    assert one(["5", "6", "5", "7"], votes=4)[0]["votes"] == {"5": 3, "6": 1}
    rows, teacher = voted(rows_of(("2 + 3 =", "5")), lambda _, n: ["5", "6", "5", "7"][n], votes=4, own=False)
    assert rows[0]["dropped"] == "too little agreement" and len(teacher.asked) == 4


def test_unreadable_answers_count_for_nothing_but_stay_in_the_denominator():
    """An unreadable answer keeps its place in the vote: 2 of 5 agree, not 2 of 2."""
    row, asked = one(["5", None, "hm", "let me think"], votes=4)
    assert row["dropped"] == "too little agreement" and asked == 4
    assert row["votes"] == {"5": 2} and row["detail"] == "2 of 5 votes for one answer, 3 of 5 needed"
    row, _ = one([None, "5", "hm", "5"], votes=4)
    assert row["votes"] == {"5": 3} and row["cast"] == 5 and row["margin"] == 3 / 5


def test_nothing_readable_and_ties_are_rejected():
    assert one([None] * 4, votes=4, own="5")[0]["dropped"] == "too little agreement"
    rows, _ = voted(rows_of(("1", "1")), lambda *_: None, votes=2, own=False)
    assert rows[0]["dropped"] == "no readable vote"
    row, _ = one(["5", "6", "6"], votes=3, least=0.5)
    assert row["dropped"] == "tie" and row["votes"] == {"5": 2, "6": 2} and row["margin"] == 0


def test_zero_is_an_answer():
    """The answer 0 is an answer, although it is falsy."""
    row, _ = one(["0", "0.0", "1", "1"], own="0", votes=4)
    assert row["output"] == "0" and row["votes"] == {"0": 3}


def test_votes_are_grouped_by_the_tasks_own_comparison():
    maths = Task("maths", "Solve.", answer=answer_type("math"))
    rows, _ = voted(
        rows_of(("1/4", "0.25")), lambda _, n: ["\\boxed{\\frac{1}{4}}", "$\\frac14$"][n], task=maths, votes=2
    )
    assert sum(rows[0]["votes"].values()) >= 2 and len(rows[0]["votes"]) == 1


class Backwards(ScriptedTeacher):
    """Its last answer comes first."""

    async def ask_each(self, asks, take):
        replies = []
        await super().ask_each(asks, lambda number, reply: replies.append((number, reply)))
        for number, reply in reversed(replies):
            take(number, reply)


def test_votes_count_in_their_order_whichever_comes_first():
    rows = rows_of(("first", "9"), ("second", "8"), ("third", "3"))
    answers = ["6", "5", "5", "5"]

    def script(ask):
        return said("3" if section(ask, "input") == "third" else answers[ask.sample])

    forth, back = (
        json.dumps(asyncio.run(verify(rows, TASK, teacher(script), Voting(votes=4))))
        for teacher in (ScriptedTeacher, Backwards)
    )
    assert forth == back
    assert [list(row["votes"]) for row in json.loads(forth)] == [["9", "6", "5"], ["8", "6", "5"], ["3"]]


def plain_verdict(votes, needed):
    """Whether an answer wins when all votes are cast."""
    counts = sorted((votes.count(answer) for answer in set(votes) - {None}), reverse=True)
    return bool(counts) and counts[0] >= needed and counts[:1] != counts[1:2]


@pytest.mark.parametrize(("votes", "least", "own"), [(4, 0.6, True), (4, 0.5, False), (5, 0.3, False), (3, 1.0, True)])
def test_early_stop_gives_the_verdict_of_all_votes_and_asks_none_in_vain(votes, least, own):
    voting = Voting(votes=votes, least=least, own=own)
    for cast in itertools.product(["1", "2", "3", None], repeat=votes):
        ballot = Ballot(NUMBER, voting, "1")
        given = ["1"] * own
        while ballot.accepted is None:
            for _ in range(ballot.wave):
                # Each vote of the wave was still open when asked one by one.
                so_far = Ballot(NUMBER, voting, "1")
                for answer in given[own:]:
                    so_far.add(answer)
                assert so_far.accepted is None
                given.append(cast[len(given) - own])
            ballot = Ballot(NUMBER, voting, "1")
            for answer in given[own:]:
                ballot.add(answer)
        assert ballot.accepted == plain_verdict(["1"] * own + list(cast), ballot.needed)
        if len(given) < votes + own:  # not one of the ways to go on would change it
            rest = votes + own - len(given)
            ends = itertools.product(["1", "2", "3", "4", None], repeat=rest) if rest <= 2 else []
            assert all(plain_verdict(given + list(end), ballot.needed) == ballot.accepted for end in ends)


def test_votes_of_all_samples_go_out_together_each_with_its_own_index():
    rows = rows_of(*((f"{n} + {n} =", str(2 * n)) for n in range(10, 20)))
    right = {row["input"]: row["output"] for row in rows}
    found, teacher = voted(rows, lambda text, _: right[text], votes=4)
    assert teacher.waves == [20] and {stage_of(ask) for ask in teacher.asked} == {"answer"}
    assert [(section(ask, "input"), ask.sample) for ask in teacher.asked[:3]] == [
        ("10 + 10 =", 0), ("10 + 10 =", 1), ("11 + 11 =", 0)
    ]  # fmt: skip
    assert len(kept(found)) == 10 and {ask.stage for ask in teacher.asked} == {"verify"}
    assert all(ask.schema is None and ask.temperature == 1.0 for ask in teacher.asked)


def test_a_vote_is_shown_the_passage_of_its_sample():
    rows = [new_row("g1", "In which year?", "1473", "generated", passage="a#1"), *rows_of(("2 + 2 =", "4"))]
    teacher = ScriptedTeacher(lambda ask: said("1473"))
    asyncio.run(verify(rows, TASK, teacher, Voting(votes=2), passages={"a#1": "founded in 1473"}))
    assert {(section(ask, "input"), section(ask, "passage")) for ask in teacher.asked} == {
        ("In which year?", "founded in 1473"),
        ("2 + 2 =", None),
    }


def test_a_wrong_teacher_seldom_gets_through():
    """A teacher wrong in 30 %, at random among nine answers: single answers are 70 % right, voted ones over 99 %."""
    rng = random.Random(0)
    rows = rows_of(*((f"{n} + {7 * n} =", str(8 * n)) for n in range(100, 400)))

    def answer(text, _):
        right = 8 * int(text.split()[0])
        return str(right + rng.choice([0] * 7 + [1, 2, 3]))

    task = Task("sums", "Add.", answer=NUMBER)
    found, _ = voted([{**row, "output": answer(row["input"], 0)} for row in rows], answer, task=task, votes=12)
    wins = kept(found)
    assert len(wins) > 200
    assert sum(int(row["output"]) == 8 * int(row["input"].split()[0]) for row in wins) / len(wins) > 0.99


def test_without_a_vote_every_sample_is_kept_and_nothing_is_asked():
    rows = rows_of(("1 + 1 =", "3"))
    found, teacher = voted(rows, None, votes=0)
    assert found == rows and teacher.asked == []


def test_where_there_is_no_one_answer_nothing_is_voted_on():
    found, teacher = voted(rows_of(("8", "20 22 30 36"), ("8", "10 12")), None, load_task("synth/tasks/digits.yaml"))
    assert teacher.asked == [] and [row.get("dropped") for row in found] == ["near-duplicate of a demo"] * 2
    own = Task("own", "Solve.", answer=NUMBER, source=lambda count, seed: [], near_duplicates=1.0)
    found, teacher = voted(rows_of(("a b c d 1", "1"), ("a b c d 2", "2"), ("A b c d 2", "2")), None, own)
    assert teacher.asked == [] and [row.get("dropped") for row in found] == [None, None, "near-duplicate of the pool"]


def test_duplicates_are_dropped_against_evaluation_demos_pool_and_earlier_rows():
    texts = [" ".join(f"word{n}{letter}" for n in range(10)) for letter in "abcde"]
    close = [text.rsplit(" ", 2)[0] + " changed words" for text in texts]  # 8 of 10 words: ROUGE-L 0.8
    examples = [[{"input": text, "output": "1"}] for text in texts]
    task = Task("t", "Do.", answer=NUMBER, evaluation=examples[0], demos=examples[1])
    rows = rows_of((close[0], "1"), (close[1], "1"), (close[2], "1"), (texts[3], "1"), (close[3], "1"), (texts[4], "1"))
    found = drop_duplicates(rows, task, [texts[2]])
    named = ["the evaluation set", "a demo", "the pool"]
    assert [row.get("dropped") for row in found] == [
        *(f"near-duplicate of {name}" for name in named), None, "near-duplicate of the pool", None
    ]  # fmt: skip
    assert found[4]["detail"] == f"ROUGE-L 0.80: {texts[3]}"
    assert kept(drop_duplicates(rows, replace(task, near_duplicates=0.9), [texts[2]])) == rows


def test_a_duplicate_costs_no_call():
    found, teacher = voted(rows_of(("2 + 3 =", "5"), ("2  +  3 =", "5")), lambda *_: "5", votes=4)
    assert len(teacher.asked) == 2 and len(kept(found)) == 1 and found[1]["dropped"] == "near-duplicate of the pool"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"votes": -1}, "--votes"), ({"least": 0.0}, "--least-agreement"), ({"on_outvoted": "x"}, "--on-outvoted")],
)
def test_settings_that_cannot_be_are_a_users_error(settings, message):
    with pytest.raises(UserError, match=message):
        Voting(**settings)


def test_the_command_reads_kept_rows_and_writes_verdicts(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    write_rows(tmp_path / "in.jsonl", [*rows_of(("21 + 3 =", "24")), {**rows_of(("1", "1"))[0], "dropped": "tie"}])
    with FaultyServer(lambda body, seen: completion("The answer is 24.")) as server:
        command = [
            "verify",
            "--task",
            "synth/tasks/arithmetic.yaml",
            "--in",
            str(tmp_path / "in.jsonl"),
            "--votes",
            "4",
        ]
        command += ["--out", str(tmp_path / "out.jsonl"), "--teacher-url", server.url, "--teacher-model", "m"]
        monkeypatch.setattr(sys, "argv", [*command, "--cache", str(tmp_path / "cache")])
        module.main()
        assert server.calls == 2
    assert load_rows(tmp_path / "out.jsonl")[0]["votes"] == {"24": 3}
    out = capsys.readouterr().out
    assert "verify: kept 1 of 1" in out and "teacher: 2 calls (0 retries)" in out
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["margin"] == 1.0
