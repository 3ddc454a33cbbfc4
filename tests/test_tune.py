"""python -m synth.tune: what it refuses, the examples, a real kill and the resume, the commands of docs/tuner.md."""

import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml

import sft
from common.files import read_json
from synth import tune
from synth.offline.instructions import starting
from synth.tuning import log as tuner_log
from synth.tuning import targets
from synth.tuning.config import load_config
from tests.scripts import ROOT, call, fails
from training.metrics import start_run_folder

EXAMPLES = ROOT / "synth" / "tuning" / "examples"
DOCS = (ROOT / "docs" / "tuner.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}python -m synth\.tune (.*)$", DOCS, flags=re.MULTILINE)
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", DOCS, flags=re.DOTALL))
# Notes when a call begins and when it ends, and waits between for as long as `hold` is there.
SLOW_TARGET = """
import time
from pathlib import Path

HERE = Path(__file__).parent


def target(rows):
    with (HERE / "calls.txt").open("a") as calls:
        print("begun", file=calls)
    begun = (HERE / "calls.txt").read_text().split().count("begun")
    while begun == 3 and (HERE / "hold").exists():
        time.sleep(0.01)
    with (HERE / "calls.txt").open("a") as calls:
        print("ended", file=calls)
    return {"accuracy": len({row["input"] for row in rows}) / 10 + len(rows[0]["input"]) / 100}
"""


def write_config(folder, **content):
    tuning = {"enable_rl_tuning": True, "num_iterations": 4, "batch_size": 6, **content.pop("rl_tuning", {})}
    task = str(ROOT / "tests" / "sums.yaml")
    path = folder / "tuner.yaml"
    path.write_text(yaml.safe_dump({"task": task, **content, "rl_tuning": tuning}), encoding="utf-8")
    return path


def history_of(folder):
    return read_json(folder / "tuner" / "tuner.json")["history"]


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(tuner_log, "plot_panels", lambda path, *_: None)


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    off = write_config(tmp_path, rl_tuning={"enable_rl_tuning": False})
    assert fails(capsys, tune.main) == (
        "neither --config nor --resume is given; name a YAML file such as docs/tuner.md shows"
    )
    assert "tuner.yaml sets rl_tuning.enable_rl_tuning to false; set it to true" in fails(
        capsys, tune.main, "-c", off, "--output-dir", tmp_path / "run"
    )
    assert "no config.json" in fails(capsys, tune.main, "--resume", tmp_path / "nothing")
    assert "--confirm is -1" in fails(capsys, tune.main, "-c", off, "--confirm", -1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "has no evaluation rows to validate on; give validation_data_path"),
        ({"task": ""}, "neither a target nor a task is named"),
        ({"rl_tuning": {"target_model_path": "t.py:both"}}, "t.py:both takes a validation set, and there is none"),
        ({"rl_tuning": {"target_model_path": "t.py:none"}}, "defines no 'none'"),
        (
            {"rl_tuning": {"target_model_path": "t.py:rows", "validation_data_path": "v.jsonl"}},
            "v.jsonl cannot be read",
        ),
        ({"task": "", "generator": "task", "rl_tuning": {"target_model_path": "t.py:rows"}}, "no task is named"),
        ({"rl_tuning": {"target_model_path": "t.py"}}, "t.py defines both, rows; name one"),
        ({"task": "", "generator": "evol_instruct"}, "has no evaluation rows to validate on"),
    ],
)
def test_a_target_or_its_rows_that_are_missing_are_one_line(tmp_path, capsys, changes, message):
    (tmp_path / "t.py").write_text("def both(rows, validation): ...\ndef rows(rows): ...\n")
    path = write_config(tmp_path, **changes)
    assert message in fails(capsys, tune.main, "-c", path, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_example_whose_package_is_missing_says_so_before_a_teacher_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.pipeline", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    said = fails(capsys, tune.main, "-c", EXAMPLES / "reviews.yaml", "--output-dir", tmp_path / "run")
    assert "classifier.py needs sklearn, which is not installed; run: " in said
    assert said.endswith(" -m pip install scikit-learn")
    assert not (tmp_path / "run").exists()


def test_instructions_for_a_language_model_without_a_task(tmp_path, tiny_folder, monkeypatch, no_picture, capsys):
    """generator: evol_instruct with the built-in target, on rows of the user's own."""
    monkeypatch.setattr(targets, "run_script", lambda words, go_on, files=(): call(sft.main, *words[1:]))
    monkeypatch.setattr(sft, "plot_run", lambda folder: folder / "curves.png")
    (tmp_path / "valid.jsonl").write_text('{"instruction": "Add 1 and 2.", "output": "3"}\n')
    (tmp_path / "seeds.txt").write_text("\n".join(starting(4, 0)))
    content: dict[str, Any] = {"task": "", "generator": "evol_instruct", "answer": "number", "seed_data": "seeds.txt"}
    content |= {"methods": ["generate_from_seed", "evolve_instructions"], "sft_model": str(tiny_folder), "sft_iters": 1}
    tuning = {"num_iterations": 1, "batch_size": 4, "validation_data_path": "valid.jsonl"}
    path = write_config(tmp_path, **content, sft_flags="--batch-size 1", rl_tuning=tuning)
    call(tune.main, "-c", path, "--output-dir", tmp_path / "run")
    history = history_of(tmp_path / "run")
    assert history[0]["settings"]["method"] == "evolve_instructions" and set(history[0]["sample"][0]) == {
        "instruction", "output"
    }  # fmt: skip
    assert "best of 2 iterations" in capsys.readouterr().out


def test_a_resumed_run_refuses_another_configuration_even_before_its_first_iteration(tmp_path, capsys):
    start_run_folder(tmp_path / "run", load_config(write_config(tmp_path)).as_dict())
    before = (tmp_path / "run" / "config.json").read_bytes()
    other = write_config(tmp_path, seed=7, templates=["plain", "careful"], rl_tuning={"learning_rate": 0.1})
    line = fails(capsys, tune.main, "--resume", tmp_path / "run", "-c", other)
    assert line.startswith(f"{tmp_path / 'run'} was begun with another configuration: ") and "seed 7 (it has 0)" in line
    assert "templates {" in line and "rl_tuning.learning_rate 0.1 (it has 0.001)" in line
    line = fails(capsys, tune.main, "--resume", tmp_path / "run", "--output-dir", tmp_path / "other")
    assert line == f"--output-dir {tmp_path / 'other'} is not taken with --resume, which goes on in its own folder"
    assert (tmp_path / "run" / "config.json").read_bytes() == before and not (tmp_path / "other").exists()


def test_an_interval_needs_five_batches():
    found = {"start": [0.5] * 5, "best": [0.6, 0.7, 0.6, 0.7, 0.65]}
    line = tune.confirmation(found, "f1")
    assert line.startswith("on 5 fresh batches each: f1 0.650 with the best settings, 0.500 with the initial ones; d")
    assert "difference 0.150 [0.1" in line
    few = tune.confirmation({name: some[:4] for name, some in found.items()}, "f1")
    assert few.endswith("; for an interval use 5 batches or more")


def test_the_reviews_example(tmp_path, no_picture, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn, which is optional, is not installed")
    content = yaml.safe_load((EXAMPLES / "reviews.yaml").read_text(encoding="utf-8"))
    content["rl_tuning"] |= {"num_iterations": 3, "batch_size": 40}
    for key in ("target_model_path", "validation_data_path"):
        content["rl_tuning"][key] = str(EXAMPLES / content["rl_tuning"][key])
    path = write_config(tmp_path, **{**content, "task": str(EXAMPLES / content["task"])})
    call(tune.main, "-c", path, "--output-dir", tmp_path / "run", "--confirm", 2)
    said = capsys.readouterr().out
    assert "best of 4 iterations" in said and "on 2 fresh batches each: accuracy 0." in said
    history = [json.loads(line) for line in (tmp_path / "run" / "iterations.jsonl").read_text().splitlines()]
    assert len(history) == 4 and all(0.4 < row["metric"] < 1 for row in history)
    before = (tmp_path / "run" / "tuner" / "tuner.json").read_bytes()
    call(tune.main, "--resume", tmp_path / "run")  # finished: nothing is done again
    assert (tmp_path / "run" / "tuner" / "tuner.json").read_bytes() == before
    path.write_text(path.read_text().replace("num_iterations: 3", "num_iterations: 4"))
    capsys.readouterr()
    for words in (["--resume", tmp_path / "run", "-c", path], ["--resume", tmp_path / "run"]):  # a longer search
        call(tune.main, *words)
        assert len(history_of(tmp_path / "run")) == 5
    named = [line for line in capsys.readouterr().out.splitlines() if " is now " in line]
    assert named == ["rl_tuning.num_iterations is now 4; the run had 3"]
    assert "run holds a run already" in fails(capsys, tune.main, "-c", path, "--output-dir", tmp_path / "run")


def test_the_digits_example_on_an_untrained_model(tmp_path, tiny_folder, monkeypatch, no_picture):
    def run_script(words, go_on, files=()):
        assert go_on == f"python -m synth.tune --resume {tmp_path / 'run'}" and len(files) == 1
        call(sft.main, *words[1:])

    monkeypatch.setattr(targets, "run_script", run_script)
    monkeypatch.setattr(sft, "plot_run", lambda folder: folder / "curves.png")
    content = yaml.safe_load((EXAMPLES / "digits.yaml").read_text(encoding="utf-8"))
    content |= {"task": str(EXAMPLES / content["task"]), "sft_model": str(tiny_folder), "sft_iters": 1}
    content["rl_tuning"] |= {"num_iterations": 1, "batch_size": 8}
    rows = (EXAMPLES / "digits_valid.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "valid.jsonl").write_text("\n".join(rows[:4]) + "\n")
    content["rl_tuning"]["validation_data_path"] = "valid.jsonl"
    call(tune.main, "-c", write_config(tmp_path, **content), "--output-dir", tmp_path / "run")
    history = [json.loads(line) for line in (tmp_path / "run" / "iterations.jsonl").read_text().splitlines()]
    assert len(history) == 2 and set(history[1]["metrics"]) == {"accuracy", "mean_score", "valid_loss"}
    assert len(list((tmp_path / "run" / "target").iterdir())) == 2


def test_a_killed_run_goes_on_without_calling_the_target_again(tmp_path, no_picture):
    """Killed in the third call: that one is made again, and no other; the end is that of a run never disturbed."""
    (tmp_path / "slow.py").write_text(SLOW_TARGET)
    (tmp_path / "hold").touch()
    path = write_config(
        tmp_path, rl_tuning={"target_model_path": "slow.py:target", "rl_algorithm": "ppo", "update_every": 2}
    )
    command = [sys.executable, "-m", "synth.tune", "--config", str(path), "--output-dir", str(tmp_path / "cut")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    calls, deadline = tmp_path / "calls.txt", time.monotonic() + 60
    while not (calls.exists() and calls.read_text().split().count("begun") == 3) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert calls.read_text().split() == ["begun", "ended", "begun", "ended", "begun"]
    assert len(history_of(tmp_path / "cut")) == 2
    (tmp_path / "hold").unlink()
    call(tune.main, "--resume", tmp_path / "cut")
    assert calls.read_text().split().count("ended") == 5 and calls.read_text().split().count("begun") == 6
    call(tune.main, "--config", path, "--output-dir", tmp_path / "whole")
    assert history_of(tmp_path / "cut") == history_of(tmp_path / "whole")
    ledger = [read_json(tmp_path / name / "ledger.json")["total"]["calls"] for name in ("cut", "whole")]
    assert ledger[0] == ledger[1]  # nor was the teacher asked anything twice


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_docs_is_one_it_takes(command):
    args = tune.parse_args(shlex.split(command))
    if args.config and args.config != "tuner.yaml":
        assert load_config(ROOT / args.config).rl_tuning.enable_rl_tuning


def test_the_docs_files_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn, which is optional, is not installed")
    assert set(FILES) == {"my_target.py", "tuner.yaml", "search.py"} and len(COMMANDS) == 5
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "my_task.yaml").write_bytes((ROOT / "synth" / "tasks" / "reviews.yaml").read_bytes())
    (tmp_path / "validation.jsonl").write_bytes((EXAMPLES / "reviews_valid.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    runpy.run_path("search.py")
    assert "template plain" in capsys.readouterr().out and (tmp_path / "state" / "tuner.json").is_file()
