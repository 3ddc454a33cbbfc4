"""Each stage by its own command: what they leave, one after another, is what synth.run leaves.

python -m pytest tests/test_stages_alone.py
"""

import json
import sys

import pytest

import ppo_training
from common.files import read_json
from synth import run as whole
from synth.offline.server import OfflineTeacher
from synth.pipeline import difficulty, generate, selection, verify
from synth.pipeline import train as alone
from synth.pipeline.pass_rates import BaseModelSettings
from synth.stages import kept, load_rows
from tests.scripts import call, fails
from tests.test_difficulty import Adder

TASK = ["--task", "synth/tasks/arithmetic.yaml"]
VOTES, TRIES = ["--votes", 3], ["--rollouts", 2, "--max-rollouts", 2, "--wanted", 12, "--rounds", 1]
BASE = ["--base-model", "tiny-digits"]


@pytest.fixture
def asked(tmp_path):
    library = tmp_path / "library.txt"
    library.write_text("To add two whole numbers, count on from the first. A carry moves to the next place value.")
    with OfflineTeacher() as server:
        yield ["--teacher-url", server.url, "--teacher-model", "m", "--cache", tmp_path / "cache"], library


def test_stages_one_to_six_leave_what_a_run_leaves(tmp_path, asked, monkeypatch, capsys):
    (teacher, library), folder = asked, tmp_path / "alone"
    monkeypatch.setattr(BaseModelSettings, "open", lambda self: Adder())
    monkeypatch.setattr(whole, "train_and_evaluate", lambda *_: sys.exit(0))
    flags = [*VOTES, *TRIES, "--passage-paths", library, "--held-out", 0, "--select", 5]
    with pytest.raises(SystemExit):
        call(whole.main, *TASK, "--count", 16, *flags, *teacher, "--output-dir", tmp_path / "whole")
    said = capsys.readouterr().out
    names = ("generate", "verify", "difficulty", "selection")
    made, voted, tried, chosen = (folder / f"{name}.jsonl" for name in names)
    extra = ["--library", library, *teacher]
    store = ["--rollout-store", folder / "rollouts.sqlite"]
    call(generate.main, *TASK, "--count", 16, "--out", made, *extra)
    call(verify.main, *TASK, "--in", made, "--out", voted, *VOTES, *extra)
    call(difficulty.main, *TASK, "--in", voted, "--out", tried, *TRIES, *VOTES, *store, *extra)
    call(selection.main, "--in", tried, "--out", chosen, "--count", 5)
    for path in (made, voted, tried, chosen):
        assert path.read_text() == (tmp_path / "whole" / path.name).read_text(), path.name
    alone_said = capsys.readouterr().out
    for line in said.splitlines():
        if line.startswith(("generate:", "verify:", "difficulty:", "selection:", "pass rates", "passages:")):
            assert line in alone_said

    call(generate.main, *TASK, "--only-passages", "--count", 5, "--out", tmp_path / "passages.jsonl", *extra)
    rows = [json.loads(line) for line in (tmp_path / "passages.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["library.txt#0"] and "carry" in rows[0]["keywords"]
    assert rows[0]["text"] == library.read_text() and "passages: kept 1 of 1" in capsys.readouterr().out
    words = [*TASK, "--only-passages", "--out", tmp_path / "none.jsonl", *teacher]
    assert "--only-passages needs a library" in fails(capsys, generate.main, *words)


def test_the_last_stage_trains_chooses_evaluates_and_goes_on(tmp_path, tiny_folder, monkeypatch, capsys):
    started = []

    def run_script(words, go_on, files=()):
        started.append((words[0], go_on))
        call(ppo_training.main, *words[1:])

    monkeypatch.setattr(alone, "run_script", run_script)
    monkeypatch.setattr(ppo_training, "plot_run", lambda folder: folder / "curves.png")
    rows = [{"id": f"g{n}", "input": f"{n} + 2 =", "output": str(n + 2)} for n in range(10)]
    rows[0]["dropped"] = "by hand"
    samples, task, folder = tmp_path / "mine.jsonl", tmp_path / "sums.yaml", tmp_path / "run"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task.write_text("instruction: Add.\nanswer: {type: number}\nevaluation: [{input: 1 + 1 =, output: 2}]\n")
    words = ["--task", task, "--in", samples, "--base-model", tiny_folder, "--output-dir", folder, "--num-steps", 2]
    words += ["--batch-size", 4, "--max-completion-length", 3, "--training-flags=--num-generations 2"]
    assert "--held-out is 2" in fails(capsys, alone.main, *words, "--held-out", 2) and not folder.exists()
    none = tmp_path / "none.jsonl"
    none.write_text(json.dumps(rows[0]) + "\n")
    assert "leaves no sample to train on" in fails(capsys, alone.main, *words, "--in", none) and not folder.exists()
    call(alone.main, *words)
    held_out, trained = (load_rows(folder / f"{name}.jsonl") for name in ("held_out", "selection"))
    assert len(held_out) == 2 and len(trained) == 7 and not [row for row in trained if row in held_out]
    assert (
        read_json(folder / "checkpoints.json")["held_out"] == 2
        and read_json(folder / "evaluation.json")["questions"] == 1
    )
    assert started == [("ppo_training.py", f"python -m synth.pipeline.train --resume {folder}")]
    assert "report: " in capsys.readouterr().out and (folder / "report.html").is_file()
    call(alone.main, "--resume", folder)
    assert len(started) == 1 and "training: finished before" in capsys.readouterr().out
    refused = fails(capsys, alone.main, "--resume", folder, "--num-steps", 3, "--batch-size", 4)
    assert "begun with other flags: --num-steps 3 (the run: 2); leave them out, or start a new run" in refused
    assert "give --task FILE and --in FILE" in fails(capsys, alone.main, "--task", task)
    call(alone.main, *words[:-5], *words[-5:], "--held-out-in", samples, "--output-dir", tmp_path / "other")
    assert load_rows(tmp_path / "other" / "held_out.jsonl") == kept(load_rows(samples))
