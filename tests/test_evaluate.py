"""evaluate.py and training/evaluation.py: the figures, the KL, and the saved rows."""

import json
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import evaluate
from common import progress
from data.digits import DigitRule
from data.examples import LANGUAGE_ROWS, PREFERENCE_ROWS
from data.records import read_rows
from models.adapters import AdapterConfig, attach_adapter, save_adapter
from models.loading import load, twin
from rewards.answer_reward import AnswerReward
from rewards.answers import answer_type
from rewards.combined import WeightedSum, top_of
from rewards.digits import digit_reward
from rewards.function import checked
from tests.scripts import call, fails
from training import evaluation
from training.evaluation import completion_logprobs, evaluate_model, per_prompt, score_difference, score_interval
from training.intervals import wilson

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
    assert result.perfect_share is None  # this reward declares no top
    assert result.standard_error == pytest.approx(np.std(scores, ddof=1) / 12**0.5)
    assert all(text.startswith(prompt) for text, prompt in zip(result.texts, PROMPTS, strict=True))


def test_sampling_and_the_kl_show_how_far_they_are(loaded, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    result = evaluated(loaded, reference=twin(loaded.model), batch_size=5)
    printed = capsys.readouterr().err.splitlines()
    lines = [line for line in printed if line.startswith("sampling, at most: ")]
    tokens = sum(row["tokens"] for row in result.rows)
    assert lines[-1].startswith(f"sampling, at most: {tokens} of 72 tokens") and len(lines) > 1
    read = [line.split(",")[0] for line in printed if line.startswith("KL: ")]
    assert read == [f"KL: {count} of 12 completions" for count in (5, 10, 12)]


@pytest.mark.parametrize(("top", "share"), [(1.0, 1 / 3), (2.0, 0.0)])
def test_only_a_declared_top_makes_a_score_perfect(loaded, top, share):
    def reward(prompts, completions):
        return [1.0, 0.5, 0.0] * 4

    reward.top = top  # type: ignore[attr-defined]
    assert evaluated(loaded, reward=checked(reward)).perfect_share == pytest.approx(share)
    assert top_of(digit_reward(DigitRule())) == top_of(AnswerReward(answer_type("number"), {}).reward) == 1.0
    assert top_of(WeightedSum({"one": checked(reward)}, {"one": 2.0})) is None


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
    totals = completion_logprobs([loaded.model], loaded.tokenizer, prompts, completions)[0]
    for prompt, completion, total in zip(prompts, completions, totals, strict=True):
        logprobs = nn.log_softmax(loaded.model(mx.array([prompt + completion]))[0], axis=-1)
        by_hand = sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))
        assert total == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("may_pack", [True, False])
@pytest.mark.parametrize("num_layers", [1, -1])
def test_models_read_together_give_what_each_gives_alone(num_layers, may_pack, loaded, monkeypatch):
    """In batches that are no batch of the callers', layers that both share run once."""
    monkeypatch.setattr(evaluation, "packs", lambda model: may_pack)
    other = twin(loaded.model)
    attach_adapter(other, AdapterConfig(num_layers=num_layers))
    mx.random.seed(3)
    for module in other.modules():
        if "lora_b" in module:
            module.lora_b = 0.3 * mx.random.normal(module.lora_b.shape)
    rng, eos = np.random.default_rng(0), loaded.tokenizer.eos_token_id
    prompts = [loaded.tokenizer.encode(text) for text in PROMPTS]
    completions = [[*rng.integers(5, 9, size).tolist(), eos, 5, 6] for size in rng.integers(0, 6, len(prompts))]
    layer, calls = type(loaded.model.layers[0]), list[nn.Module]()
    monkeypatch.setattr(layer, "__call__", counting(layer.__call__, calls))
    found = completion_logprobs([loaded.model, other], loaded.tokenizer, prompts, completions, 0.7, batch_size=5)
    of_first, of_last = (
        sum(layer is model.layers[i] for layer in calls for model in (loaded.model, other)) for i in (0, -1)
    )
    assert of_last >= 6 and (of_first < of_last) == (num_layers == 1)
    for model, sums in zip((loaded.model, other), found, strict=True):
        for prompt, completion, total in zip(prompts, completions, sums, strict=True):
            ended = completion[: completion.index(eos) + 1]
            logprobs = nn.log_softmax(model(mx.array([prompt + ended]))[0] / 0.7, axis=-1)
            by_hand = sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ended))
            assert total == pytest.approx(by_hand, rel=1e-5, abs=2e-5)
    assert np.abs(found[0] - found[1]).max() > 0.01


def counting(call, calls):
    """The call of a layer, which notes it."""

    def counted(layer, *args, **kwargs):
        calls.append(layer)
        return call(layer, *args, **kwargs)

    return counted


def test_the_script_scores_and_keeps_rows(tiny_folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    words = ["--model", tiny_folder, "--ground-truth-reward", "--num-samples", 9, "--max-completion-length", 5]
    call(evaluate.main, *words, "--held-out", "--reference", tiny_folder, "--save-samples", rows)
    printed = capsys.readouterr().out
    assert re.search(r"^  score +\d\.\d{3} \[", printed, flags=re.MULTILINE) and "  perfect  " in printed
    assert re.search(r"^  KL +-?0\.000$", printed, flags=re.MULTILINE)
    kept = read_rows(rows, [("text", "reward")])
    assert len(kept) == 9 and all(0 <= row["reward"] <= 1 for row in kept)
    assert {row["text"].split()[0] for row in kept} <= {str(start) for start in range(14, 201, 20)}


def test_fewer_samples_than_prompts_are_a_seeded_sample_of_them():
    prompts = [str(n) for n in range(100)]
    assert evaluate.spread(prompts[:3], 7, seed=0) == ["0", "1", "2", "0", "1", "2", "0"]
    assert evaluate.spread(prompts, 100, seed=1) == prompts
    drawn = evaluate.spread(prompts, 10, seed=1)
    assert drawn == evaluate.spread(prompts, 10, seed=1) == sorted(set(drawn), key=int) and len(drawn) == 10
    assert drawn != prompts[:10] and drawn != evaluate.spread(prompts, 10, seed=2)


def by_length(prompts, completions):
    return [len(completion) / 10 for completion in completions]


def test_an_interval_is_over_prompts():
    """Two prompts, one always and one never solved, give little information however often they are sampled."""
    prompts, scores = ["a", "b", "a", "b", "a", "b"], [1.0, 0.0] * 3
    assert per_prompt(prompts, scores) == [1.0, 0.0]
    assert score_interval(prompts, scores) == score_interval(["a", "b"], [1.0, 0.0]) == wilson(1, 2)
    assert per_prompt(["a", "b", "a"], [1.0, 0.5, 0.0]) == [0.5, 0.5]
    # With a single prompt, the interval is over its completions.
    assert score_interval(["a"] * 4, [1.0, 1.0, 0.0, 1.0]) == wilson(3, 4)


def test_a_difference_is_paired_by_prompt():
    prompts = [str(n) for n in range(40)] * 2
    level = np.linspace(0, 1, 40).tolist() * 2
    better = [score + 0.01 + 0.001 * (n % 3) for n, score in enumerate(level)]
    found = score_difference(prompts, level, better)
    assert found.interval.low > 0.01 and found.interval.high < 0.013  # though the levels differ by far more
    assert (found.gained, found.lost) == (40, 0) and found.p_value == pytest.approx(2 / 2**40)
    mirrored = score_difference(prompts, better, level)
    assert mirrored.interval.mean == pytest.approx(-found.interval.mean) and mirrored.gained == 0


def test_rows_hold_what_was_sampled_and_each_part_of_a_sum(loaded):
    reward = WeightedSum({"long": by_length, "one": lambda p, c: [1.0] * len(p)}, {"long": 2.0, "one": -1.0})
    result = evaluated(loaded, reward=reward)
    assert list(result.rows[0]) == ["tokens", "score", "score_long", "score_one", "prompt", "completion"]
    for row, text in zip(result.rows, result.texts, strict=True):
        assert row["prompt"] + row["completion"] == text and 0 < row["tokens"] <= 6
        assert row["score"] == pytest.approx(2 * len(row["completion"]) / 10 - 1)
    assert result.part_scores == {
        "score_long": pytest.approx(np.mean([row["score_long"] for row in result.rows])), "score_one": 1.0
    }  # fmt: skip
    assert result.mean_score == pytest.approx(2 * result.part_scores["score_long"] - 1)


def test_the_reward_is_asked_by_the_prompts_that_it_knows(loaded):
    seen: list[str] = []

    def reward(prompts, completions):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    known = [f"known {prompt}" for prompt in PROMPTS]
    result = evaluated(loaded, reward=reward, known_prompts=known)
    assert seen == known and result.rows[0]["prompt"] == "2"


@pytest.fixture(scope="module")
def moved(tiny_folder, tmp_path_factory):
    """A LoRA that moves the untrained model."""
    model, config = load(str(tiny_folder)).model, AdapterConfig(num_layers=-1, model=str(tiny_folder))
    attach_adapter(model, config)
    mx.random.seed(2)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = 0.2 * mx.random.normal(module.lora_b.shape)
    path = tmp_path_factory.mktemp("moved") / "adapter"
    save_adapter(path, model, config)
    return path


def test_two_models_are_compared_on_the_same_prompts(tiny_folder, moved, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def long(prompts, completions):\n    return [len(c) / 10 for c in completions]\n"
    )
    rows = tmp_path / "rows.jsonl"
    words = ["--model", tiny_folder, "--reward-function", f"{tmp_path / 'mine.py'}:long", "--num-samples", 20]
    words += ["--max-completion-length", 5, "--reference", tiny_folder, "--held-out", "--show-samples", 3]
    call(evaluate.main, *words, "--against-adapter", moved, "--save-samples", rows)
    printed = capsys.readouterr().out
    saved = [json.loads(line) for line in rows.read_text().splitlines()]
    titles = [str(tiny_folder), f"{tiny_folder} with {moved}"]
    assert [row["model"] for row in saved] == [title for title in titles for _ in range(20)]
    assert [row["prompt"] for row in saved[:20]] == [row["prompt"] for row in saved[20:]]
    assert all(row["reward"] == len(row["completion"]) / 10 for row in saved)
    prompts, scores = [row["prompt"] for row in saved[:20]], [row["reward"] for row in saved]
    found = score_difference(prompts, scores[20:], scores[:20])
    assert f"first less second, paired: {found.interval}\n" in printed and found.interval.mean != 0
    even = 10 - found.gained - found.lost
    assert f"better on {found.gained} prompts, as good on {even}, worse on {found.lost}; sign test" in printed
    assert "over 10 prompts" in printed
    # Each is printed with its own interval and KL. The base is its own reference, although its twin has an adapter.
    shown = re.findall(r"^  score +(.+)\n  length .+\n  KL +(.+)$", printed, flags=re.MULTILINE)
    assert [score for score, _ in shown] == [str(score_interval(prompts, own)) for own in (scores[:20], scores[20:])]
    assert abs(float(shown[0][1])) < 1e-3 and float(shown[1][1]) > 0.01
    assert printed.count("tokens  score  prompt  completion") == 2
    # In the other order the sign is reversed, and the second model is named by its folder.
    call(evaluate.main, *words, "--resume-file", moved, "--against", tiny_folder)
    found = score_difference(prompts, scores[:20], scores[20:])
    assert f"first less second, paired: {found.interval}\n" in capsys.readouterr().out


def test_saved_rows_serve_reward_models_and_sft(tiny_folder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    call(evaluate.main, "--model", tiny_folder, "--ground-truth-reward", "--num-samples", 4, "--save-samples", path)
    assert [row["reward"] for row in read_rows(path, PREFERENCE_ROWS)] == [
        DigitRule().score(row["prompt"] + row["completion"]) for row in read_rows(path, LANGUAGE_ROWS)
    ]
    assert "model" not in json.loads(path.read_text().splitlines()[0])


def test_a_model_is_not_compared_with_itself_nor_with_other_tokens(tiny_folder, tmp_path, capsys):
    words = ["--model", tiny_folder, "--ground-truth-reward", "--num-samples", 2]
    assert "--against is the evaluated model itself" in fails(capsys, evaluate.main, *words, "--against", tiny_folder)
    adapter = ["--resume-file", "a", "--against-adapter", "a"]
    assert "--against is the evaluated model itself" in fails(capsys, evaluate.main, *words, *adapter)
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has other tokens than" in fails(capsys, evaluate.main, *words, "--reference", other)
    assert "--temperature above 0" in fails(
        capsys, evaluate.main, *words, "--reference", tiny_folder, "--temperature", 0
    )


def test_mistakes_are_one_line(tiny_folder, capsys):
    words = ["--model", tiny_folder]
    assert "give one, or several" in fails(capsys, evaluate.main, *words)
    words += ["--ground-truth-reward"]
    assert "--num-samples is 0" in fails(capsys, evaluate.main, *words, "--num-samples", 0)
    assert "multiple of 201" in fails(capsys, evaluate.main, *words, "--held-out", "--multiple-of", 201)
    assert "does not exist" in fails(capsys, evaluate.main, *words, "--prompts", "nowhere.jsonl")
