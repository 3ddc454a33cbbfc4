"""Target models: what they are called with, what they may return, and sft.py as one of them."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest

import sft
from common.errors import UserError
from synth.examples import read_examples
from synth.task import SHIPPED, load_task
from synth.tuning import targets
from synth.tuning.targets import SftTarget, call_target, instruction_task, load_target, sft_row, takes_validation
from tests.scripts import call

DIGITS = load_task(SHIPPED / "digits.yaml")
ROWS = [{"input": "8", "output": "20 22 30 36"}, {"input": "14", "output": "18 24 40 52"}]
VALID = [{"input": "2", "output": "4 6 8 10"}, {"input": "40", "output": "42 44 46 48"}]


class Taking:
    def __call__(self, rows, valid_rows):
        return {}


def keyworded(rows, *, validation_dataset=None):
    return {}


def quick(rows, epochs=3):
    return {}


def both(rows, validation_dataset=None):
    return {}


def one_of_many(rows, valid, epochs=3):
    return {}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda rows: {}, False),
        (lambda rows, other: {}, True),
        (quick, False),
        (both, True),
        (one_of_many, True),
        (keyworded, False),
        (lambda *rows: {}, True),
        (Taking(), True),
        (partial(both, validation_dataset=[]), False),
        (SftTarget(DIGITS, "x"), True),
        (dict, False),
    ],
)
def test_the_validation_set_goes_to_those_who_take_it(function, expected):
    assert takes_validation(function) == expected


def test_a_target_gets_copies_and_its_metrics_become_floats():
    given = []

    def target(rows, validation):
        given.append((json.loads(json.dumps(rows)), validation))
        rows[0]["input"] = "spoiled"
        rows.clear()
        return {"accuracy": np.float32(0.5), "seconds": 3, "loss": math.nan, "name": "x"}

    rows = [{"input": "a", "output": "b"}]
    assert call_target(target, rows, [{"input": "v"}], "accuracy") == {"accuracy": 0.5, "seconds": 3.0}
    assert rows == [{"input": "a", "output": "b"}] and given == [(rows, [{"input": "v"}])]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"f1": 0.5, "loss": 1.0}, "returned the metrics f1, loss, but reward_metric is 'accuracy'"),
        ({}, "returned the metrics none, but"),
        ({"accuracy": math.nan}, "returned nan as accuracy, which is not a finite number"),
        ({"accuracy": math.inf}, "returned inf as accuracy"),
        ({"accuracy": None}, "returned None as accuracy"),
        ({"accuracy": "0.9"}, "returned '0.9' as accuracy"),
        (0.8, r"returned 0.8; return a dict of metrics such as \{'accuracy': 0.8\}"),
        (None, "returned None; return a dict"),
    ],
)
def test_a_metric_that_is_missing_or_no_number_is_never_a_zero(result, message):
    def target(rows):
        return result

    with pytest.raises(UserError, match=f"target model target {message}"):
        call_target(target, [], [], "accuracy")


def test_a_target_that_fails_says_where(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def target(rows):\n    return {'accuracy': 1 / len(rows)}\n")
    with pytest.raises(UserError, match=r"target model target failed: ZeroDivisionError.*mine.py, line 2"):
        call_target(load_target(f"{path}:target"), [], [], "accuracy")
    with pytest.raises(UserError, match=r"target model .* defines no 'other'"):
        load_target(f"{path}:other")


@pytest.fixture
def started(monkeypatch):
    """The command lines of sft.py, which is called in this process."""
    words = []

    def run_script(line, go_on, files=()):
        words.append(list(line))
        call(sft.main, *line[1:])

    monkeypatch.setattr(targets, "run_script", run_script)
    monkeypatch.setattr(sft, "plot_run", lambda folder: folder / "curves.png")
    return words


def test_sft_is_run_on_the_rows_and_its_model_scored_on_the_others(tmp_path, tiny_folder, started):
    target = SftTarget(DIGITS, tmp_path, str(tiny_folder), iters=2, flags="--batch-size 2 --save-every 1", seed=3)
    metrics = call_target(target, ROWS, VALID, "accuracy")
    assert set(metrics) == {"accuracy", "mean_score", "valid_loss"}
    # The prompts' own numbers keep the rule, so an untrained model has about 1/5 of the score, or less.
    assert 0 <= metrics["accuracy"] == metrics["mean_score"] < 0.8 and metrics["valid_loss"] > 2
    (folder,) = (tmp_path / "target").iterdir()
    rows = (folder / "train.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [sft_row(DIGITS, row, chat=False) for row in ROWS]
    assert json.loads((folder / "valid.jsonl").read_text().splitlines()[1]) == {
        "prompt": "40", "completion": " 42 44 46 48",
    }  # fmt: skip
    (line,) = started
    assert line[:2] == ["sft.py", "--train"] and line[line.index("--iters") + 1] == "2" and "--save-every" in line
    assert call_target(target, ROWS, VALID, "accuracy") == metrics and len(started) == 1  # not trained again
    call_target(target, ROWS[:1], VALID, "accuracy")
    assert len(started) == 2 and len(list((tmp_path / "target").iterdir())) == 2


def test_a_training_that_was_cut_goes_on_from_its_checkpoint(tmp_path, tiny_folder, started):
    flags = "--batch-size 2 --save-every 1 --keep-checkpoints 0"
    whole = SftTarget(DIGITS, tmp_path / "whole", str(tiny_folder), 3, flags)(ROWS, VALID)
    cut = SftTarget(DIGITS, tmp_path / "cut", str(tiny_folder), 3, flags)
    cut(ROWS, VALID)
    (folder,) = (tmp_path / "cut" / "target").iterdir()
    (folder / "training" / "summary.json").unlink()
    (folder / "completions.sqlite").unlink()
    for step in (2, 3):
        shutil.rmtree(folder / "training" / "checkpoints" / f"{step:06d}")
    assert cut(ROWS, VALID) == whole
    assert started[-1] == ["sft.py", "--resume", str(folder / "training")]


def test_a_file_alone_means_its_evaluate_or_its_one_function(tmp_path):
    path = tmp_path / "t.py"
    path.write_text("def helper(rows): ...\n\ndef evaluate(rows):\n    return {'accuracy': 0.25}\n")
    assert load_target(str(path))([]) == {"accuracy": 0.25}
    path.write_text("SIZE = 3\n\ndef _own(): ...\n\ndef score(rows):\n    return {'f1': 0.5}\n")
    assert load_target(str(path))([]) == {"f1": 0.5}
    for code, message in (
        (
            "def a(rows): ...\ndef b(rows): ...\n",
            r"t\.py defines a, b; name one, .*t\.py:FUNCTION, or call it evaluate",
        ),
        ("x = 1\n", r"t\.py defines no function; name one"),
        ("def a(:\n", "is not Python"),
    ):
        path.write_text(code)
        with pytest.raises(UserError, match=message):
            load_target(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        load_target(str(tmp_path / "gone.py"))


def test_the_built_in_target_takes_instruction_rows(tmp_path, tiny_folder, started):
    task = instruction_task("number")
    rows = [{"instruction": "Add 1 and 2.", "output": "The result is 3."}]
    rows += [{"instruction": "Add.", "input": "4 and 5", "output": "9"}]
    validation = read_examples([*rows, {"input": "Add 2 and 2.", "output": "4"}], "valid", task.reading)
    assert validation[1] == {"input": "Add.\n\n4 and 5", "output": "9"} and validation[2]["input"] == "Add 2 and 2."
    found = SftTarget(task, tmp_path, str(tiny_folder), 1, "--batch-size 2")(rows, validation)
    assert set(found) == {"accuracy", "mean_score", "valid_loss"} and 0 <= found["accuracy"] <= 1
    (folder,) = (tmp_path / "target").iterdir()
    written = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [[turn["content"] for turn in row["messages"]] for row in written] == [
        ["Add 1 and 2.", "The result is 3."], ["Add.\n\n4 and 5", "9"]
    ]  # fmt: skip


def test_rows_for_sft_are_the_pipelines():
    task = load_task(SHIPPED / "arithmetic.yaml")
    row = {"input": "1 + 2 =", "output": "3"}
    assert sft_row(task, row, chat=False) == {"prompt": "1 + 2 =", "completion": " 3"}
    assert sft_row(task, row, chat=True)["messages"] == [
        {"role": "user", "content": "1 + 2 ="}, {"role": "assistant", "content": "3"}
    ]  # fmt: skip
