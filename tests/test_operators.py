"""What a teacher is told of evolving instructions: its wording, and that the material stays material."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from synth import prompts
from synth.evolution import operators as module
from synth.evolution.judge import Gates, text_fault
from synth.evolution.operators import ACTIONS, OPERATORS, OWN, STOP, changed_words, load_operators, read_rewriting
from synth.prompts import Instruction, Verdict
from synth.teacher.asking import Asking
from synth.teacher.structured import read_json_answer
from tests.scripted_teacher import said
from tests.test_prompts_synth import ATTACK, outside

TEAMS_RL = Path(module.__file__).with_name("teams_rl.yaml")
PUBLISHED = load_operators(TEAMS_RL)
ASKED: dict[str, Callable] = {name: OWN.by_name[name].messages for name in OPERATORS}
ASKED |= {f"published {name}": operator.messages for name, operator in PUBLISHED.by_name.items()}
ASKED["score"] = lambda text: prompts.score(text, text)
ASKED["review"] = lambda text: prompts.review(text, text)
ASKED["self_instruct"] = lambda text: prompts.self_instruct([text], 3)


def test_there_are_six_operators_and_stop():
    assert (
        *("breadth", "constraints", "deepen", "concretize", "reasoning", "complicate_input"),
        "stop",
    ) == ACTIONS
    contents = [OWN.by_name[name].messages("Name a river.")[1]["content"] for name in OPERATORS]
    assert len(set(contents)) == 6 and all(prompts.REASONABLE in content for content in contents)
    with pytest.raises(KeyError):
        OWN.rewriting(STOP, "Name a river.", Asking(), 0, "")


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


def test_words_added_or_replaced_by_hand():
    assert changed_words("a b c", "a b c") == 0 and changed_words("A, b: C!", "a b c") == 0
    assert (
        changed_words("a x c d", "a b c") == 2 and changed_words("c b a", "a b c") == 2 and changed_words("", "a") == 0
    )


def test_the_published_six_with_their_limits():
    assert set(PUBLISHED.by_name) == set(OPERATORS) and PUBLISHED.actions[-1] == STOP
    own = {name: operator.changed for name, operator in PUBLISHED.by_name.items()}
    assert own == {**dict.fromkeys(OPERATORS, (10, 20)), "breadth": None, "complicate_input": None}
    assert {operator.longest for operator in PUBLISHED.by_name.values()} == {2048}
    demands = [operator.messages("Name a river.")[1]["content"] for operator in PUBLISHED.by_name.values()]
    assert len(set(demands)) == 6 and all("{" not in text and "2048 words" in text for text in demands)


@pytest.mark.parametrize("added", [9, 10, 20, 21])
def test_ten_to_twenty_words_are_a_gate(added):
    text, reason = "Name a river " + " ".join(f"w{n}" for n in range(added)), "changed too little or too much"
    expected = ("", "") if 10 <= added <= 20 else (reason, f"{added} words; 10 to 20")
    assert PUBLISHED.by_name["constraints"].fault(text, "Name a river.") == expected
    assert OWN.by_name["constraints"].fault(text, "Name a river.") == ("", "")


def test_2048_words_are_a_gate():
    for words, reason in ((2048, ""), (2049, "too long")):
        assert PUBLISHED.by_name["breadth"].fault("word " * words, "Name a river.")[0] == reason


def test_operators_of_ones_own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "longest: 9\noperators:\n  shorten: Make it shorter.\n  rhyme: {demand: Rhyme it., longest: null}\n"
    )
    found = load_operators(path)
    assert found.actions == ("shorten", "rhyme", "stop")
    assert found.by_name["shorten"].longest == 9 and found.by_name["rhyme"].longest is None
    content = found.by_name["shorten"].messages("Name a {river}.")[1]["content"]
    assert "Make it shorter." in content and prompts.REASONABLE in content and "Name a {river}." in content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("longest: 3\n", "needs `operators:"), ("operators: {a: b}\nlength: 3\n", "knows operators, longest"),
        ("operators: {stop: b}\n", "names an operator 'stop'"), ("operators: {a b: c}\n", "names an operator 'a b'"),
        ("operators: {a: {demand: b, most: 3}}\n", "gives a unknown keys"), ("operators: {a: ''}\n", "has no demand"),
        ("frame: 'x {demand}'\noperators: {a: b}\n", "a frame without"),
        ("longest: 0\noperators: {a: b}\n", "has 0 as longest"),
        ("changed: [20, 10]\noperators: {a: b}\n", "as changed"), ("changed: 10\noperators: {a: b}\n", "as changed"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_is_one_line(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_operators(tmp_path / "own.yaml")
    assert "\n" not in str(error.value)
