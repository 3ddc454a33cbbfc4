"""What the scripts write to: refused in one line, before any work, unless it is a regular file, ours, or nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

import evaluate
import fuse
import ppo_training
import sft
from common.cli import run
from common.errors import UserError
from models.adapter_config import AdapterConfig, check_adapter_path
from models.adapters import attach_adapter, save_adapter
from models.loading import load
from tests.scripts import ROOT, call, fails
from training.metrics import read_metrics

ADAPTER_FILES = {"adapter_config.json": '{"fine_tune_type": "lora"}', "adapters.safetensors": "weeks of mlx_lm.lora"}
PEFT_FILES = {"adapter_config.json": '{"peft_type": "LORA", "r": 8}', "adapter_model.safetensors": "weeks of peft"}
APP_FILES = {"config.json": '{"name": "app"}', "app.py": "print('hello')", "src/core.py": "pass"}


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, request):
    """A refusal comes before any model is opened."""
    if "refused" in request.node.name:
        for script in (evaluate, fuse, ppo_training, sft):
            monkeypatch.setattr(script, "load", lambda *args: pytest.fail("a model was loaded"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_folder):
    """A LoRA of the untrained model."""
    path = tmp_path_factory.mktemp("adapter") / "lora"
    loaded = load(str(tiny_folder))
    config = AdapterConfig(num_layers=-1, model=str(tiny_folder))
    attach_adapter(loaded.model, config)
    save_adapter(path, loaded.model, config)
    return path


def written(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def content(folder: Path) -> dict[str, object]:
    """Every path below `folder`, with its kind and what it holds."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {
        name: path.read_bytes() if path.is_file() and not path.is_symlink() else path.lstat().st_mode
        for name, path in paths.items()
    }


WRITERS = {
    "sft": (sft.main, ["--train", "--save-file"]),
    "ppo": (ppo_training.main, ["--ground-truth-reward", "--save-file"]),
    "fuse": (fuse.main, ["--save-path"]),
    "samples": (evaluate.main, ["--ground-truth-reward", "--save-samples"]),
}
FOLDERS = {"sft", "ppo", "fuse"}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("target", ["/dev/null", "fifo", "dangling", "to_folder", "file/out", "n" * 256, "/proc/out"])
def test_an_impossible_output_is_refused_in_one_line(tmp_path, monkeypatch, capsys, writer, target):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("dangling").symlink_to("nowhere")
    Path("there").mkdir()
    Path("to_folder").symlink_to("there")
    Path("file").write_text("mine")
    before, device = content(tmp_path), os.lstat("/dev/null")
    main, words = WRITERS[writer]
    said = fails(capsys, main, *words, target)
    assert target in said and "choose a" in said
    assert content(tmp_path) == before and os.lstat("/dev/null").st_mode == device.st_mode


@pytest.mark.parametrize(
    ("writer", "files"),
    [("sft", ADAPTER_FILES), ("sft", PEFT_FILES), ("sft", APP_FILES), ("ppo", ADAPTER_FILES), ("fuse", APP_FILES)],
)
def test_a_folder_of_others_is_refused(tmp_path, capsys, writer, files):
    folder = written(tmp_path / "theirs", files)
    before = content(tmp_path)
    main, words = WRITERS[writer]
    said = fails(capsys, main, *words, folder)
    assert f"{folder} holds other files" in said and said.endswith("choose another name")
    assert content(tmp_path) == before


@pytest.mark.parametrize("form", [".safetensors", ".npz"])
@pytest.mark.parametrize("theirs", ["weights", "description"])
def test_a_single_file_of_others_is_refused(tmp_path, form, theirs):
    path = tmp_path / f"model{form}"
    (path if theirs == "weights" else path.with_suffix(".json")).write_text('{"mine": true}')
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"is not of an adapter of ours .* choose another name"):
        check_adapter_path(path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("form", ["lora", "lora.safetensors", "lora.npz"])
def test_our_own_adapter_is_replaced(tmp_path, tiny_folder, form):
    model, config = load(str(tiny_folder)).model, AdapterConfig(num_layers=-1)
    attach_adapter(model, config)
    for rank in (1, 2):
        config.lora_parameters["rank"] = rank
        check_adapter_path(tmp_path / form)
        save_adapter(tmp_path / form, model, config)
    file = tmp_path / form / "adapter_config.json" if form == "lora" else tmp_path / "lora.json"
    assert json.loads(file.read_text())["lora_parameters"]["rank"] == 2


def test_peft_s_own_adapter_is_refused_and_ours_replaced(tmp_path, capsys, adapter):
    folder = written(tmp_path / "theirs", PEFT_FILES)
    assert "holds other files" in fails(capsys, fuse.main, "--adapter-file", adapter, "--export-peft", folder)
    assert content(folder) == content(written(tmp_path / "same", PEFT_FILES))
    for again in (False, True):
        call(fuse.main, "--adapter-file", adapter, "--export-peft", tmp_path / "ours")
        assert ("will be replaced at the end" in capsys.readouterr().out) == again


def test_notes_beside_a_fused_model_and_an_adapter_stay(tmp_path, tiny_folder, adapter):
    mine, model = tmp_path / "lora", tmp_path / "model"
    shutil.copytree(adapter, mine)
    for _ in range(2):
        call(fuse.main, "--model", tiny_folder, "--adapter-file", adapter, "--save-path", model)
        call(fuse.main, "--adapter-file", adapter, "--export-adapter", mine)
        written(model, {"RESULTS.md": "0.9", "notes/day1.txt": "good"})
        written(mine, {"RESULTS.md": "0.9", "0000100_adapters.safetensors": "a checkpoint"})
    call(fuse.main, "--model", tiny_folder, "--adapter-file", adapter, "--save-path", model)
    assert (model / "RESULTS.md").read_text() == "0.9" and (model / "notes" / "day1.txt").read_text() == "good"
    assert sorted(content(mine)) == [
        "0000100_adapters.safetensors", "RESULTS.md", "adapter_config.json", "adapters.safetensors"
    ]  # fmt: skip


def test_the_shards_of_an_earlier_fused_model_go_with_it(tmp_path, tiny_folder, adapter):
    """mlx-lm opens every model*.safetensors that it finds."""
    words = ("--model", tiny_folder, "--adapter-file", adapter, "--save-path", tmp_path / "model")
    call(fuse.main, *words)
    written(tmp_path / "model", {"model-00001-of-00002.safetensors": "of a larger one"})
    call(fuse.main, *words)
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] == ["model.safetensors"]
    load(str(tmp_path / "model"))


SHORT = {
    "sft": (sft, ["--train", "--iters", 3, "--batch-size", 2, "--steps-per-report", 1, "--lora-layers", 1]),
    "ppo": (ppo_training, ["--ground-truth-reward", "--num-steps", 2, "--batch-size", 4, "--mini-batch-size", 4,
                           "--max-completion-length", 3, "--lora-layers", 1]),
}  # fmt: skip


@pytest.fixture(params=SHORT)
def short_run(request, tmp_path, monkeypatch, tiny_folder):
    """A script, and f(name) -> the words of a short run in the folder `name`, whose adapter is NAME.safetensors."""
    monkeypatch.chdir(tmp_path)
    script, own = SHORT[request.param]
    monkeypatch.setattr(script, "plot_run", lambda folder: folder / "curves.png")
    for split in ("train", "valid"):
        Path(f"d_{split}.jsonl").write_text("".join(json.dumps({"text": f"{n} {n + 2}"}) + "\n" for n in range(4)))
    data = ["--data", ".", "--data-base", "d_"] if script is sft else []
    return script, lambda name: [
        *own, *data, "--model", tiny_folder, "--output-dir", name, "--save-file", f"{name}.safetensors"
    ]  # fmt: skip


def killed(main, *words):
    with pytest.raises(KeyboardInterrupt):
        call(main, *words)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(short_run, monkeypatch, capsys):
    script, words = short_run
    call(script.main, *words("whole"))
    with monkeypatch.context() as patch:
        patch.setattr("training.checkpoint_folders.write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        killed(script.main, *words("cut"))
    assert Path("cut/config.json").is_file() and not list(Path("cut/checkpoints").glob("[0-9]*"))
    assert "use --resume cut" in fails(capsys, script.main, *words("cut"))
    call(script.main, "--resume", "cut")
    assert "cut was stopped before its first checkpoint, so the run begins anew" in capsys.readouterr().out
    assert Path("cut.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    steps = [[row["step"] for row in read_metrics(name)] for name in ("cut", "whole")]
    assert steps[0] == steps[1]


HOLDER = """
import fcntl, sys
file = open("run/lock", "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


def test_a_run_is_not_trained_by_two_processes(short_run, capsys):
    script, words = short_run
    call(script.main, *words("run"))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin and holder.stdout
    holder.stdout.readline()
    before = content(Path("run"))
    said = fails(capsys, script.main, "--resume", "run")
    assert said == "another process is training in run; wait for it to end, or stop it"
    assert content(Path("run")) == before
    holder.stdin.close()
    holder.wait()
    call(script.main, "--resume", "run")


def test_the_adapter_of_a_resumed_run_can_go_elsewhere(short_run, capsys):
    script, words = short_run
    call(script.main, *words("run"))
    assert "/dev/null is a device" in fails(capsys, script.main, "--resume", "run", "--save-file", "/dev/null")
    assert "will be replaced" not in capsys.readouterr().out
    call(script.main, "--resume", "run", "--save-file", "other.safetensors")
    call(script.main, *words("again"), "--save-file", "other.safetensors")
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith("other.safetensors, written ") for line in said if "will be replaced" in line] == [True]
    assert Path("other.safetensors").read_bytes() == Path("run.safetensors").read_bytes()
    assert json.loads(Path("run/config.json").read_text())["save_file"] == "other.safetensors"


def test_a_resumed_run_removes_what_a_killed_one_left(short_run):
    script, words = short_run
    call(script.main, *words("run"))
    written(Path("run"), {".metrics.jsonl.99999999.tmp/metrics.jsonl": "half"})
    written(Path("run/checkpoints"), {"000007/optimizer.safetensors": "half deleted"})
    written(Path("run/checkpoints"), {".000009.99999999.tmp/000009/state.json": "{}"})
    call(script.main, "--resume", "run")
    assert not [name for name in content(Path("run")) if ".tmp" in name or "000007" in name]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "summary.json"])
def test_a_run_replaces_no_file_of_others(short_run, capsys, name):
    script, words = short_run
    written(Path("mine"), {name: "mine"})
    assert f"mine holds a {name} that a run would replace" in fails(capsys, script.main, *words("mine"))
    assert content(Path("mine")) == {name: b"mine"}


def test_a_full_disk_in_training_is_one_line_and_the_checkpoint_stands(tmp_path, short_run):
    script, words = short_run
    call(script.main, *words("run"))
    before = content(Path("run/checkpoints"))
    program = (
        "import resource, sys\n"
        f"import {script.__name__} as script\nfrom common.cli import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\nrun(script.main)\n"
    )
    length = "--iters" if script is sft else "--num-steps"
    done = subprocess.run(
        [sys.executable, "-c", program, "--resume", "run", length, "5"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("error: run/") and " cannot be written (" in last
    assert content(Path("run/checkpoints")) == before


def test_any_error_of_the_system_is_one_line(tmp_path, capsys):
    said = fails(capsys, lambda: (tmp_path / "none" / "rows.jsonl").open("w"))
    assert said == f"{tmp_path}/none/rows.jsonl cannot be used (No such file or directory); choose another path"

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    assert fails(capsys, full).endswith("(No space left on device); free some space, or choose another disk")


def test_a_bar_ends_before_the_error_begins(capsys):
    def main():
        bar = tqdm(total=2)
        bar.update()
        raise UserError("no luck; try again")

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err.splitlines()[-1] == "error: no luck; try again"
