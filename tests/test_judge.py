"""Gates and parts of the reward, each by hand; which questions the judge asks and which it saves."""

import asyncio
import math

import pytest

from common.errors import UserError
from rewards.answers import answer_type
from synth import prompts
from synth.evolution.judge import Difficulty, Gates, Judge, Pool, Weights, growth, reward_of
from synth.evolution.operators import OPERATORS
from tests.scripted_teacher import ScriptedTeacher, said, section

PARENT = "Name the longest river of Europe."
NUMBER = answer_type("number")


def verdict(equal):
    return said("{}", parsed=prompts.Verdict(equal=equal))


def row(text, **more):
    return {"id": "r", "input": text, "parts": {}, "pass_rate": None, "reward": 0.0, "operator": OPERATORS[0], **more}


def judge(rows, script=lambda ask: verdict(False), pools=None, parent=PARENT, **settings):
    teacher = ScriptedTeacher(script)
    pools = pools or [Pool([parent]) for _ in rows]
    found = asyncio.run(Judge(teacher, teacher, **settings).judge(rows, [parent] * len(rows), pools, "x"))
    return found, teacher, pools


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I'm sorry, but I can't help with that.", "refusal"), ("What is it that you do?", "only stop words"),
        ("?! ...", "only stop words"), ("Name rivers.", "length"), ("river " * 301, "length"),
        ("Rewritten prompt: name a river.", "leaked template"), (PARENT, "near-duplicate"),
        ("Name the longest river of all Europe.", "near-duplicate"), ("Sorry tales: name three of them.", ""),
        ("Ordne die Flüsse nach ihrer Länge.", ""), ("为什么 天空 是 蓝色 的", ""),
    ],
)  # fmt: skip
def test_each_gate(text, reason):
    (found,), teacher, _ = judge([row(text)])
    assert found.get("dropped", "") == reason
    assert bool(teacher.asked) == (not reason)  # a failed gate costs no call
    assert (found["reward"] > 0) == (not reason)


def test_the_threshold_is_passed_up_to_itself_as_in_self_instruct():
    """ROUGE-L of 7 of 10 and 10 tokens is 0.7, which is kept; one token more in common is not."""
    parent = "a b c d e f g h i j".replace(" ", "x ") + "x"
    words = parent.split()
    for same, kept in ((7, True), (8, False)):
        text = " ".join(words[:same] + [f"new{n}" for n in range(10 - same)])
        (found,), _, _ = judge([row(text)], parent=parent)
        assert found["parts"]["novelty"] == pytest.approx(1 - same / 10) and ("dropped" not in found) == kept
    (found,), _, _ = judge([row(PARENT.upper())], gates=Gates(near_duplicates=1.0))
    assert found["dropped"] == "near-duplicate"  # the same words never pass


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_the_reviewer_is_asked_in_both_orders_and_one_equal_drops(first, second):
    text = "Which mountains does the Danube pass?"

    def script(ask):
        return verdict(first if section(ask, "first") == PARENT else second)

    (found,), teacher, pools = judge([row(text)], script)
    pairs = {(section(ask, "first"), section(ask, "second")) for ask in teacher.asked}
    assert pairs == {(PARENT, text), (text, PARENT)} and len(teacher.asked) == 2
    assert found["dropped"] == "equal to its parent" and found["parts"]["equal"] == [first, second]
    assert len(pools[0]) == 1  # what was dropped is nobody's neighbour


def test_without_a_verdict_nothing_is_kept():
    text = "Which mountains does the Danube pass?"
    (found,), _, _ = judge([row(text)], lambda ask: said("", "malformed"))
    assert found["dropped"] == "not reviewed" and found["detail"] == "it was malformed"
    answers = iter([said("", "failed"), verdict(True)])
    (found,), _, _ = judge([row(text)], lambda ask: next(answers))
    assert found["dropped"] == "equal to its parent"


def test_the_reward_and_its_parts_by_hand():
    """Parent of 6 tokens; a text of 12, of which 3 ("name", "the", "river") come in the parent's order."""
    text = "Name first the Danube, then that river which most bridges cross today."
    answers = ["So it is 4.", "4", "5", "no idea"]

    def script(ask):
        return verdict(False) if ask.schema else said(answers[ask.sample])

    settings = {"difficulty": Difficulty(4, NUMBER), "weights": Weights(2.0, 3.0, 0.5)}
    (found,), teacher, pools = judge([row(text)], script, **settings)
    assert found["pass_rate"] == 0.5  # two of four agree; the unreadable one is one of the four
    assert found["parts"]["novelty"] == pytest.approx(1 - 2 * 3 / (6 + 12))
    assert found["parts"]["difficulty"] == 1.0 and found["parts"]["growth"] == pytest.approx(math.log(2))
    assert found["reward"] == pytest.approx(2 * (1 - 1 / 3) + 3 * 1 - 0.5 * math.log(2))
    assert [ask.messages for ask in teacher.asked[2:]] == [prompts.respond(text)] * 4
    assert [ask.sample for ask in teacher.asked[2:]] == [0, 1, 2, 3] and len(pools[0]) == 2


def test_unknown_difficulty_counts_nothing_and_shrinking_is_not_paid_for():
    (found,), _, _ = judge([row("Trace Danube water.")])
    assert found["parts"]["difficulty"] is None and found["parts"]["growth"] == 0.0
    assert found["reward"] == pytest.approx(found["parts"]["novelty"])
    assert growth("a b c d", "a b") == pytest.approx(math.log(2)) and growth("a", "a b") == 0.0 and growth("", "") == 0
    assert reward_of({"novelty": 0.0, "difficulty": 0.0, "growth": 1.0}, Weights()) == -0.2  # 0 is a part, not unknown


def test_consistency_and_a_verifier():
    agreeing = Difficulty(4, NUMBER)
    assert agreeing.pass_rate("x", ["0", "0.0", "1", "none"]) == 0.5 and agreeing.pass_rate("x", ["?"] * 4) == 0.0
    verified = Difficulty(
        2, None, lambda asked, texts: [float(a + t == "ab") for a, t in zip(asked, texts, strict=True)]
    )
    assert verified.pass_rate("a", ["b", "c"]) == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Difficulty(1, NUMBER), "--answers is 1"), (lambda: Difficulty(4), "--answer TYPE"),
        (lambda: Difficulty(0, NUMBER), "none are asked for"), (lambda: Gates(0.0), "threshold"),
        (lambda: Gates(0.7, 5, 4), "--shortest"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_in_one_pool_the_first_of_two_alike_is_kept():
    pool, texts = Pool(), ["Which mountains does the Danube pass?", "Which mountains does the Danube pass today?"]
    found, _, _ = judge([row(text) for text in texts], pools=[pool, pool])
    assert "dropped" not in found[0] and found[1]["dropped"] == "near-duplicate" and len(pool) == 1
    found, _, _ = judge([row(text) for text in texts], pools=[Pool(), Pool()])
    assert ["dropped" in one for one in found] == [False, False]
    # A candidate that the reviewer drops is no neighbour in the next call.
    judge([row(texts[0])], lambda ask: verdict(True), pools=[pool := Pool()])
    assert len(pool) == 0 and pool.nearest(texts[0]) == 0.0
    pool.add(texts[0])
    assert pool.copy().nearest(texts[0].upper()) == 1.0


@pytest.mark.parametrize(("first", "second", "reward"), [(6, 8, 0.7), (0, 0, 0.0), (10, 10, 1.0)])
def test_the_reviewers_score_is_the_reward_if_it_is_asked_for_as_published(first, second, reward):
    """Asked in both orders at temperature 0; novelty, difficulty and growth are noted, and count nothing."""
    text = "Which mountains does the Danube pass?"

    def script(ask):
        if ask.schema is prompts.Verdict:
            return verdict(False)
        return said("{}", parsed=prompts.Score(score=first if section(ask, "first") == PARENT else second))

    (found,), teacher, pools = judge([row(text)], script, scores=True)
    asked = [ask for ask in teacher.asked if ask.schema is prompts.Score]
    assert {(section(ask, "first"), section(ask, "second")) for ask in asked} == {(PARENT, text), (text, PARENT)}
    assert {(ask.stage, ask.temperature, ask.sample) for ask in asked} == {("x: score", 0.0, 0)}
    assert all(prompts.RUBRIC in ask.messages[1]["content"] for ask in asked)
    assert found["reward"] == found["parts"]["score"] == pytest.approx(reward) and found["parts"]["novelty"] > 0.5
    assert len(pools[0]) == 2


def test_what_the_reviewer_does_not_score_is_not_kept():
    def script(ask):
        return verdict(False) if ask.schema is prompts.Verdict else said("", "malformed")

    (found,), _, pools = judge([row("Which hills are high?")], script, scores=True)
    assert found["dropped"] == "not scored" and found["detail"] == "it was malformed" and found["reward"] == 0.0
    assert len(pools[0]) == 1
    with pytest.raises(ValueError, match="0 to 10"):
        prompts.Score(score=11)
