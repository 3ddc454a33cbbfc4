"""What must never happen: code that comes with a model is run.

python -m pytest tests/test_security.py
"""

import ast
import io
import json
import shutil
import sys

import pytest
import torch

import data.tokenizer
from common.errors import UserError
from models import torch_loading
from models.export.classifier import load_classifier
from models.loading import load
from tests.scripts import ROOT

CODE = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\nclass Own: pass\n"
OPENERS = {
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
