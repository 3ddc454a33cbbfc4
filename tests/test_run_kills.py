"""A run killed again and again, as it asks or as it writes a file, down to its evaluation: it ends as if undisturbed.

Every process is a fork of one that has imported all, so a start costs no seconds; the kills are real ones. In it the
training is a call and not a process of its own, so it dies along (tests/test_kill_resume.py kills the scripts).

    python -m pytest tests/test_run_kills.py
"""

import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tqdm import tqdm

import ppo_training
from benchmarks.crash import repeated, tables
from common.files import read_json
from synth import run as module
from synth.offline.server import OfflineTeacher
from synth.pipeline import train
from synth.pipeline.pass_rates import BaseModelSettings
from tests.scripts import with_words
from tests.test_difficulty import Adder
from training.metrics import read_metrics

WORDS = [
    "--task",
    "synth/tasks/arithmetic.yaml",
    "--count",
    10,
    "--votes",
    2,
    "--rounds",
    1,
    "--wanted",
    4,
    "--seed",
    3,
]
WORDS += [
    "--rollouts",
    2,
    "--max-rollouts",
    2,
    "--concurrency",
    4,
    "--teacher-model",
    "m",
    "--max-completion-length",
    3,
]
WORDS += ["--rule", "random", "--num-steps", 3, "--batch-size", 4, "--training-flags=--num-generations 2"]
KILLS = 6
TIMES = {"seconds", "rollout_seconds", "update_seconds", "tokens_per_second", "peak_memory_gb"}


def life(words, folder, moment):
    """One process of the run, which ends at its `moment`-th writing of a file: before odd ones, after even ones."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    tqdm.set_lock(threading.RLock())  # its own one would outlive a kill
    count, replace = 0, os.replace

    def dying(source, target):
        nonlocal count
        count += 1
        if count == moment and count % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    mock.patch.multiple(os, replace=dying, rename=dying).start()
    mock.patch.object(train, "run_script", lambda words, *_: with_words(ppo_training.main, *words[1:])).start()
    mock.patch.object(ppo_training, "plot_run", lambda folder: folder / "curves.png").start()
    begun = (Path(folder) / "config.json").is_file()
    with_words(module.main, *(["--resume", folder] if begun else [*words, "--output-dir", folder]))


def asking_life(words, folder):
    """One process of the run up to its training, with a base model that needs no weights."""
    tqdm.set_lock(threading.RLock())
    mock.patch.object(BaseModelSettings, "open", return_value=Adder()).start()
    mock.patch.object(module, "split", side_effect=SystemExit(0)).start()
    begun = (Path(folder) / "config.json").is_file()
    with_words(module.main, *(["--resume", folder] if begun else [*words, "--output-dir", folder]))


@pytest.fixture(scope="module")
def start():
    """start(target, *arguments) -> a process."""
    # On macOS a process must not fork once Metal was started.
    context: Any = multiprocessing.get_context("spawn" if platform.system() == "Darwin" else "forkserver")
    context.set_forkserver_preload(["tests.test_run_kills", "transformers.models.llama.configuration_llama"])

    def started(target, *arguments):
        process = context.Process(target=target, args=arguments)
        process.start()
        return process

    return started


def end_of(process):
    """Its exit code."""
    process.join(60)
    return process.exitcode


def killed_after(process, server, calls):
    """Its exit code, after a kill once it has made so many calls."""
    before = server.calls
    while process.is_alive() and server.calls < before + calls:
        time.sleep(0.001)
    process.kill()
    return end_of(process)


def left_by(folder):
    """All that a run leaves but the times and what was counted, by file."""
    names = ("generate", "verify", "pass_rates", "difficulty", "held_out", "selection", "prompts", "evaluation")
    found = {name: (folder / f"{name}.jsonl").read_bytes() for name in names}
    found |= {name: read_json(folder / f"{name}.json") for name in ("task", "checkpoints", "evaluation")}
    rows = read_metrics(folder / "training")
    found["metrics"] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    weights = {name: folder / name / "adapters.safetensors" for name in ("adapter", "last_adapter")}
    return found | {name: path.read_bytes() for name, path in weights.items()}


def test_killed_as_it_asks_it_asks_nothing_again(start, tmp_path):
    """Kills between any two calls; benchmarks/crash.py has more of them."""
    words, rng, codes = [*WORDS, "--count", 20, "--votes", 4], random.Random(0), []
    with OfflineTeacher() as server:
        assert end_of(start(asking_life, [*words, "--teacher-url", server.url], tmp_path / "whole")) == 0
        calls, asked = server.calls, server.asked.keys()
    with OfflineTeacher(latency_ms=5) as server:
        for _ in range(KILLS):
            process = start(asking_life, [*words, "--teacher-url", server.url], tmp_path / "cut")
            codes.append(killed_after(process, server, rng.randrange(1, calls // KILLS)))
        assert set(codes) == {-signal.SIGKILL}
        assert end_of(start(asking_life, [*words, "--teacher-url", server.url], tmp_path / "cut")) == 0
        assert repeated(server) <= KILLS * 4 and server.asked.keys() == asked
    assert tables(tmp_path / "cut") == tables(tmp_path / "whole") and len(tables(tmp_path / "cut")) == 4


def test_killed_as_it_writes_it_ends_as_if_undisturbed(start, tmp_path, tiny_folder):
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text("".join(json.dumps({"input": f"{n} + 1 =", "output": str(n + 1)}) + "\n" for n in range(4)))
    words = [*WORDS, "--base-model", tiny_folder, "--dataset-path", evaluation]
    with OfflineTeacher() as server:
        assert end_of(start(life, [*words, "--teacher-url", server.url], tmp_path / "whole", 0)) == 0
    rng, codes, late = random.Random(0), [-signal.SIGKILL], iter(range(1, 10))
    with OfflineTeacher() as server:
        while codes[-1] and len(codes) < 60:
            trained = (tmp_path / "cut" / "training" / "summary.json").is_file()
            moment = next(late, 0) if trained else rng.randrange(12, 17)
            codes.append(end_of(start(life, [*words, "--teacher-url", server.url], tmp_path / "cut", moment)))
        assert set(codes[:-1]) == {-signal.SIGKILL} and codes[-1] == 0 and next(late, 10) > 6
        assert repeated(server) <= 4 * len(codes)
    assert left_by(tmp_path / "cut") == left_by(tmp_path / "whole")
