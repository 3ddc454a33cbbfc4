"""Several processes by torchrun do what one does, and end together (docs/many_macs.md): one launch shows all of it."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (requirements-torch.txt)")

from safetensors.torch import load_file

import pytorch_ppo_training as script
from common.errors import UserError
from models.torch_adapters import read_adapter
from tests import launched_torch
from tests.scripts import ROOT, call
from tests.torch_models import random_llama
from training import torch_ranks
from training.metrics import read_metrics

TIMES = {"seconds", "rollout_seconds", "update_seconds", "tokens_per_second", "peak_memory_gb", "waiting_share"}
LIMIT = 300  # seconds; alone on a machine, the launch takes about 20


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread and no pictures."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "plot_run", lambda folder: folder / "curves.png")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model, and what a launch of two processes made with it."""
    folder = tmp_path_factory.mktemp("torchrun")
    random_llama(folder / "model")
    call(script.main, *words(folder, "half"), "--num-steps", 2)
    command: list[object] = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += ["-m", "tests.launched_torch", folder, *words(folder, "cut"), "--num-steps", 4]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    (folder / "stderr").write_text(done.stderr, encoding="utf-8")
    assert (folder / "found-2.json").is_file(), done.stdout + done.stderr
    assert done.returncode != 0
    return folder


def words(folder, name):
    """The flags of a run by the script."""
    size = ("--batch-size", 8, "--mini-batch-size", 4, "--max-completion-length", 5, "--learning-rate", 1e-3)
    paths = ("--model", folder / "model", "--output-dir", folder / name, "--save-file", folder / f"{name}-adapter")
    more = ("--device", "cpu", "--save-every", 2, "--lr-schedule", "constant")
    return (*paths, *size, "--ground-truth-reward", *more)


def assert_close(figures, expected):
    assert {name: value for name, value in figures.items() if name not in TIMES} == pytest.approx(
        {name: value for name, value in expected.items() if name not in TIMES}, rel=1e-5, abs=1e-5, nan_ok=True
    )


@pytest.mark.parametrize("name", launched_torch.RUNS)
def test_two_processes_train_what_one_does(folder, name):
    found = json.loads((folder / "found-2.json").read_text(encoding="utf-8"))[name]
    trained = load_file(folder / "weights-2.safetensors")
    weights, history = launched_torch.train(folder, name)
    for key, weight in weights.items():
        np.testing.assert_allclose(trained[f"{name}/{key}"].numpy(), weight.numpy(), rtol=0, atol=1e-5)
    assert len(found) == len(history) == 3
    for row, expected in zip(found, history, strict=True):
        assert_close(row, expected)
    updates, skipped = ([row[key] for row in found] for key in ("updates", "skipped_updates"))
    if name == "stopped by its KL":
        assert min(updates) < 8 and min(updates) > 0
    assert skipped == [int("finite" in name), 0, 0]
    assert ("held_out_score" in found[1]) == (name == "gae")


def test_what_would_go_wrong_is_refused_on_all_ranks(folder):
    first, second = json.loads((folder / "found-2.json").read_text(encoding="utf-8"))["refusals"]
    assert first == second
    assert re.fullmatch(r"rank 1 has another data than rank 0 .*; start every process with .* the same files", first[0])
    assert "--mini-batch-size gives 1 rows to share, fewer than the 2 processes" in first[1]
    assert "--batch-size gives 1 prompts to share" in first[2]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_configuration_of_accelerate_that_divides_the_model_is_refused(monkeypatch, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"asks for {name}, which divides a model"), torch_ranks.launched():
        pass


def adapter(path):
    return {name: np.array(array) for name, array in read_adapter(path).weights.items()}


def test_any_number_of_processes_goes_on_with_a_run_and_a_killed_rank_ends_all(folder):
    said = [line for line in (folder / "stderr").read_text(encoding="utf-8").splitlines() if line.startswith("error:")]
    assert said == [
        "error: rank 1 of 2 has ended or cannot be reached, so all end; the last checkpoint stands; continue with: "
        f"torchrun --nproc-per-node 2 pytorch_ppo_training.py --resume {folder / 'cut'}"
    ]
    assert sorted(path.name for path in (folder / "cut" / "checkpoints").iterdir()) == ["000000", "000002"]

    call(script.main, "--resume", folder / "cut")
    call(script.main, *words(folder, "whole"), "--num-steps", 4)
    whole = read_metrics(folder / "whole")
    for name in ("half", "cut"):
        for key, array in adapter(folder / "whole-adapter").items():
            np.testing.assert_allclose(adapter(folder / f"{name}-adapter")[key], array, rtol=0, atol=1e-5)
        for row, expected in zip(read_metrics(folder / name), whole, strict=True):
            assert_close(row, expected)
