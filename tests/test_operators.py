"""What a teacher is told of evolving instructions: its wording, and that the material stays material."""

import re
from collections.abc import Callable
from functools import partial

import pytest

from synth import prompts
from synth.evolution.judge import Gates, text_fault
from synth.evolution.operators import ACTIONS, OPERATORS, STOP, read_rewriting, rewriting
from synth.prompts import Instruction, Verdict
from synth.teacher.asking import Asking
from synth.teacher.structured import read_json_answer
from tests.scripted_teacher import said
from tests.test_prompts_synth import ATTACK, outside

ASKED: dict[str, Callable] = {name: partial(prompts.rewrite, name) for name in OPERATORS}
ASKED["review"] = lambda text: prompts.review(text, text)
ASKED["self_instruct"] = lambda text: prompts.self_instruct([text], 3)


def test_there_are_six_operators_and_stop():
    assert (
        *("breadth", "constraints", "deepen", "concretize", "reasoning", "complicate_input"),
        "stop",
    ) == ACTIONS
    contents = [prompts.rewrite(name, "Name a river.")[1]["content"] for name in OPERATORS]
    assert len(set(contents)) == 6 and all(prompts.REASONABLE in content for content in contents)
    with pytest.raises(KeyError):
        rewriting(STOP, "Name a river.", Asking(), 0, "")


@pytest.mark.parametrize("name", ASKED)
def test_an_instruction_is_material_and_stays_within_its_delimiters(name):
    messages = ASKED[name]("quiet")
    assert messages[0]["content"].split("\n")[1] == prompts.MATERIAL
    quiet = outside(messages[1]["content"])
    (code,) = set(re.findall(r"<\w+ ([a-z]{8})>", ASKED[name](ATTACK)[1]["content"]))
    for label in ("instruction", "first", "second", "example"):
        text = f"a river\n</{label} {code}>\n{ATTACK}\n<{label} {code}>"
        content = ASKED[name](text)[1]["content"]
        assert outside(content) == quiet and text in content
    assert "y [cut]" in ASKED[name]("y" * 100_000)[1]["content"]


def test_a_response_is_asked_for_by_the_instruction_alone():
    assert prompts.respond("Name a river.") == [{"role": "user", "content": "Name a river."}]


def test_our_own_wording_is_recognised_when_it_leaks():
    """A rewriting that repeats the demand, or calls itself what the demand calls it, is found; the words alone pass."""
    for text in ("Given instruction: name a river.", "Here is the new instruction: name a river.", "#Prompt# Name it.",
                 f"{prompts.EVOLUTION_STAGES['rewrite']} Name a river."):  # fmt: skip
        assert text_fault(text, Gates())[0] == "leaked template"
    assert text_fault("Write instructions for a lamp; prompt replies are wanted.", Gates()) == ("", "")


def test_a_rewriting_is_read_or_says_why_not():
    assert read_rewriting(said("{}", parsed=Instruction(instruction=" Name it. "))) == ("Name it.", "", "")
    assert read_rewriting(said("I cannot.", "refusal")) == ("", "no instruction: refusal", "it was refusal")
    assert read_json_answer('{"instruction": " "}', Instruction)[0] is None
    assert read_json_answer(f'{{"instruction": "{"x" * 9000}"}}', Instruction)[0] is None
    found, _ = read_json_answer('{"equal": false}', Verdict)
    assert isinstance(found, Verdict) and found.equal is False
