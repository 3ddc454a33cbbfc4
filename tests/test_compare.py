"""training.compare: which flags differ, the last figures, one panel a metric with a curve a run."""

import json

import pytest

from tests.scripts import call, fails
from training import compare
from training.compare import compared_panels, differing_flags, last_figures


def run_in(folder, flags, rows, finished=True):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**flags, "output_dir": str(folder), "save_file": folder.name}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


@pytest.fixture
def runs(tmp_path):
    first = run_in(tmp_path / "a", {"seed": 0, "learning_rate": None, "iters": 9}, [
        {"step": 0, "valid_loss": 3.0}, {"step": 9, "train_loss": 1.5, "train_accuracy": 0.5},
        {"step": 9, "valid_loss": 2.0},
    ])  # fmt: skip
    second = run_in(tmp_path / "b", {"seed": 1, "learning_rate": 1e-4, "iters": 9, "epochs": 2}, [
        {"step": 0, "valid_loss": 3.5}, {"step": 4, "valid_loss": 1.0},
    ], finished=False)  # fmt: skip
    return first, second


def test_tables_and_picture(runs, tmp_path, capsys):
    picture = tmp_path / "both.png"
    call(compare.main, *runs, "--output", picture)
    said = capsys.readouterr().out
    assert [line.split() for line in said.split("\n\n")[0].splitlines()] == [
        ["flag", "a", "b"], ["--seed", "0", "1"], ["--learning-rate", "null", "0.0001"], ["--epochs", "–", "2"],
    ]  # fmt: skip
    assert "valid loss   2.0000  1.0000" in said and "loss         1.5000       –" in said
    assert "b has not finished" in said and "a has not finished" not in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_metric_is_drawn_once_with_a_curve_a_run():
    rows = {"a": [{"step": 1, "kl": 0.5, "mean_score": 1.0}], "b": [{"step": 2, "kl": 0.25}]}
    panels = {panel.title: panel for panel in compared_panels(rows)}
    assert list(panels) == ["score", "KL"] and panels["KL"].unit == "nats per completion"
    assert panels["KL"].curves == {"a": [(1, 0.5)], "b": [(2, 0.25)]}
    assert panels["score"].curves == {"a": [(1, 1.0)]}


def test_a_tuner_s_metrics_have_names_of_their_own():
    rows = {"a": [{"step": 1, "accuracy": 0.5, "best": 0.5}], "b": [{"step": 1, "accuracy": 0.75, "best": 0.75}]}
    assert [panel.title for panel in compared_panels(rows)] == ["accuracy", "best"]
    assert last_figures(rows)[2:] == [["accuracy", "0.5", "0.75"], ["best", "0.5", "0.75"]]


def test_equal_flags_are_said_to_be(tmp_path):
    assert len(differing_flags({"a": {"seed": 1, "save_file": "x"}, "b": {"seed": 1, "save_file": "y"}})) == 1


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    assert "no metrics.jsonl" in fails(capsys, compare.main, tmp_path / "none", "--output", tmp_path / "c.png")
    assert "named twice" in fails(capsys, compare.main, runs[0], runs[0], "--output", tmp_path / "c.png")
