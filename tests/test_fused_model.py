"""ppo_training.py --fused-model: the model that it writes, and where it writes none."""

import json

import mlx.core as mx
import mlx_lm

import ppo_training
from models.export.fused import check_free
from models.loading import load
from tests.scripts import call, fails

FLAGS = ["--batch-size", 4, "--mini-batch-size", 4, "--num-steps", 2, "--max-completion-length", 4]


def test_the_model_holds_what_the_adapter_learned(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in (2, 8, 21)))
    words = ["--model", tiny_folder, "--prompts", "rows.jsonl", "--ground-truth-reward", "--save-file", "adapter"]
    call(ppo_training.main, *words, *FLAGS, "--output-dir", "run", "--fused-model", "fused")
    model, tokenizer = mlx_lm.load("fused")
    ours, _ = mlx_lm.load(str(tiny_folder), adapter_path="adapter")
    tokens = mx.array([tokenizer.encode("8 20")])
    fused, adapted, base = (each(tokens) for each in (model, ours, load(str(tiny_folder)).model))
    assert mx.abs(fused - adapted).max().item() < 1e-5 < mx.abs(fused - base).max().item()


def test_where_none_can_be_written_is_one_line_before_anything_is_done(tmp_path, tiny_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--model", tiny_folder, "--ground-truth-reward", *FLAGS, "--output-dir", "run", "--fused-model", "out"]
    assert "soft prompt" in fails(capsys, ppo_training.main, *words, "--prompt-tuning")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "already contains a model or a run" in fails(capsys, ppo_training.main, *words)
    check_free(tmp_path / "out", again=True)
    assert not (tmp_path / "run").exists()
