"""evaluate.py and training/evaluation.py: the figures, the KL, and the rows that a reward model learns from."""

import evaluate
import models.fast_blas  # noqa: F401  (before mlx)
from data.records import read_rows
from models.adapters import AdapterConfig, attach_adapter
from models.loading import load, twin
from tests.scripts import call, fails
from training.evaluation import completion_logprobs, evaluate_model

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

PROMPTS = ["2", "14 20", "-3 5 8"] * 4


@pytest.fixture
def loaded(tiny_folder):
    return load(str(tiny_folder))


def evaluated(loaded, reference=None, reward=lambda prompts, completions: [0.0] * len(prompts), **settings):
    return evaluate_model(loaded.model, loaded.tokenizer, PROMPTS, reward, 6, reference=reference, **settings)


def test_the_figures_are_those_of_the_scores(loaded):
    scores = [1.0, 0.5, 0.0] * 4
    result = evaluated(loaded, reward=lambda prompts, completions: scores)
    assert result.scores == scores and result.mean_score == pytest.approx(0.5)
    assert result.perfect_share == pytest.approx(1 / 3)
    assert result.standard_error == pytest.approx(np.std(scores, ddof=1) / 12**0.5)
    assert all(text.startswith(prompt) for text, prompt in zip(result.texts, PROMPTS, strict=True))


def test_the_kl_is_zero_to_itself_and_positive_to_another(loaded):
    same = evaluated(loaded, reference=twin(loaded.model))
    assert same.kl == pytest.approx(0, abs=1e-5)
    other = twin(loaded.model)
    attach_adapter(other, AdapterConfig(num_layers=-1))
    for module in other.modules():
        if "lora_b" in module:
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape)
    apart = evaluate_model(
        loaded.model, loaded.tokenizer, PROMPTS * 20, lambda p, c: [0.0] * len(p), 6, reference=other
    )
    assert apart.kl > 0.01


def test_completion_logprobs_are_the_sums_of_the_tokens_own(loaded):
    prompts = [loaded.tokenizer.encode("2"), loaded.tokenizer.encode("14 20")]
    completions = [[7, 9, loaded.tokenizer.eos_token_id], [5]]
    for prompt, completion, total in zip(
        prompts, completions, completion_logprobs(loaded.model, loaded.tokenizer, prompts, completions), strict=True
    ):
        logprobs = nn.log_softmax(loaded.model(mx.array([prompt + completion]))[0], axis=-1)
        by_hand = sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))
        assert total == pytest.approx(by_hand, abs=1e-5)


def test_the_script_scores_and_keeps_rows(tiny_folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    words = ["--model", tiny_folder, "--ground-truth-reward", "--num-samples", 9, "--max-completion-length", 5]
    call(evaluate.main, *words, "--held-out", "--reference", tiny_folder, "--save-samples", rows)
    printed = capsys.readouterr().out
    assert "mean_score: " in printed and "kl: 0.000" in printed.replace("-0.000", "0.000")
    kept = read_rows(rows, [("text", "reward")])
    assert len(kept) == 9 and all(0 <= row["reward"] <= 1 for row in kept)
    assert {row["text"].split()[0] for row in kept} <= {str(start) for start in range(14, 201, 20)}


def test_mistakes_are_one_line(tiny_folder, capsys):
    words = ["--model", tiny_folder]
    assert "give one, or several" in fails(capsys, evaluate.main, *words)
    words += ["--ground-truth-reward"]
    assert "--num-samples is 0" in fails(capsys, evaluate.main, *words, "--num-samples", 0)
    assert "multiple of 10" in fails(capsys, evaluate.main, *words, "--held-out", "--multiple-of", 10)
    assert "does not exist" in fails(capsys, evaluate.main, *words, "--prompts", "nowhere.jsonl")
