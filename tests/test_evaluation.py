"""The checkpoint by held-out samples, and two models on one evaluation set, with completions given instead of drawn."""

import json
from typing import Any

import pytest

from common.files import read_json, write_json
from models.adapters import CONFIG_FILE
from rewards.answers import answer_type
from synth.pipeline import evaluation
from synth.pipeline.evaluation import choose_checkpoint, evaluate, evaluation_line
from synth.pipeline.pass_rates import BaseModelSettings
from synth.stages import new_row
from synth.task import Task
from training.intervals import agresti_min, wilson

STORE: Any = None  # completions are given, not drawn
BASE = BaseModelSettings("base")
ROWS = [new_row(f"g{n}", f"{n} + 1 =", str(n + 1), "generated") for n in range(4)]
TASK = Task(
    "sums",
    "Add.",
    answer=answer_type("number"),
    evaluation=[{"input": f"{n} + 2", "output": str(n + 2)} for n in range(4)],
)


def run_folder(path, steps):
    for step in steps:
        folder = path / "checkpoints" / f"{step:06d}"
        write_json(folder / "state.json", {"step": step})
        write_json(folder / "adapter" / CONFIG_FILE, {"of step": step})
    return path


@pytest.fixture
def right(monkeypatch):
    """How many of the rows each adapter has right, by the step of its checkpoint or its name; and who was asked."""
    counts: dict[Any, Any] = {}
    asked: list[Any] = []

    def completions(model, task, rows, store):
        adapter = model.adapter
        name = adapter and (int(adapter.parent.name) if adapter.parent.name.isdigit() else adapter.name)
        asked.append(name)
        return [f" {row['output']}" if n < counts[name] else "no idea" for n, row in enumerate(rows)]

    monkeypatch.setattr(evaluation, "completions_of", completions)
    counts["asked"] = asked
    return counts


def test_the_best_checkpoint_on_held_out_samples_is_taken(tmp_path, right, capsys):
    right.update({0: 1, 10: 3, 20: 4, 30: 4, 40: 2})
    folder = run_folder(tmp_path / "training", [0, 10, 20, 30, 40])
    chosen = choose_checkpoint(BASE, TASK, folder, ROWS, tmp_path, STORE)
    assert read_json(chosen / CONFIG_FILE) == {"of step": 20}  # of two that are equal the earlier
    found = read_json(tmp_path / "checkpoints.json")
    assert found["chosen"] == 20 and [row["mean_score"] for row in found["checkpoints"]] == [0.25, 0.75, 1.0, 1.0, 0.5]
    assert "checkpoint: step 20 of 0: 0.250, 10: 0.750" in capsys.readouterr().out
    right["asked"].clear()
    assert choose_checkpoint(BASE, TASK, folder, ROWS, tmp_path, STORE) == chosen and not right["asked"]


def test_a_training_that_only_harmed_leaves_the_base_model(tmp_path, right):
    right.update({0: 2, 10: 1})
    chosen = choose_checkpoint(BASE, TASK, run_folder(tmp_path / "t", [0, 10]), ROWS, tmp_path, STORE)
    assert read_json(chosen / CONFIG_FILE) == {"of step": 0}


def test_without_held_out_samples_the_last_checkpoint_is_taken(tmp_path, right):
    right.update({0: 2, 10: 1})
    chosen = choose_checkpoint(BASE, TASK, run_folder(tmp_path / "t", [0, 10]), [], tmp_path, STORE)
    assert read_json(chosen / CONFIG_FILE) == {"of step": 10} and right["asked"] == [10]


def test_base_and_trained_are_compared_row_by_row_and_once(tmp_path, right):
    right.update({None: 1, "adapter": 3})
    result = evaluate(BASE, TASK, tmp_path / "adapter", tmp_path, STORE)
    assert result is not None and result == read_json(tmp_path / "evaluation.json")
    assert result["base"] == wilson(1, 4)._asdict() and result["trained"] == wilson(3, 4)._asdict()
    assert result["difference"] == {**agresti_min(2, 0, 4)._asdict(), "gained": 2, "lost": 0}
    assert result["mcnemar_p"] == 0.5 and result["questions"] == 4
    rows = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "input": "1 + 2",
        "output": "3",
        "base": "no idea",
        "trained": " 3",
        "base_score": 0.0,
        "trained_score": 1.0,
    }
    right["asked"].clear()
    assert evaluate(BASE, TASK, tmp_path / "adapter", tmp_path, STORE) == result and not right["asked"]
    assert "base 0.250 [" in evaluation_line(result) and "trained 0.750 [" in evaluation_line(result)
    assert evaluate(BASE, Task("t", "Do.", answer=TASK.answer), tmp_path / "adapter", tmp_path / "other", STORE) is None
    assert "--dataset-path" in evaluation_line(None)
