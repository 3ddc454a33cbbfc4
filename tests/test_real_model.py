"""Everything once on a real chat model, SmolLM2-135M-Instruct: few steps on two short rows, the last layers only.

Needs the wheel as tests/test_smollm2.py does. What a stage leaves is what the next one takes, as a user's would.
"""

import importlib
import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import fuse
import ppo_training
import pytorch_ppo_training
import sft
import talk_to_model
from data import check
from data.constraints import Constraints
from data.generate_constraint_data import draw_split, write_split
from models.adapters import AdapterConfig, load_adapter, read_adapter
from models.generation import ChatSession
from models.gguf_folder import gguf_folder
from models.loading import LoadedModel, load, twin
from models.smollm2 import FOUR_BIT, NAME
from rewards.reward_model import load_reward_model
from tests.mlx_server import ask, serving
from tests.scripts import call
from training.metrics import read_metrics
from training.settings import SFTSettings
from training.sft_loop import build_trainee, train_sft

BASE = f"{NAME}-fp32"
QUESTION = "What is the capital of France?"
LAST = ("--lora-layers", 1)
PPO = ("--batch-size", 2, "--mini-batch-size", 2, "--num-steps", 1, "--max-completion-length", 8, *LAST)


@pytest.fixture(scope="module")
def base(smollm2_gguf):
    return load(BASE)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two rows a split, and two pairs: of the constraint task."""
    folder = tmp_path_factory.mktemp("constraints")
    for split in ("train", "valid"):
        write_split(folder, split, draw_split(split, 2, 0))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def adapter(base, rows, work):
    """A LoRA by sft.py."""
    words = ("--train", "--model", BASE, "--data", rows, "--iters", 2, "--batch-size", 2, "--learning-rate", 5e-4)
    call(sft.main, *words, *LAST, "--save-file", work / "sft", "--output-dir", work / "sft_run")
    return work / "sft"


@pytest.fixture(scope="module")
def adapted(base, adapter):
    loaded = beside(base)
    load_adapter(loaded.model, adapter)
    return loaded


@pytest.fixture(scope="module")
def fused(adapter, work):
    """The same fused by fuse.py, with a GGUF file."""
    call(fuse.main, "--adapter-file", adapter, "--save-path", work / "fused", "--export-gguf")
    return work / "fused"


def beside(loaded: LoadedModel) -> LoadedModel:
    """The model once more, over the same weights."""
    return replace(loaded, model=twin(loaded.model))


def chat(tokenizer, content=QUESTION):
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def greedy(loaded):
    """The start of the most likely reply."""
    return "".join(ChatSession(loaded.model, loaded.tokenizer).reply(QUESTION, 12))


def logits_of(model, tokenizer):
    return np.array(model(mx.array([tokenizer.encode(chat(tokenizer))])))


def logits_in_torch(model, tokenizer):
    with torch.no_grad():
        return model(torch.tensor([tokenizer.encode(chat(tokenizer))])).logits.numpy()


def close(got, expected, tolerance=2e-3):
    np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0)


# --- sft.py ---


def test_data_check_shows_what_of_a_chat_is_trained(smollm2_gguf, rows, capsys):
    call(check.main, "--data", rows, "--model", BASE, "--for", "sft", "--rows", 1)
    said = capsys.readouterr().out
    row = json.loads((rows / "train.jsonl").read_text().splitlines()[0])
    asked, reply = (message["content"] for message in row["messages"])
    assert f"<|im_start|>user\n    {asked}<|im_end|>\n    <|im_start|>assistant\n    ⟦{reply}<|im_end|>⟧" in said
    assert "no bad line in 4 rows" in said


@pytest.mark.parametrize("kind", ["lora", "dora", "soft_prompt", "full", "lora in 4 bits"])
def test_sft_lowers_the_loss_of_its_row(base, tmp_path, kind):
    """A short one, as products of 4-bit weights take long on CPU."""
    row, loaded = tmp_path / "row.jsonl", load(FOUR_BIT) if "4" in kind else beside(base)
    row.write_text(json.dumps({"prompt": "The capital of France is", "completion": " a city on a river."}))
    settings = SFTSettings(iters=1, batch_size=1, steps_per_report=1)
    config = AdapterConfig(kind.split()[0], 1, {"rank": 8, "scale": 20.0, "dropout": 0.0}, model=BASE)
    trainee = build_trainee(loaded, settings, config)
    first, report, last = train_sft(trainee, loaded.tokenizer, row, row, settings)
    assert report["train_loss"] == pytest.approx(first["valid_loss"], abs=1e-4)
    assert 0.5 < first["valid_loss"] < (9 if kind == "soft_prompt" else 5)
    assert first["valid_loss"] - 2 < last["valid_loss"] < first["valid_loss"] - 0.002


def test_dpo_prefers_the_chosen(base, rows):
    loaded, settings = beside(base), SFTSettings(iters=1, batch_size=2, steps_per_report=1, dpo=True)
    trainee = build_trainee(loaded, settings, AdapterConfig("lora", 1, {"rank": 8, "scale": 20.0, "dropout": 0.0}))
    pairs = rows / "pairs_train.jsonl"
    first, _, last = train_sft(trainee, loaded.tokenizer, pairs, pairs, settings)
    assert first["valid_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["valid_loss"] < first["valid_loss"] and last["valid_reward_margin"] > 0


@pytest.fixture(scope="module")
def reward_model(base, rows, work):
    words = ("--reward-model", "--train", "--model", BASE, "--data", rows, "--data-base", "pairs_", "--iters", 2)
    flags = ("--batch-size", 2, "--learning-rate", 1e-3, "--steps-per-report", 1, *LAST)
    call(sft.main, *words, *flags, "--save-file", work / "reward", "--output-dir", work / "reward_run")
    return work / "reward"


def test_a_reward_model_learns_its_pairs(base, rows, reward_model, work):
    losses = [row["train_loss"] for row in read_metrics(work / "reward_run") if "train_loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    pairs = [json.loads(line) for line in (rows / "pairs_train.jsonl").read_text().splitlines()]
    prompts = [chat(base.tokenizer, pair["messages"][0]["content"]) for pair in pairs]
    reward = load_reward_model(str(reward_model), base).reward
    chosen, rejected = (reward(prompts, [pair[name] for pair in pairs]) for name in ("chosen", "rejected"))
    assert np.mean(chosen) > np.mean(rejected)


# --- PPO ---


def learned(folder):
    """The one step of a run that has to have moved the policy."""
    (row,) = [row for row in read_metrics(folder) if "mean_score" in row]
    assert row["kl"] == pytest.approx(0, abs=1e-3)  # from the policy that it began as
    assert row["ratio_max"] < 1.5 and row["skipped_updates"] == 0 and 0 < row["entropy"] < 6
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    return row


def moved(before, after):
    """How far the LoRA's weights are apart, relative to their largest."""
    old, new = read_adapter(before).weights, read_adapter(after).weights
    assert old.keys() == new.keys()
    return max(float(mx.abs(new[name] - old[name]).max() / mx.abs(old[name]).max()) for name in old)


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_ppo_on_constraints(adapter, rows, work, advantage):
    saved, folder = work / f"ppo-{advantage}", work / f"ppo-{advantage}-run"
    words = ("--resume-file", adapter, "--prompts", rows / "train.jsonl", "--answer", "constraints", *PPO)
    flags = ("--advantage", advantage, "--num-generations", 2, "--save-file", saved, "--output-dir", folder)
    call(ppo_training.main, *words, *flags)
    row = learned(folder)
    assert 0 <= row["mean_score"] <= 1 and ("explained_variance" in row) == (advantage == "gae")
    assert ("equal_groups" in row) == (advantage == "group")
    assert (moved(adapter, saved) > 0) == (row["updates"] > 0 and row["grad_norm"] > 0)


def test_ppo_on_a_learned_reward(adapter, reward_model, rows, work):
    words = ("--resume-file", adapter, "--prompts", rows / "train.jsonl", "--reward-model", reward_model, *PPO)
    call(ppo_training.main, *words, "--save-file", work / "learned", "--output-dir", work / "learned-run")
    assert learned(work / "learned-run")["score_std"] > 0 and moved(adapter, work / "learned") > 1e-6


def test_ppo_in_pytorch(base, adapter, reward_model, rows, work):
    saved, folder = work / "torch", work / "torch-run"
    words = ("--resume-file", adapter, "--prompts", rows / "train.jsonl", "--reward-model", reward_model, *PPO)
    call(pytorch_ppo_training.main, *words, "--save-file", saved, "--output-dir", folder)
    assert learned(folder)["updates"] == 2 and moved(adapter, saved) > 1e-6
    loaded = beside(base)
    load_adapter(loaded.model, saved)
    assert np.isfinite(logits_of(loaded.model, loaded.tokenizer)).all()


# --- what opens what ---


def test_fused_models_and_exports_have_the_adapter_s_logits(base, adapted, adapter, fused, work, monkeypatch):
    tokenizer = base.tokenizer
    expected = logits_of(adapted.model, tokenizer)
    assert np.abs(expected - logits_of(base.model, tokenizer)).max() > 0.1
    close(logits_of(*mlx_lm.load(str(fused))), expected)
    close(logits_of(*mlx_lm.load(str(base.path), adapter_path=str(adapter))), expected)
    theirs = AutoTokenizer.from_pretrained(fused)
    close(logits_in_torch(AutoModelForCausalLM.from_pretrained(fused), theirs), expected)

    call(fuse.main, "--adapter-file", adapter, "--export-peft", work / "peft", "--export-adapter", work / "back")
    assert moved(adapter, work / "back") == moved(adapter, work / "peft") == 0
    own = AutoModelForCausalLM.from_pretrained(base.path)
    close(logits_in_torch(PeftModel.from_pretrained(own, work / "peft"), theirs), expected)


def test_gguf_and_back(adapted, fused, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = gguf_folder(fused / "ggml-model-f16.gguf", "float32")
    model, tokenizer = mlx_lm.load(str(folder))
    expected = logits_of(adapted.model, adapted.tokenizer)
    close(logits_of(model, tokenizer), expected, 0.05)  # of weights rounded to 16 bits
    assert tokenizer.eos_token_ids == adapted.tokenizer.eos_token_ids


def test_mlx_lm_generates_and_serves_the_fused_model(adapted, fused, capsys):
    said = greedy(adapted)
    words = ("--model", fused, "--prompt", QUESTION, "--max-tokens", 12, "--temp", 0)
    call(importlib.import_module("mlx_lm.generate").main, *words)
    assert capsys.readouterr().out.split("==========")[1].strip() == said
    with serving(fused) as url:
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "temperature": 0}
        answer = ask(f"{url}/chat/completions", body)
    assert answer["choices"][0]["message"]["content"].strip() == said


# --- evaluate.py, talk_to_model.py ---


def test_evaluation_scores_by_the_constraints(adapter, rows, work, capsys):
    words = ("--resume-file", adapter, "--prompts", rows / "valid.jsonl", "--answer", "constraints")
    flags = ("--reference", BASE, "--num-samples", 2, "--max-new-tokens", 8, "--save-samples", work / "said.jsonl")
    call(evaluate.main, *words, *flags)
    assert re.search(r"^  KL +-?\d+\.\d+$", capsys.readouterr().out, flags=re.MULTILINE)
    asked = {row["messages"][0]["content"]: row["answer"] for row in read_lines(rows / "valid.jsonl")}
    samples = read_lines(work / "said.jsonl")
    assert len(samples) == 2
    for row in samples:
        assert row["prompt"].endswith("\nassistant\n") and row["text"] == row["prompt"] + row["completion"]
        (answer,) = [answer for content, answer in asked.items() if content in row["prompt"]]
        assert row["reward"] == Constraints.from_json(answer).score(row["completion"])


def read_lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_chat_is_templated_and_compares(base, adapted, adapter, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    capsys.readouterr()
    call(talk_to_model.main, "--resume-file", adapter, "--compare", BASE, "--max-tokens", 12)
    plain = mlx_lm.generate(base.model, base.tokenizer, chat(base.tokenizer), max_tokens=12)
    assert capsys.readouterr().out == f"[{adapter}]\n{greedy(adapted)}\n[{BASE}]\n{plain}\n" and "Paris" in plain


def test_the_base_is_as_it_was(base):
    """What was trained beside it has changed none of the weights that they share."""
    again = dict(tree_flatten(load(BASE).model.parameters()))
    assert all(mx.array_equal(array, again[name]).item() for name, array in tree_flatten(base.model.parameters()))
