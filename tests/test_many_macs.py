"""Several processes by mlx.launch do what one does, and end together (docs/many_macs.md)."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import evaluate
import sft
import talk_to_model
from common.errors import UserError
from common.files import read_json, write_json
from models.adapters import AdapterConfig, adapter_weights, attach_adapter, read_adapter, write_adapter
from models.loading import load
from models.sharding import check_family
from models.value_head import new_value_head
from synth import run as synth_run
from synth.offline.server import OfflineTeacher
from tests import launched
from tests.architectures import build
from tests.conftest import tiny_random_folder
from tests.scripts import ROOT, call, fails
from tests.test_run import SUMS, TINY, asked_of, in_this_process
from training.metrics import read_metrics
from training.ranks import ALONE

LAUNCHER = (sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()")  # mlx.launch
TIMES = ("steps_per_second", "tokens_per_second", "waiting_share", "peak_memory_gb", "rollout_seconds",
         "update_seconds", "seconds")  # fmt: skip
LIMIT = 300  # seconds; alone on a machine, a launch takes a few


def free_port(count):
    """The first of `count` ports that were free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return min(port, 65_500 - count)


def launch(size, *words, cwd=ROOT):
    """Run `python -m tests.launched WORDS` in `size` processes of one thread each; returns the launcher's result."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [*LAUNCHER, "-n", str(size), "-p", str(free_port(size)), "--", sys.executable, "-m", "tests.launched"]
    read, write = os.pipe()  # an input without an end: at its end the launcher would keep a core busy
    try:
        return subprocess.run(
            [*command, *map(str, words)],
            cwd=cwd, env={**os.environ, **environment}, stdin=read, capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
    finally:
        os.close(read)
        os.close(write)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and rows of every kind."""
    folder, rng = tmp_path_factory.mktemp("many"), random.Random(0)
    tiny_random_folder(folder / "model")
    tiny_random_folder(folder / "other", seed=1)

    def text():
        return " ".join(str(2 * rng.randrange(50)) for _ in range(rng.randrange(2, 9)))

    for split, count in (("train", 13), ("valid", 9)):
        write_rows(folder / f"texts_{split}.jsonl", [{"text": text()} for _ in range(count)])
        rewards = [{"text": text(), "reward": rng.randrange(4)} for _ in range(count)]
        write_rows(folder / f"rewards_{split}.jsonl", rewards)
        pairs = [{"prompt": "2 4", "chosen": f" {text()}", "rejected": f" {text()}"} for _ in range(count)]
        write_rows(folder / f"pairs_{split}.jsonl", pairs)
    write_qwen2(folder / "model", folder / "qwen2")
    for name in ("model", "qwen2"):
        write_adapter_of(folder / name, folder / f"{name}-adapter")
    write_adapter_of(folder / "other", folder / "reward", with_head=True)
    return folder


def write_qwen2(llama, folder):
    """The same weights as a Qwen 2, which has biases besides."""
    shutil.copytree(llama, folder)
    config = read_json(folder / "config.json") | {"model_type": "qwen2"}
    write_json(folder / "config.json", config)
    weights = mx.load(str(folder / "model.safetensors"))
    for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        weights[name.replace("weight", "bias")] = mx.random.normal(weights[name].shape[:1], key=mx.random.key(3))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def write_adapter_of(model, path, with_head=False):
    """A LoRA on a model folder, as if trained, with a value head or not."""
    loaded, config = load(str(model)), AdapterConfig(model=str(model))
    attach_adapter(loaded.model, config)
    moved = {
        name: mx.random.normal(array.shape, scale=0.3, key=mx.random.key(number))
        for number, (name, array) in enumerate(adapter_weights(loaded.model).items())
    }
    write_adapter(path, moved, config, new_value_head(loaded.model, std=None) if with_head else None)


@pytest.fixture(scope="module")
def of_two(folder):
    """What two processes trained: weights by run and name, and what was found."""
    launched.ppo_by_script(folder, "begun by one", ALONE, "--num-steps", 2)
    done = launch(2, "train", folder)
    assert (folder / "found-2.json").is_file(), done.stdout + done.stderr
    return mx.load(str(folder / "weights-2.npz")), json.loads((folder / "found-2.json").read_text(encoding="utf-8"))


def arrays_of(path):
    return {name: np.array(array) for name, array in read_adapter(path).weights.items()}


def without_times(row):
    """The figures of a report that do not depend on how long it took."""
    return {key: value for key, value in row.items() if key not in TIMES}


def assert_same_run(of_two, name, weights, history):
    """Weights within 1e-5; figures, too, relative to those above 1."""
    trained, found = of_two
    for key, array in weights.items():
        np.testing.assert_allclose(np.array(trained[f"{name}/{key}"]), np.array(array), rtol=0, atol=1e-5)
    assert len(found[name]) == len(history)
    for row, expected in zip(found[name], history, strict=True):
        assert without_times(row) == pytest.approx(without_times(expected), 1e-5, 1e-5)


@pytest.mark.parametrize("name", launched.SFT_RUNS)
def test_two_processes_train_what_one_does(folder, of_two, name):
    weights, history = launched.train_by_sft(folder, name)
    assert_same_run(of_two, name, weights, history)
    assert sum(0 <= row.get("waiting_share", -1) < 1 for row in of_two[1][name]) == 3


@pytest.mark.parametrize("name", launched.PPO_RUNS)
def test_two_processes_learn_by_ppo_what_one_does(folder, of_two, name):
    weights, history = launched.train_by_ppo(folder, name)
    assert_same_run(of_two, name, weights, history)
    made = [(row["updates"], row["skipped_updates"]) for row in history]
    assert made == {
        "gae": [(4, 0)] * 3,
        "group": [(12, 0)] * 3,
        "rloo": [(1, 0)] * 3,  # then the target KL is passed
        "pieces": [(6, 0)] * 3,
        "not finite": [(3, 1), (4, 0), (4, 0)],
    }[name]
    assert all(0 < row["waiting_share"] < 1 for row in of_two[1][name])


def test_two_processes_evaluate_as_one_does(folder, of_two):
    alone, found = launched.evaluated(folder), of_two[1]["evaluation"]
    assert found.pop("kl") == pytest.approx(alone.pop("kl"), abs=1e-5)
    assert found == alone and len(set(alone["texts"])) > 5


def test_two_processes_draw_the_rollouts_of_one(folder, of_two):
    assert launched.rollouts(folder) == of_two[1]["rollouts"] and len(set(of_two[1]["rollouts"])) > 10


def test_ppo_goes_on_with_another_number_of_processes(folder, of_two):
    launched.ppo_by_script(folder, "begun by two", ALONE, "--num-steps", 4)
    launched.ppo_by_script(folder, "whole", ALONE, "--num-steps", 4)
    expected = [without_times(row) for row in read_metrics(folder / "whole")]
    assert len(expected) == 4
    for name in ("begun by one", "begun by two"):
        for key, array in arrays_of(folder / "whole-adapter").items():
            np.testing.assert_allclose(arrays_of(folder / f"{name}-adapter")[key], array, rtol=0, atol=1e-5)
        for row, figures in zip(read_metrics(folder / name), expected, strict=True):
            assert without_times(row) == pytest.approx(figures, 1e-5, 1e-5, nan_ok=True)


def figures_of(printed):
    """What evaluate.py prints of each model and of their difference."""
    lines = printed["evaluated"].splitlines()
    return [line for line in lines if re.match(r"\s*(score|length|KL|first less|the first) ", line)]


@pytest.mark.parametrize("way", launched.FAMILIES)
def test_a_divided_model_says_what_a_whole_one_does(folder, of_two, way):
    divided, whole = of_two[1]["divided"][way], launched.divided(folder, way)
    rows = [(folder / f"{way}-{size}.jsonl").read_text(encoding="utf-8").splitlines() for size in (1, 2)]
    assert len(rows[0]) == 22 and len(set(rows[0])) > 15
    for row, expected in zip(*(map(json.loads, some) for some in rows), strict=True):
        assert row.pop("reward") == pytest.approx(expected.pop("reward"), abs=1e-5) and row == expected
    assert figures_of(divided) == figures_of(whole) and len(figures_of(whole)) > 6
    assert divided["talked"] == whole["talked"] and len(set(whole["talked"].splitlines())) == 3


def test_a_process_holds_its_share_of_a_divided_model_alone(folder, of_two):
    whole = {name: array.size for name, array in mx.load(str(folder / "qwen2" / "model.safetensors")).items()}
    layers = [sum(size for name, size in whole.items() if f"layers.{layer}." in name) for layer in (0, 1)]
    outside = sum(whole.values()) - sum(layers)
    assert of_two[1]["share sizes"]["pipeline"] == [outside + layers[1], outside + layers[0]]
    first, second = of_two[1]["share sizes"]["tensor"]
    norms = 2 * 2 * 64  # are whole on both; Llama has no biases
    matrices = sum(size for name, size in whole.items() if "layers." in name and "proj.weight" in name)
    assert first == second == outside + norms + matrices // 2


@pytest.mark.parametrize(
    ("name", "way", "size", "said"),
    [
        ("model", "pipeline", 2, "no pipeline sharding for .*llama.*; use --shard tensor"),
        ("model", "tensor", 4, "has 2 key-value heads, which 4 processes cannot share equally; start another number"),
        ("gpt2", "tensor", 2, "no tensor sharding for .*gpt2.*; use a model of another family"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(name, way, size, said):
    model = build({"model": "llama-tied"}.get(name, name))
    with pytest.raises(UserError, match=said):
        check_family(model, name, way, size)


@pytest.mark.parametrize("script", [evaluate, talk_to_model])
def test_a_single_process_divides_nothing(folder, capsys, script):
    reward = ["--ground-truth-reward"] if script is evaluate else []
    said = fails(capsys, script.main, "--model", folder / "model", *reward, "--shard", "tensor")
    assert "start them by: mlx.launch -n 2 -- python" in said


def test_other_data_on_a_rank_is_refused_on_all_with_its_name(of_two):
    first, second = of_two[1]["refusal"]
    assert first == second
    assert re.fullmatch(r"rank 1 has another data than rank 0 .*; start every process with .* the same files", first)


def test_a_whole_synthesis_is_that_of_one_process(folder, tmp_path, monkeypatch):
    evaluation = tmp_path / "evaluation.jsonl"
    write_rows(evaluation, [{"input": f"{n} + 1 =", "output": str(n + 1)} for n in range(5)])
    in_this_process(monkeypatch)
    with OfflineTeacher() as teacher:
        words = [*SUMS, *TINY, *asked_of(teacher), "--base-model", folder / "model", "--dataset-path", evaluation]
        # None is held out, so that the last checkpoint is chosen.
        words += ["--train-by", "sft", "--learning-rate", 0.05, "--held-out", 0]
        done = launch(2, "synth", *words, "--output-dir", tmp_path / "run-2")
        call(synth_run.main, *words, "--output-dir", tmp_path / "run-1")
    runs = [tmp_path / f"run-{size}" for size in (1, 2)]
    assert (runs[1] / "report.html").is_file(), done.stdout + done.stderr
    files = [f"{name}.jsonl" for name in ("generate", "verify", "difficulty", "selection", "prompts", "evaluation")]
    for name in (*files, "checkpoints.json", "evaluation.json"):
        alone, together = ((run / name).read_text(encoding="utf-8") for run in runs)
        assert together == alone != "", name
    answers = [json.loads(line) for line in (runs[1] / "evaluation.jsonl").read_text().splitlines()]
    assert any(row["base"] != row["trained"] for row in answers)
    for name, array in arrays_of(runs[0] / "adapter").items():
        np.testing.assert_allclose(arrays_of(runs[1] / "adapter")[name], array, rtol=0, atol=1e-5)
    assert done.stdout.count("pass rates before:") == done.stdout.count("checkpoint: step") == 1


@pytest.mark.parametrize(("how", "lost"), [("killed", 0), ("hanging", 1), ("cut off", 1)])
def test_a_lost_rank_ends_all_and_any_number_of_processes_goes_on(folder, tmp_path, monkeypatch, how, lost):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "plot_run", lambda folder: "")
    flags = ["--train", "--model", folder / "model", "--data", folder, "--data-base", "texts_", "--iters", 8,
             "--steps-per-report", 2, "--steps-per-eval", 4, "--save-every", 3, "--batch-size", 4]  # fmt: skip
    done = launch(2, "lose", how, lost, 4, *flags, "--save-file", "cut", "--output-dir", "run", cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == [
        f"error: rank {lost} of 2 has ended or cannot be reached, so all end; the last checkpoint stands; continue "
        "with: mlx.launch -n 2 python sft.py --resume run"
    ], done.stderr
    assert [path.name for path in sorted(Path("run/checkpoints").iterdir())] == ["000000", "000003"]

    call(sft.main, "--resume", "run")
    call(sft.main, *flags, "--save-file", "whole", "--output-dir", "whole_run")
    for name, array in arrays_of("whole").items():
        np.testing.assert_allclose(arrays_of("cut")[name], array, rtol=0, atol=1e-5)
    losses = [[row["train_loss"] for row in read_metrics(run) if "train_loss" in row] for run in ("run", "whole_run")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4
