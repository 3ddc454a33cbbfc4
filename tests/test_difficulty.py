"""Difficulty: tries where they tell something, a spread filled from both sides, nothing done twice."""

import asyncio
import sys
from collections import Counter

import pytest

from common.errors import UserError
from rewards.answers import answer_type
from synth.pipeline import difficulty as module
from synth.pipeline.difficulty import Rewriting, Spread, adapt, choose_parents, rewrite
from synth.pipeline.pass_rates import Tries, pass_rates
from synth.pipeline.rollouts import Draw
from synth.pipeline.verify import Voting
from synth.stages import drop, kept, load_rows, new_row, write_rows
from synth.task import Task, load_task
from synth.teacher.asking import Asking
from synth.teacher.cache import Cache
from tests.scripted_teacher import ScriptedTeacher, said, sample, section, stage_of

TASK = Task("sums", "Add the two whole numbers.", template="{input}", answer=answer_type("number"), near_duplicates=1.0)
MOST = 100  # from which sums on the base model is never right


class Same:
    """A base model that always says the same."""

    def __init__(self, text):
        self.identity = self.text = text

    def sample(self, wanted, done):
        for index in range(len(wanted)):
            done(index, self.text)


class Adder:
    """A base model that is right in a share of its rollouts that falls with the sum, from 1 at 20 to 0 at MOST."""

    identity = "adder"

    def __init__(self):
        self.drawn: Counter[Draw] = Counter()

    def sample(self, wanted, done):
        for index, rollout in enumerate(wanted):
            self.drawn[rollout] += 1
            right = total(rollout.prompt)
            share = (MOST - right) / (MOST - 20)
            # Rollout 0, 1, 2, ... at fractions of 1 that fill it evenly.
            done(index, f" {right}" if (rollout.number * 0.618) % 1 < share else " 1")


def total(text):
    return int(text.split()[0]) + int(text.split()[2])


def row(number, text, rate=None, **more):
    return {**new_row(f"g{number}", text, str(total(text)), "generated"), "pass_rate": rate, **more}


@pytest.fixture
def store(tmp_path):
    with Cache(tmp_path / "rollouts.sqlite") as cache:
        yield cache


def test_only_those_solved_never_or_always_are_tried_more_often(store):
    rows = [row(0, "1 + 1 ="), row(1, "30 + 30 ="), row(2, "99 + 99 ="), row(3, "40 + 58 =")]
    sampler = Adder()
    found = pass_rates(rows, TASK, sampler, store, Tries(8, 32))
    assert [(r["solved"], r["rollouts"]) for r in found] == [(32, 32), (5, 8), (0, 32), (1, 8)]
    assert [r["pass_rate"] for r in found] == [1.0, 0.625, 0.0, 0.125]
    assert set(sampler.drawn.values()) == {1} and sampler.drawn.total() == 80
    assert max(rollout.number for rollout in sampler.drawn if "30" in rollout.prompt) == 7


def test_tries_double_and_end_at_the_most(store):
    sampler = Adder()
    found = pass_rates([row(0, "40 + 58 ="), row(1, "99 + 1 =")], TASK, sampler, store, Tries(2, 7))
    # 40 + 58: rollout 0 is right (0 < 0.025), so 2 tries decide; 99 + 1 is tried 2, 4, 7 times.
    assert [(r["solved"], r["rollouts"]) for r in found] == [(1, 2), (0, 7)]


def test_no_rollout_is_drawn_twice_even_by_another_run(store):
    rows = [row(0, "1 + 1 ="), row(1, "30 + 30 =")]
    first = pass_rates(rows, TASK, Adder(), store, Tries(8, 16))
    again = Adder()
    assert pass_rates(rows, TASK, again, store, Tries(8, 16)) == first and not again.drawn
    pass_rates(rows, TASK, again, store, Tries(8, 17))
    assert [rollout.number for rollout in again.drawn] == [16]
    # Another truth of the same input is scored anew, without a new rollout.
    other = pass_rates([{**rows[0], "output": "1"}], TASK, again, store, Tries(8, 16))
    assert other[0]["solved"] == 0 and again.drawn.total() == 1


def test_another_base_model_never_gets_old_scores(store):
    rows = [row(0, "99 + 99 =")]
    assert pass_rates(rows, TASK, Adder(), store)[0]["pass_rate"] == 0
    assert pass_rates(rows, TASK, Same("198"), store)[0]["pass_rate"] == 1


def test_a_dropped_row_is_not_tried_and_a_reward_scores_the_rest(store):
    rows = [drop(new_row("g1", "8", "x", "generated"), "tie"), new_row("g2", "8", "x", "generated")]
    found = pass_rates(rows, load_task("synth/tasks/digits.yaml"), Same(" 10 12 14 16"), store, Tries(2, 2))
    assert found[0] is rows[0] and found[1]["pass_rate"] == 1.0


def test_the_bins_of_a_spread_by_hand():
    spread = Spread(wanted=10, band=(0.1, 0.9), bins=4)
    assert [spread.place(rate) for rate in (0, 0.09, 0.1, 0.29, 0.3, 0.5, 0.7, 0.9, 0.91, 1)] == [
        -1, -1, 0, 0, 1, 2, 3, 3, 4, 4
    ]  # fmt: skip
    rows = [row(n, "1 + 1 =", rate) for n, rate in enumerate([0, 0.2, 0.2, 0.2, 0.2, 1, 1])]
    rows.append(drop(row(9, "1 + 1 ="), "tie"))
    assert spread.counts(rows) == [1, 4, 0, 0, 0, 2] and spread.short(rows) == [0, 3, 3, 3]
    assert spread.line(rows) == ("below 0.10: 1, 0.10-0.30: 4, 0.30-0.50: 0, 0.50-0.70: 0, 0.70-0.90: 0, above 0.90: 2")


def test_parents_are_rewritten_towards_what_is_short():
    spread = Spread(wanted=4, band=(0.1, 0.9), bins=2)
    rows = [row(n, "1 + 1 =", rate) for n, rate in enumerate([0.0, 1.0, 0.2, 0.2])]
    # Only the upper bin is short: what lies below it is made easier, what lies above it harder.
    assert [(r["id"], way) for r, way in choose_parents(rows, spread)] == [
        ("g0", "easier"), ("g1", "harder"), ("g2", "easier"), ("g3", "easier")
    ]  # fmt: skip
    lower = [row(n, "1 + 1 =", rate) for n, rate in enumerate([0.0, 1.0, 0.8, 0.8])]
    assert [way for _, way in choose_parents(lower, spread)] == ["easier", "harder", "harder", "harder"]
    assert choose_parents([*rows, *lower[2:]], spread) == []


def test_by_the_papers_rule_every_solved_sample_gets_a_harder_one_and_every_other_an_easier_one():
    spread = Spread(wanted=1, bins=1, rounds=1, rewrite="all")
    rows = [row(n, "1 + 1 =", rate) for n, rate in enumerate([0.0, 0.4, 0.5, 1.0])]
    rows.append(drop(row(4, "1 + 1 =", 0.5), "tie"))
    assert not any(spread.short(rows)) and not spread.filled(rows)
    expected = [("g0", "easier"), ("g1", "easier"), ("g2", "harder"), ("g3", "harder")]
    assert [(r["id"], way) for r, way in choose_parents(rows, spread)] == expected
    assert choose_parents([*rows, {**row(5, "1 + 1 =", 0.5), "id": "g1e", "parent": "g1"}], spread)[-1] == (
        {**row(5, "1 + 1 =", 0.5), "id": "g1e", "parent": "g1"}, "harder"
    )  # fmt: skip
    assert spread.most_rewritten(7) == 7


def test_the_papers_rule_rewrites_all_of_the_first_samples_once(store):
    spread = Spread(wanted=1, bins=1, rounds=1, rewrite="all")
    (rows, ended), teacher = adapted(EXTREMES, store, spread)
    assert {r["parent"] for r in rows[24:]} == {r["id"] for r in EXTREMES} and len(rows) == 48
    assert ended == "the limit of 1 rounds is reached"
    assert Counter(ask.stage for ask in teacher.asked)["harder"] == sum(r["pass_rate"] >= 0.5 for r in rows[:24])


def test_the_extremes_come_first_at_most_twice_as_many_as_are_short_and_none_twice():
    spread = Spread(wanted=2, band=(0.1, 0.9), bins=1)
    rows = [row(0, "1 + 1 =", 0.95), *(row(n, "1 + 1 =", n % 2) for n in range(1, 7))]
    assert [r["id"] for r, _ in choose_parents(rows, spread)] == ["g1", "g2", "g3", "g4"]
    rows.append(drop({**row(7, "1 + 1 ="), "parent": "g2"}, "tie"))
    assert [r["id"] for r, _ in choose_parents(rows, spread)] == ["g1", "g3", "g4", "g5"]


def harder_and_easier(ask):
    """A teacher of sums: a tenth of the way from the given sum to 150 or to 2; right when it votes."""
    text = section(ask, "input")
    stage = stage_of(ask)
    if stage == "answer":
        return said(str(total(text)))
    first, second = int(text.split()[0]), int(text.split()[2])
    step = 11 if stage == "harder" else -11
    return sample(f"{max(1, first + step)} + {max(1, second + step + first % 3)} =", "0")  # its own output is wrong


def measure_with(sampler, store):
    return lambda rows: pass_rates(rows, TASK, sampler, store, Tries(8, 16))


REWRITING = Rewriting(Asking(), Voting(votes=4))


def adapted(rows, store, spread, sampler=None, script=harder_and_easier, task=TASK):
    measure = measure_with(sampler or Adder(), store)
    teacher = ScriptedTeacher(script)
    return asyncio.run(adapt(measure(rows), task, teacher, measure, spread, REWRITING)), teacher


EXTREMES = [row(n, f"{n % 9 + 1} + {n // 9 + 1} =") for n in range(12)]
EXTREMES += [row(n, f"{n + 50} + {n + 60} =") for n in range(12, 24)]


def test_the_spread_is_filled_from_both_sides(store, capsys):
    spread = Spread(wanted=12, band=(0.05, 0.95), bins=3, rounds=6)
    before = measure_with(Adder(), store)(EXTREMES)
    assert spread.counts(before)[1:-1] == [0, 0, 0]
    (rows, ended), teacher = adapted(EXTREMES, store, spread)
    assert ended == "the spread is filled" and min(spread.counts(rows)[1:-1]) >= 4
    assert rows[:24] == before
    made = {r["id"]: r for r in rows[24:]}
    assert {r["origin"] for r in made.values()} == {"harder", "easier"}
    assert len(made) == len(rows) - 24 and all(r["id"] == r["parent"] + r["origin"][0] for r in made.values())
    # The teacher's own outputs are all wrong: what is kept was voted on.
    assert all(r["output"] == str(total(r["input"])) and r["outvoted"] == "0" for r in kept(made.values()))
    assert {ask.stage for ask in teacher.asked} == {"harder", "easier", "verify"}
    assert "pass rates after round 1: below 0.05" in capsys.readouterr().out


def test_two_runs_give_the_same_and_the_second_draws_nothing(store):
    spread = Spread(wanted=12, bins=3, rounds=3)
    first, _ = adapted(EXTREMES, store, spread)
    again = Adder()
    second, _ = adapted(EXTREMES, store, spread, again)
    assert second == first and not again.drawn


@pytest.mark.parametrize(
    ("spread", "script", "ended"),
    [
        (Spread(rounds=2), harder_and_easier, "the limit of 2 rounds is reached"),
        (Spread(rounds=0), harder_and_easier, "the limit of 0 rounds is reached"),
        (Spread(rounds=9), lambda ask: said("", "refusal"), "no sample is left to rewrite"),
    ],
)
def test_why_rewriting_ended(store, spread, script, ended):
    (rows, why), teacher = adapted(EXTREMES, store, spread, script=script)
    assert why == ended
    if "left" in ended:
        assert len(rows) == 48 and {r["dropped"] for r in rows[24:]} == {"no sample: refusal"}
        assert teacher.waves == [24]


def test_a_spread_that_is_filled_asks_nothing(store):
    (rows, ended), teacher = adapted([row(0, "30 + 30 =")], store, Spread(wanted=1, bins=1))
    assert ended == "the spread is filled" and not teacher.asked and len(rows) == 1


def test_the_rows_of_a_tasks_own_source_are_not_rewritten(store):
    own = Task("own", "Solve.", template="{input}", answer=TASK.answer, source=lambda count, seed: [])
    (rows, ended), teacher = adapted(EXTREMES, store, Spread(), task=own)
    assert ended == "the task's scorer knows only its own rows" and not teacher.asked and len(rows) == 24


def test_a_copy_of_its_parent_is_a_duplicate(store):
    def copy(ask):
        return sample(section(ask, "input"), "1") if stage_of(ask) != "answer" else harder_and_easier(ask)

    (rows, _), teacher = adapted(EXTREMES, store, Spread(rounds=1), script=copy)
    assert {r["dropped"] for r in rows[24:]} == {"near-duplicate of the pool"}
    assert "verify" not in {ask.stage for ask in teacher.asked}


def test_task_format_and_passage_are_in_the_prompt():
    task = Task("t", "Say the year.", input_format="A question.", output_format="A year.", answer=TASK.answer)
    parent = {**row(0, "1 + 1 =", 1.0), "passage": "a#1"}
    teacher = ScriptedTeacher(lambda ask: sample("2 + 2 =", "4"))
    made = asyncio.run(rewrite([(parent, "harder")], task, teacher, {"a#1": "founded in 1473"}, Asking()))
    text = teacher.asked[0].messages[-1]["content"]
    assert all(part in text for part in ("Say the year.", "A question.", "A year."))
    assert section(teacher.asked[0], "passage") == "founded in 1473" and section(teacher.asked[0], "input") == "1 + 1 ="
    assert made[0] == {**new_row("g0h", "2 + 2 =", "4", "harder", "g0", "a#1")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tries(9, 8), "--rollouts is 9"),
        (lambda: Spread(band=(0.9, 0.1)), "--band is 0.9 0.1"),
        (lambda: Spread(bins=0), "--bins 0"),
    ],
)
def test_settings_that_cannot_be_are_a_users_error(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_command_with_a_real_model(tmp_path, tiny_folder, monkeypatch, capsys):
    write_rows(tmp_path / "in.jsonl", [row(0, "2 + 3 ="), row(1, "1 + 1 =")])
    command = ["difficulty", "--task", "synth/tasks/arithmetic.yaml", "--in", str(tmp_path / "in.jsonl")]
    command += ["--out", str(tmp_path / "out.jsonl"), "--base-model", str(tiny_folder), "--rounds", "0"]
    command += ["--rollout-store", str(tmp_path / "r.sqlite"), "--max-completion-length", "3", "--max-rollouts", "16"]
    monkeypatch.setattr(sys, "argv", command)
    module.main()
    rows = load_rows(tmp_path / "out.jsonl")
    assert all(r["rollouts"] in (8, 16) and r["pass_rate"] == r["solved"] / r["rollouts"] for r in rows)
    assert "difficulty: kept 2 of 2" in capsys.readouterr().out
