"""Chains by a scripted teacher: what becomes of a choice, what the next one sees, and what a policy learns from."""

import asyncio
from typing import Any

import pytest

from common.errors import UserError
from rewards.answers import answer_type
from synth import prompts
from synth.evolution.chains import Chain, Evolution, batch_from, figures, root_rows
from synth.evolution.features import BUCKETS, SIZE, Situation, features
from synth.evolution.judge import Difficulty, Judge, Pool
from synth.evolution.operators import ACTIONS, OPERATORS, STOP
from synth.evolution.policy import Constant, fixed
from synth.evolution.training import Training, chains_of
from tests.scripted_teacher import ScriptedTeacher, said

STARTS = ["Name the rivers of Europe.", "Tell how glass is made."]
FRESH = ["Which mountains feed a lake?", "Explain why cities grow beside water.", "Compare four bridges by age.",
         "Describe tides to somebody blind.", "Plan two days among old mills."]  # fmt: skip


def verdict(equal=False):
    return said("{}", parsed=prompts.Verdict(equal=equal))


def rewritten(text):
    return said("{}", parsed=prompts.Instruction(instruction=text))


class Script:
    """Rewritings in turn; never equal; answers that agree."""

    def __init__(self, texts, equal=()):
        self.texts, self.equal = iter(texts), equal

    def __call__(self, ask):
        if ask.schema is prompts.Instruction:
            found = next(self.texts)
            return rewritten(found) if isinstance(found, str) else found
        if ask.schema is prompts.Verdict:
            return verdict(any(text in ask.messages[1]["content"] for text in self.equal))
        return said("7")


def evolved(policy, script, starts=STARTS[:1], rounds=3, answers=0, seed=0):
    teacher = ScriptedTeacher(script)
    difficulty = Difficulty(answers, answer_type("number")) if answers else Difficulty()
    evolution = Evolution(teacher, Judge(teacher, teacher, difficulty=difficulty), rounds, seed=seed)

    async def main():
        roots = await root_rows(starts, evolution.judge, "evolve")
        chains = [Chain(number, root, Pool(starts)) for number, root in enumerate(roots)]
        return await evolution.run(chains, policy), chains

    rows, chains = asyncio.run(main())
    return rows, chains, teacher


def test_a_chain_goes_on_from_what_was_kept_and_tries_again_what_was_dropped():
    script = Script([FRESH[0], STARTS[0], FRESH[1]])
    rows, (chain,), teacher = evolved(fixed(2), script)
    assert [row.get("dropped") for row in rows] == [None, "near-duplicate", None]
    assert [row["parent"] for row in rows] == ["i1", "i1.0.1", "i1.0.1"] and {row["root"] for row in rows} == {"i1"}
    given = [ask.messages[1]["content"] for ask in teacher.asked if ask.schema is prompts.Instruction]
    assert STARTS[0] in given[0] and FRESH[0] in given[1] and FRESH[0] in given[2]
    assert rows[1]["reward"] == 0.0 and rows[0]["reward"] > 0 and chain.given is rows[2]
    assert all(row["operator"] == "deepen" and row["propensity"] == 1.0 for row in rows)
    assert prompts.OPERATOR_DEMANDS["deepen"] in given[0]


def test_what_a_choice_sees():
    rows, _, _ = evolved(fixed(0), Script([FRESH[0], said("", "refusal"), FRESH[1]]), answers=2)
    first, second, third = (Situation(**row["situation"]) for row in rows)
    assert first == Situation(STARTS[0], 1, 3, None, False, 1.0, 1.0)  # alone in its pool; both answers agree
    assert second == Situation(FRESH[0], 2, 3, "breadth", False, rows[0]["parts"]["novelty"], 1.0)
    assert third == second._replace(round=3, failed=True)
    assert rows[1]["dropped"] == "no instruction: refusal" and rows[1]["input"] == ""


def test_a_stop_ends_a_chain_asks_nothing_and_earns_nothing():
    rows, (chain,), teacher = evolved(fixed(ACTIONS.index(STOP)), Script([]))
    assert [row["operator"] for row in rows] == [STOP] and rows[0]["dropped"] == "stopped" and rows[0]["reward"] == 0
    assert chain.ended and teacher.asked == []


def test_draws_follow_from_seed_chain_and_round_alone():
    """Two chains together, and the second one alone with the same number, choose the same; another seed does not."""
    even = Constant()

    def choices(seed, both):
        rows, _, _ = evolved(
            even, lambda ask: rewritten("Same words.") if ask.schema else said(""), STARTS, 20, seed=seed
        )
        return [row["operator"] for row in rows if row["chain"] == both]

    assert choices(0, 1) == choices(0, 1) and choices(0, 1) != choices(0, 0) and choices(0, 1) != choices(1, 1)
    rows, _, teacher = evolved(fixed(3), lambda ask: rewritten("Same words."), STARTS, 20)
    samples = [ask.sample for ask in teacher.asked if ask.schema is prompts.Instruction]
    assert len(set(samples)) == len(samples) == 40  # what failed is drawn anew, and not found in the cache
    assert all(row["propensities"].keys() == set(ACTIONS) and sum(row["propensities"].values()) == pytest.approx(1)
               for row in rows)  # fmt: skip


def test_a_batch_holds_the_log():
    rows, _, _ = evolved(fixed(1), Script([FRESH[0], FRESH[1], FRESH[2], STARTS[1]]), STARTS, rounds=2)
    stopped = {**rows[2], "operator": STOP, "reward": 0.0}
    batch = batch_from([rows[3], rows[0], rows[1], stopped][:3], 3, 1)  # any order; one chain ended early
    assert batch.mask.tolist() == [[1, 0, 0], [1, 1, 0]] and batch.group_size == 1
    assert batch.actions.tolist() == [[1, 0, 0], [1, 1, 0]]
    assert batch.rewards[0, 0] == pytest.approx(rows[0]["reward"]) and batch.rewards[1, 1] == 0.0
    assert (batch.features[0, 0] == features([Situation(**rows[0]["situation"])])[0]).all()
    assert batch.features.shape == (2, 3, SIZE) and not batch.features[0, 1].any()
    assert batch.features[1, 1, BUCKETS + OPERATORS.index("constraints")] == 1
    found = figures(rows)
    assert found["constraints"] == 1 and found["kept_share"] == 0.75 and found["stop"] == 0
    assert found["mean_reward"] == pytest.approx(sum(row["reward"] for row in rows) / 4)


def test_every_start_comes_before_any_comes_again_and_groups_stand_together():
    roots = [{"id": f"i{n}", "root": f"i{n}", "input": f"Text {n}."} for n in range(5)]
    training = Training(10, starts=2, group=3)
    chains = [chain for iteration in range(5) for chain in chains_of(roots, training, iteration)]
    assert [chain.number for chain in chains] == list(range(30))  # no two are asked or drawn alike
    ids = [chain.given["id"] for chain in chains]
    assert all(len(set(ids[n : n + 3])) == 1 for n in range(0, 30, 3))
    starts = ids[::3]
    assert sorted(starts[:5]) == sorted(starts[5:]) == [f"i{n}" for n in range(5)] and starts[:5] != starts[5:]
    assert len(chains_of(roots[:1], training, 7)) == 3


def test_the_chains_of_a_batch_share_pools_that_last_as_long_as_a_generation():
    """Four roots, two starts an iteration, a generation of two chains from each: pools are emptied every fourth."""
    roots = [{"id": f"i{n}", "root": f"i{n}", "input": f"Text {n}."} for n in range(4)]
    training, sizes = Training(10, starts=2, group=3, chains=2), []
    log: list[dict[str, Any]] = []
    for iteration in range(6):
        chains = chains_of(roots, training, iteration, log)
        pools = [chain.pool for chain in chains]
        assert pools[:3] == pools[3:] and len({*map(id, pools)}) == 3  # one for each place in a group
        sizes.append([len(pool) for pool in pools[:3]])
        for number in (chain.number for chain in chains):
            row = {"iteration": iteration + 1, "chain": number, "input": f"New {number}."}
            log.append(row if number % 3 != 2 else {**row, "dropped": "length"})
    assert sizes == [[4, 4, 4], [6, 6, 4], [8, 8, 4], [10, 10, 4], [4, 4, 4], [6, 6, 4]]
    assert chains_of(roots, training, 5, log)[1].pool.nearest("New 25.") == 1.0  # of iteration 5, second place


@pytest.mark.parametrize("wrong", [(-1, 1, 2), (1, 0, 2), (1, 1, 1)])
def test_training_that_cannot_be(wrong):
    with pytest.raises(UserError, match="--group"):
        Training(*wrong)


def test_every_operator_has_an_index():
    assert [ACTIONS.index(name) for name in OPERATORS] == list(range(6)) and ACTIONS[-1] == STOP
