"""Self-Instruct and Evol-Instruct: their published filters, and rows with fresh responses."""

import asyncio

import pytest

from common.errors import UserError
from synth import prompts
from synth.evolution.generators import (
    TRIES,
    EvolInstructGenerator,
    SampledGenerator,
    SelfInstructGenerator,
    instructions_of,
    self_instruct_fault,
)
from synth.evolution.operators import OPERATORS
from synth.offline.instructions import read_sum, starting
from synth.offline.server import OfflineTeacher
from synth.sampler import Generator, Sampler, Settings, Space
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher
from tests.scripted_teacher import said

SEEDS = [{"instruction": text} for text in (
    "Name the rivers of Europe.", "Tell how glass is made.", "Which mountains feed a lake?",
    "Describe tides to a child.", "Compare four bridges by age.", "Plan two days among old mills.",
    "List metals that float.", "Explain why bells ring.", "Sketch a plot for a short play.")]  # fmt: skip
NEW = [f"{verb} {noun} {place} quickly." for verb, noun, place in zip(
    ("Sort", "Praise", "Rank", "Judge", "Pack", "Paint", "Weigh", "Find", "Sell", "Greet", "Guard", "Invent"),
    ("apples", "poets", "sailors", "excuses", "tents", "fences", "feathers", "tunnels", "candles", "visitors", "herds",
     "riddles"),
    ("indoors", "abroad", "aloud", "backwards", "twice", "nearby", "upstairs", "uphill", "online", "daily", "together",
     "slowly"), strict=True)]  # fmt: skip


class Recorded:
    """Answers by a function of the ask, and remembers what was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, asks):
        self.asked += asks
        return [self.answer(ask) for ask in asks]


def new(texts):
    """Instructions in turn, and a response to each."""
    found = iter(texts)

    def answer(ask):
        if ask.schema is prompts.Instruction:
            text = next(found, None)
            assert text is not None, "more was asked for than there is"
            return said("{}", parsed=prompts.Instruction(instruction=text))
        if ask.schema is prompts.Verdict:
            return said(
                "{}", parsed=prompts.Verdict(equal="equal" in ask.messages[1]["content"].split("</second")[0][-40:])
            )
        return said("I'm sorry." if "tents" in ask.messages[0]["content"] else f"Done: {ask.messages[0]['content']}")

    return Recorded(answer)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Name three rivers.", "length"), ("Name three long rivers.", ""), ("word " * 150, ""),
        ("word " * 151, "length"), ("Draw a house with trees.", "unfit for a language model"),
        ("Describe the picture, then stop.", "unfit for a language model"),
        ("Say where to go to eat.", "unfit for a language model"), ("Write a program that sorts.", "write a program"),
        ("- Name some long rivers.", "first character"), ("Ä river is to name.", "first character"),
        ("Explain photography to some child.", ""), ("Let go of two things.", ""),
    ],
)  # fmt: skip
def test_self_instructs_published_filters(text, fault):
    assert self_instruct_fault(text) == fault


def test_self_instruct_goes_on_until_it_has_what_is_wanted():
    near = "Name the rivers of all Europe."  # 5 of 5 and 6 tokens
    ask = new([NEW[0], near, NEW[0], "Draw a house with trees.", *NEW[1:]])
    generator = SelfInstructGenerator(ask)
    rows = generator.generate_from_seed(SEEDS, 10)
    assert [row["instruction"] for row in rows] == [text for text in NEW[:10] if "tents" not in text]
    assert rows[0]["output"] == f"Done: {NEW[0]}"
    assert [row["dropped"] for row in generator.dropped] == [
        *("near-duplicate", "near-duplicate", "unfit for a language model", "apology"),
    ]
    asked = [one for one in ask.asked if one.schema]
    assert [one.sample for one in asked] == list(range(1, 14))  # 10 and the three that were dropped
    shown = [[text for text in [s["instruction"] for s in SEEDS] + NEW if f"\n{text}\n" in one.messages[1]["content"]]
             for one in asked]  # fmt: skip
    assert all(len(texts) == 8 for texts in shown)  # six seeds and two of its own, or seeds alone at the start
    own = [sum(text in NEW for text in texts) for texts in shown]
    assert own[0] == 0 and own[-1] == 2


def test_self_instruct_ends_where_nothing_new_comes():
    ask = new(["Name the rivers of Europe."] * 100)
    generator = SelfInstructGenerator(ask)
    assert generator.generate_from_seed(SEEDS[:2], 3) == [] and len(ask.asked) == 12 == len(generator.dropped)


def test_self_instruct_after_given_rows():
    ask = new(NEW)
    rows = SelfInstructGenerator(ask).evolve_instructions(SEEDS[:3])
    assert [row["instruction"] for row in rows] == NEW[:3]
    assert all(
        f"\n{seed['instruction']}\n" in one.messages[1]["content"]
        for seed, one in zip(SEEDS, ask.asked[:3], strict=False)
    )


def test_evol_instruct_drops_by_its_published_filters_and_takes_the_parent_again():
    ask = new(["Rewritten prompt: sort it all.", NEW[0], "Name what is equal", "To be or not to be.", NEW[4], NEW[1]])
    generator = EvolInstructGenerator(ask)
    rows = generator.generate_from_seed(SEEDS[:2], 2)
    assert [row["instruction"] for row in rows] == [NEW[0]]  # its second is answered by an apology
    assert [row["dropped"] for row in generator.dropped] == [
        "leaked template",
        "equal to its parent",
        "only stop words",
        "apology",
    ]
    given = [one.messages[1]["content"] for one in ask.asked if one.schema is prompts.Instruction]
    assert SEEDS[0]["instruction"] in given[0] and SEEDS[0]["instruction"] in given[2]


def test_evol_instruct_draws_the_operators_evenly():
    counts = dict.fromkeys(OPERATORS, 0)
    ask = new(["Rewritten prompt."] * 600)
    EvolInstructGenerator(ask).evolve_instructions([{"instruction": f"Name river number {n}."} for n in range(600)])
    for one in ask.asked:
        counts[next(name for name in OPERATORS if prompts.OPERATOR_DEMANDS[name] in one.messages[1]["content"])] += 1
    assert min(counts.values()) > 65 and max(counts.values()) < 135 and sum(counts.values()) == 600


@pytest.mark.parametrize("kind", [SelfInstructGenerator, EvolInstructGenerator])
def test_with_the_offline_teacher_over_http_and_twice_the_same(tmp_path, kind):
    with OfflineTeacher(error_rate=0.1) as server:

        def ask(asks):
            async def asked():
                with Cache(tmp_path / "cache") as cache:
                    async with Teacher(server.url, "m", cache) as teacher:
                        return await teacher.ask_all(asks)

            return asyncio.run(asked())

        seeds = [{"instruction": text} for text in starting(4, 0)]
        rows = kind(ask).generate_from_seed(seeds, 6)
        assert len(rows) == 6 and all(read_sum(row["instruction"]) and row["output"] for row in rows)
        evolved = kind(ask).evolve_instructions(rows)
        assert 0 < len(evolved) <= 6 and not {row["instruction"] for row in evolved} & {
            row["instruction"] for row in rows
        }
        calls = server.calls
        assert kind(ask).generate_from_seed(seeds, 6) == rows and server.calls == calls


@pytest.mark.parametrize("rows", [[], [{"text": "x"}], [{"instruction": "Name it."}, {"instruction": " "}]])
def test_rows_without_instructions_are_refused(rows):
    with pytest.raises(UserError, match="no instruction"):
        instructions_of(rows)
    assert instructions_of([{"input": "12 + 7 ="}]) == ["12 + 7 ="]


def test_for_the_tuner_every_ask_goes_by_the_samplers_settings_and_other_rows_are_other_asks():
    teacher, sampler = new(NEW), Sampler(Space(templates=("plain", "varied")))
    generator: Generator = SampledGenerator(teacher, SEEDS, sampler)
    sampler.set(Settings(temperature=0.3, top_p=0.7, template="varied"))
    found = generator.generate_from_seed(3, first=5)
    assert [row["instruction"] for row in found.data] == NEW[:3] and found.dropped == {}
    assert {(ask.temperature, ask.top_p) for ask in teacher.asked} == {(0.3, 0.7)}
    asked = [ask for ask in teacher.asked if ask.schema is prompts.Instruction]
    assert all("few others would choose" in ask.messages[-1]["content"] for ask in asked)
    # A response is asked for by the instruction alone, as the trained model will be.
    assert [ask.messages for ask in teacher.asked if ask.schema is None] == [prompts.respond(text) for text in NEW[:3]]
    assert [ask.sample for ask in asked] == [4 * TRIES + n for n in (1, 2, 3)]
    sampler.temperature = 0.9
    generator.generate_from_seed(1, first=8)
    assert teacher.asked[-1].temperature == 0.9 and teacher.asked[-2].sample > asked[-1].sample


def test_for_the_tuner_seed_rows_are_evolved_in_turn_and_what_is_dropped_is_counted():
    teacher = new([NEW[0], SEEDS[1]["instruction"]])
    generator = SampledGenerator(teacher, SEEDS[:2], Sampler())
    found = generator.evolve_instructions(2, first=4)  # the second seed row, then the first again
    assert [row["instruction"] for row in found.data] == [NEW[0]] and sum(found.dropped.values()) == 1
    parents = [ask.messages[-1]["content"] for ask in teacher.asked if ask.schema is prompts.Instruction]
    assert SEEDS[1]["instruction"] in parents[0] and SEEDS[0]["instruction"] in parents[1]
