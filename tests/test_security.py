"""What must never happen: code that comes with a model is run, or a key is left in a file (docs/security.md).

python -m pytest tests/test_security.py
"""

import ast
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable

import pytest
import torch

import data.tokenizer
from common.errors import UserError
from models import torch_loading
from models.export.classifier import load_classifier
from models.loading import load
from synth.offline.server import OfflineTeacher
from tests.scripts import ROOT

CODE = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\nclass Own: pass\n"
OPENERS: dict[str, Callable[[str], object]] = {
    "mlx": load,
    "torch": lambda name: torch_loading.load(name, torch.device("cpu")),
    "torch classifier": lambda name: torch_loading.load(name, torch.device("cpu"), classifier=True),
    "classifier": load_classifier,
    "tokenizer": data.tokenizer.open_tokenizer,
}
# What opens strangers' files by a library that runs the code in them if it is trusted.
OPENING_CALLS = ("mlx_lm.load", "mlx_lm.utils.load_model", "load_tokenizer", "AutoTokenizer.from_pretrained",
                 "auto.from_pretrained")  # fmt: skip


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture
def with_code(tiny_folder, tmp_path):
    """with_code(part) -> a model folder of which the tokenizer, or all, needs code of its own."""

    def make(part):
        folder = shutil.copytree(tiny_folder, tmp_path / "model")
        (folder / "own.py").write_text(CODE)
        own = {"AutoTokenizer": ["own.Own", "own.Own"]}
        change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=own)
        if part == "model":
            names = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
            own_model = dict.fromkeys(names, "own.Own")
            change(folder / "config.json", model_type="own", model_file="own.py", auto_map=own_model)
        return folder

    return make


@pytest.mark.parametrize("part", ["tokenizer", "model"])
@pytest.mark.parametrize("opener", OPENERS)
def test_a_model_s_own_code_is_neither_run_nor_asked_about(with_code, monkeypatch, capsys, opener, part):
    folder, typed = with_code(part), io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", typed)
    with pytest.raises(UserError) as caught:
        OPENERS[opener](str(folder))
    assert not (folder / "executed").exists() and typed.tell() == 0 and "[y/N]" not in capsys.readouterr().out
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line
    if part == "tokenizer" and "classifier" not in opener:
        assert line.endswith("needs Python code that comes with it, which is never run here; use a model without "
                             "such code")  # fmt: skip


def test_every_opening_call_says_that_code_is_not_trusted():
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        if {"tests", "benchmarks", ".venv"} & set(path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in OPENING_CALLS or name.endswith(".from_pretrained"):
                found.append((f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", ast.unparse(node)))
    trusting = [place for place, call in found if "trust_remote_code" not in call and "**untrusting" not in call]
    assert trusting == [] and len(found) >= len(OPENING_CALLS)


# keys

KEYS = {
    "OPENAI_API_KEY": "sk-proj-planted0openai0key0000000000",
    "HF_TOKEN": "hf_planted0hub0token00000000000000",
    "HUGGING_FACE_HUB_TOKEN": "hf_planted0other0hub0token0000000",
    "WANDB_API_KEY": "planted0wandb0key0000000000000000000000000",
}
SMALL = ["--lora-layers", 1, "--batch-size", 2]
RUNS = {
    "SFT": [ROOT / "sft.py", *SMALL, "--train", "--iters", 2, "--val-batches", 1, "--save-file", "adapter"],
    "PPO": [ROOT / "ppo_training.py", *SMALL, "--ground-truth-reward", "--num-steps", 2, "--mini-batch-size", 2,
            "--max-completion-length", 3, "--save-file", "adapter.npz"],
    "synth.run": ["-m", "synth.run", "--task", ROOT / "tests" / "sums.yaml", "--count", 6, "--votes", 2, "--rounds", 1,
                  "--wanted", 2, "--rollouts", 2, "--max-rollouts", 2, "--teacher-model", "m", "--rule", "random",
                  "--max-completion-length", 3, "--num-steps", 2, "--batch-size", 4,
                  "--training-flags=--num-generations 2 --lora-layers 1"],
}  # fmt: skip


def spellings(key):
    """A key as a file may hold it."""
    plain = key.encode()
    return [plain, base64.b64encode(plain).rstrip(b"="), key.encode("utf-16-le"), plain.hex().encode()]


def found_in(content):
    """The names of the planted keys in a file's content, also in that of an archive."""
    found = [name for name, key in KEYS.items() if any(spelt in content for spelt in spellings(key))]
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found += [name for member in archive.namelist() for name in found_in(archive.read(member))]
    return found


@pytest.mark.parametrize("kind", RUNS)
def test_planted_keys_are_in_no_file_that_a_run_leaves(kind, tiny_folder, tmp_path):
    """A run that asks sends the teacher's key to the teacher alone, in a header, and none of the others."""
    environment = {**os.environ, **KEYS, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path.parent / "matplotlib")}
    model = ["--base-model" if kind == "synth.run" else "--model", tiny_folder]
    data = ["--data", ROOT / "data"] if kind == "SFT" else []
    place, heard = tmp_path / "place", []
    place.mkdir()

    class Hearing(OfflineTeacher):
        def complete(self, body, sample=None):
            heard.append(json.dumps(body))
            return super().complete(body, sample)

    with Hearing() as server:
        teacher = ["--teacher-url", server.url] if kind == "synth.run" else []
        words = [*RUNS[kind], *model, *data, *teacher, "--output-dir", "run"]
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=place, env=environment, capture_output=True, timeout=600, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    files = [path for path in place.rglob("*") if path.is_file()]
    holding = {str(path.relative_to(place)): found_in(path.read_bytes()) for path in files}
    assert {name: found for name, found in holding.items() if found} == {}
    assert len(files) > 8 and not found_in(done.stdout + done.stderr)
    assert (kind == "synth.run") == bool(heard) and not found_in("".join(heard).encode())


def test_a_key_in_a_file_would_be_found(tmp_path):
    key = KEYS["HF_TOKEN"]
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", key)
    assert found_in((tmp_path / "a.npz").read_bytes()) == ["HF_TOKEN"]
    assert all(found_in(b"x" + spelt + b"y") == ["HF_TOKEN"] for spelt in spellings(key)) and found_in(b"hf_") == []
