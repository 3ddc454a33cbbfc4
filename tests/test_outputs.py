"""What the scripts write to: refused in one line, before any work, unless it is a regular file, ours, or nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest

import evaluate
import fuse
import ppo_training
import sft
from common.errors import UserError
from models.adapter_config import AdapterConfig, check_adapter_path
from models.adapters import attach_adapter, save_adapter
from models.loading import load
from tests.scripts import call, fails

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
    for _ in range(2):
        call(fuse.main, "--adapter-file", adapter, "--export-peft", tmp_path / "ours")


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
