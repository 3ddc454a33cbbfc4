"""A stop is never a loss, with real processes: killed and resumed, a run ends as if it had never been disturbed, bit
for bit. So it does when the resumed run is stopped by SIGTERM as well.

A start costs seconds, so undisturbed runs and last stretches share a process: this one for mlx, one more for torch,
which would multiply by the BLAS of models.cpu.blas in this one.

python -m pytest tests/test_kill_resume.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import ppo_training
import sft
from tests.scripts import ROOT, call, read_samples
from tests.torch_models import random_llama
from training.checkpoint_folders import last_checkpoint
from training.metrics import read_metrics

HERE = {"sft": sft, "ppo_training": ppo_training}
KINDS: dict[str, list[Any]] = {"lora": [], "soft_prompt": ["--prompt-tuning"]}
PPO: list[Any] = ["--ground-truth-reward", "--batch-size", 8, "--mini-batch-size", 4, "--max-completion-length", 6]
PPO += ["--num-steps", 16, "--save-every", 2, "--horizon", 50, "--normalize-scores"]
# Runs one command line after another, without pictures, which are no part of what is compared.
TORCH_PROGRAM = """
import json, sys
import pytorch_ppo_training as script
script.plot_run = lambda folder: folder / "curves.png"
for words in json.loads(sys.argv[1]):
    sys.argv = ["pytorch_ppo_training.py", *words]
    script.main()
"""
OWN_FLAGS: dict[str, list[Any]] = {
    "sft": [
        "--train",
        "--lora-dropout",
        0.1,
        "--iters",
        60,
        "--save-every",
        4,
        "--steps-per-report",
        3,
        "--steps-per-eval",
        25,
    ],
    "ppo_training": PPO,
    "pytorch_ppo_training": [*PPO, "--device", "cpu"],
}
STEPS = {"sft": 60, "ppo_training": 16, "pytorch_ppo_training": 16}
CASES = [(script, kind) for script in OWN_FLAGS for kind in KINDS]
TIMES = {"seconds", "rollout_seconds", "update_seconds", "steps_per_second", "tokens_per_second", "peak_memory_gb"}
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command line of a run, by script, kind and name."""
    folder = tmp_path_factory.mktemp("runs")
    base = random_llama(folder / "base")
    for split in ("train", "valid"):
        rows = [{"text": " ".join(str(2 * i + start) for i in range(start % 5 + 2))} for start in range(40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"digits_{split}.jsonl").write_text(lines, encoding="utf-8")

    def build(script, kind, name):
        own = [*OWN_FLAGS[script], *KINDS[kind], "--lr-schedule", "cosine", "--warmup-steps", 3]
        data = ["--data", folder, "--data-base", "digits_"] if script == "sft" else []
        run = folder / f"{script}-{kind}-{name}"
        places = ["--model", base, "--output-dir", run, "--save-file", run.with_suffix(".safetensors")]
        return [*own, *data, *places], run

    return build


def start(script, *command):
    """A process of `script`. mlx has as many threads as here, on which the last bit depends; torch has one, as more
    would wait for each other where the cores are busy."""
    environment = os.environ | ({} if script in HERE else {"OMP_NUM_THREADS": "1"})
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def step_saved(run: Path) -> int:
    """The step of the last checkpoint; 0 where there is none as yet."""
    return max((int(folder.name) for folder in (run / "checkpoints").glob("[0-9]*")), default=0)


def send_after_a_checkpoint(process, run: Path, number: int) -> str:
    """Send the signal once a later checkpoint is there than now; returns what the process printed."""
    before, deadline = step_saved(run), time.monotonic() + PATIENCE
    while process.poll() is None and step_saved(run) <= before and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=PATIENCE)[0]


def disturb(script, kind, given, run: Path) -> None:
    """Start a run and kill it; with LoRA, go on with it and stop it by SIGTERM, too."""
    process = start(script, f"{script}.py", *given)
    said = send_after_a_checkpoint(process, run, signal.SIGKILL)
    killed_at = step_saved(run)
    assert process.returncode == -signal.SIGKILL and 0 < killed_at < STEPS[script], said
    if kind == "lora":
        process = start(script, f"{script}.py", "--resume", run)
        said = send_after_a_checkpoint(process, run, signal.SIGTERM)
        step = step_saved(run)
        assert process.returncode == 130 and killed_at < step < STEPS[script], said
        # It ended the step, saved it, and said how to go on.
        assert f"{step} of {STEPS[script]} steps are done; " in said
        assert f"; continue with: python {script}.py --resume {run}" in said
        assert "Traceback" not in said
    # A stop leaves the adapter so far, a kill only checkpoints.
    assert run.with_suffix(".safetensors").exists() == (kind == "lora")


@pytest.fixture(scope="module")
def disturbed(words) -> Iterator[dict[tuple[str, str], Future]]:
    """All the disturbed runs, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(disturb, *case, *words(*case, "cut")) for case in CASES}


def to_their_ends(script, monkeypatch, lines) -> None:
    """Run the command lines, one after another."""
    if script in HERE:
        monkeypatch.setattr(HERE[script], "plot_run", lambda folder: folder / "curves.png")
        for given in lines:
            call(HERE[script].main, *given)
    else:
        process = start(script, "-c", TORCH_PROGRAM, json.dumps([list(map(str, given)) for given in lines]))
        said = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, said


def left_by(run: Path) -> dict[str, str | bytes]:
    """All that a run leaves, as bytes, but the times: adapter, optimizer, value head, state and metrics."""
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run)]
    checkpoint = last_checkpoint(run)
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    arrays = {  # by name: a resumed optimizer may write them in another order
        f"{path.relative_to(checkpoint)}: {name}": array.tobytes()
        for path in checkpoint.rglob("*.safetensors")
        for name, array in load_file(path).items()
    }
    state.pop("seconds", None)
    return {
        "metrics": "\n".join(map(json.dumps, rows)),
        "samples": json.dumps(read_samples(run)),
        "state": json.dumps(state),
        "adapter": run.with_suffix(".safetensors").read_bytes(),
        **arrays,
    }


@pytest.mark.parametrize("script", OWN_FLAGS)
def test_a_disturbed_run_is_one_never_disturbed(disturbed, words, monkeypatch, script):
    lines = []
    for kind in KINDS:
        disturbed[script, kind].result()
        lines += [words(script, kind, "whole")[0], ["--resume", words(script, kind, "cut")[1]]]
    to_their_ends(script, monkeypatch, lines)
    for kind in KINDS:
        got, expected = (left_by(words(script, kind, name)[1]) for name in ("cut", "whole"))
        assert got.keys() == expected.keys()
        assert [name for name in expected if got[name] != expected[name]] == [], kind
        assert len(expected["metrics"].splitlines()) >= STEPS[script] // 3
