"""The constraint task: its rule by hand, its rows, and the way from a row's answer to a score."""

import json

import numpy as np
import pytest

from common.errors import UserError
from data import generate_constraint_data as generate
from data.constraints import Constraints
from data.prompts import read_answers
from data.subjects import SUBJECTS
from rewards.answer_reward import AnswerReward
from rewards.answers import answer_type
from tests.scripts import call, fails
from tests.timing import takes_under


@pytest.mark.parametrize(
    ("asked", "reply", "met"),
    [
        ({"sentences": 1}, "A river is a stream.", True),
        ({"sentences": 1}, "A river is a stream. It flows.", False),
        ({"sentences": 1}, "A river is a stream", False),
        ({"sentences": 1}, "It costs 3.5 coins in all.", True),
        ({"sentences": 2}, "Is it a river? It is!", True),
        ({"max_words": 4}, "A river is wet.", True),
        ({"max_words": 3}, "A river is wet.", False),
        ({"max_words": 3}, "- a - river - flows", True),
        ({"min_words": 4}, "A river is wet.", True),
        ({"min_words": 5}, "A river is wet.", False),
        ({"case": "lower"}, "a river, 3 miles long.", True),
        ({"case": "lower"}, "A river, 3 miles long.", False),
        ({"case": "upper"}, "A RIVER IS WET.", True),
        ({"case": "upper"}, "A RIVER is wet.", False),
        ({"include": ("water",)}, "It is Water, of course.", True),
        ({"include": ("water",)}, "It is underwater, of course.", False),
        ({"include": ("water", "sea")}, "It is water, of course.", False),
        ({"exclude": ("sea",)}, "It is the season now.", True),
        ({"exclude": ("sea",)}, "It is the sea.", False),
        ({"bullets": 2}, "- one thing\n* another thing", True),
        ({"bullets": 2}, "- one thing\n- two things\n- three things", False),
        ({"bullets": 1}, "one thing - of many", False),
        ({"json_keys": ("a", "b")}, '{"a": "one two", "b": "three"}', True),
        ({"json_keys": ("a", "b")}, '```json\n{"a": "one two", "b": "three"}\n```', True),
        ({"json_keys": ("a",)}, '{"a": "one two", "b": "three"}', False),
        ({"json_keys": ("a",)}, 'Here: {"a": "one two three"}', False),
        ({"json_keys": ("a",)}, '["a", "b", "c", "d"]', False),
        ({"ending": "That is all."}, "It is a river. That is all.", True),
        ({"ending": "That is all."}, "It is a river. that is all.", False),
        ({"case": "lower"}, "", False),
        ({"exclude": ("sea",)}, "no water", False),
    ],
)
def test_a_constraint_by_hand(asked, reply, met):
    assert list(Constraints(**asked).met(reply).values()) == [met]


def test_the_score_is_the_share_that_is_met():
    constraints = Constraints(sentences=1, max_words=4, case="lower", include=("wet",))
    assert constraints.score("A river is wet.") == 0.75
    assert constraints.score("a river is wet.") == 1.0
    assert constraints.score("wet") == 0.0


def test_a_row_holds_the_constraints_as_json():
    constraints = Constraints(case="lower", include=("a", "b"), max_words=9)
    assert json.loads(constraints.to_json()) == {"case": "lower", "include": ["a", "b"], "max_words": 9}
    assert Constraints.from_json(constraints.to_json()) == constraints


@pytest.mark.parametrize(
    "text",
    ["", "7", "[]", "{}", '{"words": 3}', '{"max_words": 0}', '{"max_words": "3"}', '{"max_words": true}',
     '{"case": "title"}', '{"include": []}', '{"include": "a"}', '{"include": [1]}', '{"ending": ""}'],
)  # fmt: skip
def test_what_is_no_constraint_is_refused(text):
    with pytest.raises(ValueError):
        Constraints.from_json(text)
    assert not answer_type("constraints").readable(text)
    with pytest.raises(UserError, match="not a valid constraints answer"):
        AnswerReward(answer_type("constraints"), {"a prompt": text})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("constraints")
    call(generate.main, "--output-dir", folder, "--num-samples", 120)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("split", "count"), [("train", 120), ("valid", 20), ("test", 20)])
def test_replies_satisfy_everything_and_rejected_ones_do_not(written, split, count):
    pairs = rows(written / f"pairs_{split}.jsonl")
    examples = rows(written / f"{split}.jsonl")
    assert len(examples) == len(pairs) == count
    for example, pair in zip(examples, pairs, strict=True):
        constraints = Constraints.from_json(example["answer"])
        assert constraints.score(example["messages"][1]["content"]) == 1
        assert example["messages"][:1] == pair["messages"]
        assert constraints.score(pair["chosen"]) == 1 > constraints.score(pair["rejected"])


def test_every_reply_that_can_be_drawn_satisfies_its_constraints():
    for split in generate.SPLITS:
        rng = np.random.default_rng(0)
        for row in (generate.draw_row(rng, split) for _ in range(1000)):
            assert row.constraints.score(row.chosen) == 1 > row.constraints.score(row.rejected), row


def test_splits_share_neither_subject_nor_wording(written):
    wordings = [(*kind.wordings[split],) for kind in generate.KINDS.values() for split in generate.SPLITS]
    wordings += generate.ASKING.values()
    every = [wording for group in wordings for wording in group]
    assert len(every) == len(set(every))
    taken = [SUBJECTS[share] for share in generate.SHARES.values()]
    assert sum(map(len, taken)) == len(SUBJECTS) == len({subject.word for subject in SUBJECTS})
    prompts = {split: {row["messages"][0]["content"] for row in rows(written / f"{split}.jsonl")}
               for split in generate.SPLITS}  # fmt: skip
    assert not prompts["train"] & (prompts["valid"] | prompts["test"])


def test_a_seed_gives_the_same_files(written, tmp_path):
    call(generate.main, "--output-dir", tmp_path, "--num-samples", 120)
    assert (tmp_path / "train.jsonl").read_bytes() == (written / "train.jsonl").read_bytes()
    call(generate.main, "--output-dir", tmp_path / "other", "--num-samples", 120, "--seed", 1)
    assert (tmp_path / "other/train.jsonl").read_bytes() != (written / "train.jsonl").read_bytes()


def test_the_reward_finds_a_row_s_constraints_by_its_prompt(written):
    from models.loading import load

    tokenizer = load("tiny-digits").tokenizer
    answers = read_answers(written / "test.jsonl", tokenizer)
    assert len(answers) == 20
    reward = AnswerReward(answer_type("constraints"), answers).reward
    examples = rows(written / "test.jsonl")
    prompts = list(answers)
    assert reward(prompts, [row["messages"][1]["content"] for row in examples]) == [1.0] * 20
    assert max(reward(prompts, ["x"] * 20)) == 0.0


@pytest.mark.parametrize("piece", ["-", "a", "!", "\n", "- ", "`", "``` ", "{", "a. "])
def test_a_long_reply_takes_no_time(piece):
    everything = Constraints(2, 3, 1, "lower", ("a",), ("b",), 2, ("a",), "x")
    assert takes_under(0.5, everything.met, "```json" + piece * (100_000 // len(piece)))


def test_sentences_end_before_white_space_and_bullets_begin_lines():
    assert Constraints(sentences=3).met("Is it 3.5? Yes... it is!")["sentences"]
    assert not Constraints(sentences=3).met("One. Two. three")["sentences"]
    assert Constraints(bullets=2).met("first\n\n - a b\n\n* c d\n-e")["bullets"]
    assert Constraints(json_keys=("a b c",)).met('```json\n{"a b c": 1}\n```')["json_keys"]


def test_only_kinds_that_are_named_are_asked_for(tmp_path):
    words = ("--num-samples", 60, "--output-dir", tmp_path, "--kinds", "sentence", "count", "lower")
    call(generate.main, *words)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    asked = {tuple(sorted(json.loads(row["answer"]))) for row in rows}
    plain = {("max_words", "sentences"), ("sentences",)}
    assert asked == plain | {("case", *fields) for fields in plain}
    assert not any(json.loads(row["answer"]).get("case") == "upper" for row in rows)


def test_held_out_rows_are_as_many_as_there_are(capsys, tmp_path):
    call(generate.main, "--output-dir", tmp_path, "--kinds", "count", "lower", "--num-samples", 600)
    said = capsys.readouterr().out
    assert "600 rows of train, 48 rows of valid, 100 rows of test" in said  # of 48 and 240 instructions that there are
    assert [len(rows(tmp_path / f"{split}.jsonl")) for split in ("train", "valid", "test")] == [600, 48, 100]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--kinds", "lower"], "--kinds lower asks for nothing by itself; add sentence or count or words"),
        (["--kinds", "json", "--num-samples", 20_000], "--kinds json have about "),
    ],
)
def test_kinds_that_make_too_few_instructions(capsys, tmp_path, words, line):
    assert fails(capsys, generate.main, "--output-dir", tmp_path / "new", *words).startswith(line)
    assert not (tmp_path / "new").exists()
