"""Sums in words: read as they are worded, evolved by each operator, compared, and answered right as often as told."""

import asyncio
from random import Random

import pytest

from rewards.answers import answer_type
from synth import prompts
from synth.evolution.operators import OPERATORS
from synth.offline import instructions as offline_instructions
from synth.offline.instructions import Sum, evolved, read_sum, starting, worded
from synth.offline.server import SECTION, BadRequest, OfflineTeacher
from synth.task import SHIPPED, load_task
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher
from synth.teacher.completions import Ask
from synth.teacher.structured import read_json_answer
from tests.test_offline_teacher import body, text

NUMBER = answer_type("number")
PLAIN = "Add 12 and 7."


def test_sums_are_read_as_they_are_worded():
    for seed in range(300):
        rng = Random(seed)
        task = read_sum(starting(1, seed)[0])
        assert task is not None
        for _ in range(rng.randrange(6)):
            task = evolved(rng, task, rng.choice(OPERATORS))
            assert read_sum(worded(rng, task)) == task
    assert len(set(starting(100, 0))) == 100 and starting(5, 1) != starting(5, 2)


@pytest.mark.parametrize("other", ["", "Name a river.", "Add 12 and 7. Then sing.", "Say: Add 12 and 7.",
                                   "Add x and y.", "Add 12 and 7. Then add 3. Ignore that."])  # fmt: skip
def test_what_asks_for_more_than_a_rule_knows_is_none(other):
    assert read_sum(other) is None


def test_results_and_loads_by_hand():
    """(12 + 7) · 3 − 40 = 17; backwards 71; rounded down 70."""
    task = Sum("add", "table", 12, 7, (("multiply", 3), ("subtract", 40)), ("reverse", "tens"))
    assert task.values == [19, 57, 17] and task.result == 70
    assert task.load == 2 + 2 * 1 + 2 + 2 + 1  # digits of each step, rules, the table
    assert Sum("subtract", "plain", 3, 40).result == -37 and Sum("multiply", "plain", 12, 345).load == 6
    assert Sum("subtract", "plain", 3, 40, (), ("tens", "sum")).result == -3  # of -30


def test_each_operator_changes_what_its_name_says_and_has_an_end():
    start = Sum("add", "plain", 12, 7)
    for name in OPERATORS:
        changed = evolved(Random(0), start, name)
        differs = {field for field in ("kind", "form", "a", "b", "steps", "rules")
                   if getattr(changed, field) != getattr(start, field)}  # fmt: skip
        expected = {"breadth": {"kind", "a", "b"}, "constraints": {"rules"}, "deepen": {"a", "b"},
                    "concretize": {"form"}, "reasoning": {"steps"}, "complicate_input": {"form"}}[name]  # fmt: skip
        assert differs == expected, name
        task = start
        for number in range(12):
            task = evolved(Random(number), task, name)
        assert (evolved(Random(99), task, name) == task) == (name != "breadth")


def ask(teacher, messages, schema, sample="0"):
    found, reason = read_json_answer(text(teacher, messages, sample, schema=schema), schema)
    assert found is not None, reason
    return found


def test_a_rewriting_by_each_operator_over_the_prompt():
    teacher = OfflineTeacher(error_rate=0)
    for name in OPERATORS:
        messages = prompts.rewrite(prompts.OPERATOR_DEMANDS[name], PLAIN)
        found = [ask(teacher, messages, prompts.Instruction, str(n)).instruction for n in range(8)]
        for one in found:
            task = read_sum(one)
            assert task is not None and task != read_sum(PLAIN) and len(set(found)) > 1
    # The operator is read off the request and not off the material.
    attack = f"{PLAIN}\n{prompts.OPERATOR_DEMANDS['breadth']}"
    request = offline_instructions.read_question(prompts.rewrite(prompts.OPERATOR_DEMANDS["deepen"], attack), SECTION)
    assert request is not None and request.operator == "deepen"


def test_wrong_rewritings_leak_or_change_nothing_at_the_rate():
    teacher, leaked, same = OfflineTeacher(error_rate=0.4), 0, 0
    for number in range(400):
        found = ask(
            teacher, prompts.rewrite(prompts.OPERATOR_DEMANDS["reasoning"], PLAIN), prompts.Instruction, str(number)
        ).instruction
        leaked += found.startswith("Rewritten instruction:")
        same += read_sum(found) == read_sum(PLAIN)
    assert 50 < leaked < 110 and 50 < same < 110  # 80 of each; four standard deviations


def test_the_reviewer_goes_by_what_is_asked_and_errs_at_half_the_rate():
    teacher = OfflineTeacher(error_rate=0)
    for one, other, equal in ((PLAIN, "Work out 12 plus 7.", True), (PLAIN, "Add 12 and 8.", False),
                              (PLAIN, "Ada owns 12 jars and buys 7 more; count all of them.", False),
                              ("Name it.", "Name it.", True), ("Name it.", PLAIN, False)):  # fmt: skip
        assert ask(teacher, prompts.review(one, other), prompts.Verdict).equal is equal
    teacher = OfflineTeacher(error_rate=0.4)
    wrong = sum(ask(teacher, prompts.review(PLAIN, PLAIN), prompts.Verdict, str(n)).equal is False for n in range(400))
    assert 50 < wrong < 110


def test_responses_are_right_less_often_the_more_has_to_be_worked_on():
    teacher = OfflineTeacher(error_rate=0.1)
    for instruction, load in (("Add 2 and 7.", 1), ("Multiply 123 by 45.", 6)):
        task = read_sum(instruction)
        assert task is not None and task.load == load
        found = [NUMBER.extract(text(teacher, prompts.respond(instruction), str(n))) for n in range(400)]
        share = sum(one == str(task.result) for one in found) / 400
        assert abs(share - 0.9**load) < 0.1 and None not in found
    slips = [one for one in found if one != "5535"]
    assert max(slips.count(one) for one in set(slips)) < len(slips) / 5  # seldom the same


def test_other_prompts_are_answered_as_before():
    sums = load_task(SHIPPED / "arithmetic.yaml")
    assert text(OfflineTeacher(error_rate=0), prompts.answer(sums, "12 + 7 =")) == "19"
    for messages in (prompts.respond("Name a river."), prompts.rewrite(prompts.OPERATOR_DEMANDS["deepen"], PLAIN)[:1]):
        with pytest.raises(BadRequest):
            OfflineTeacher().complete(body(messages))


def test_the_real_client_reads_them_over_http(tmp_path):
    asks = [
        Ask(prompts.rewrite(prompts.OPERATOR_DEMANDS["concretize"], PLAIN), prompts.Instruction),
        Ask(prompts.review(PLAIN, PLAIN), prompts.Verdict, 0.0),
        Ask(prompts.self_instruct([PLAIN], 4), prompts.Instruction),
        Ask(prompts.respond(PLAIN)),
    ]

    async def main():
        with OfflineTeacher(error_rate=0) as server, Cache(tmp_path / "c") as cache:
            async with Teacher(server.url, "m", cache) as teacher:
                return await teacher.ask_all(asks)

    replies = asyncio.run(main())
    assert [reply.status for reply in replies] == ["ok"] * 4
    assert replies[1].parsed.equal is True and replies[3].text == "The result is 19."
    assert read_sum(replies[2].parsed.instruction) is not None
