"""Prompts for PPO: starts of the digit rule, rows of a file, and their order."""

import json
from collections import Counter

import numpy as np
import pytest

from common.errors import UserError
from data.digits import DigitRule, digit_prompts, held_out_starts, starts
from data.prompts import PromptPlan, read_prompts, say_beyond_context
from training.ppo_flags import choose_prompts, ppo_parser
from training.ppo_step import Prompts
from training.settings import PPOSettings

EVEN = DigitRule(increasing=True, multiple_of=2)
RULES = [DigitRule(up, n) for up in (True, False) for n in (1, 2, 3, 4, 5, 7, 8, 10, 50, 100)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_prompts_are_all_starts_but_the_held_out_ones(rule):
    prompts = {int(prompt) for prompt in digit_prompts(rule)}
    held_out = set(held_out_starts(rule))
    assert prompts | held_out == set(starts(rule))
    assert not prompts & held_out
    assert 0 < len(held_out) < len(prompts)
    assert all(start % rule.multiple_of == 0 for start in prompts | held_out)


def test_the_ranges_of_starts():
    assert (min(starts(EVEN)), max(starts(EVEN)), len(starts(EVEN))) == (0, 200, 101)
    falling = starts(DigitRule(increasing=False, multiple_of=5))
    assert (min(falling), max(falling)) == (100, 1000)


def test_every_tenth_multiple_is_held_out():
    assert held_out_starts(EVEN) == [14, 34, 54, 74, 94, 114, 134, 154, 174, 194]
    assert held_out_starts(DigitRule(True, 4)) == [28, 68, 108, 148, 188]
    assert held_out_starts(DigitRule(True, 5)) == [35, 85, 135, 185]
    assert held_out_starts(DigitRule(True, 10)) == [70, 170]
    assert held_out_starts(DigitRule(False, 8)) == [160, 240, 320, 400, 480, 560, 640, 720, 800, 880, 960]
    assert held_out_starts(DigitRule(False, 2))[:2] == [114, 134]
    assert held_out_starts(DigitRule(True, 1))[:4] == [14, 15, 34, 35]  # as tiny-digits was trained


def test_of_few_multiples_one_is_held_out_but_never_the_only_one():
    assert held_out_starts(DigitRule(True, 50)) == [200] and held_out_starts(DigitRule(True, 200)) == [200]
    assert held_out_starts(DigitRule(True, 201)) == [] and digit_prompts(DigitRule(True, 201)) == ["0"]


def test_what_is_held_out_of_the_embedded_model_is_held_out_for_multiples_of_2():
    every = set(held_out_starts(DigitRule(True, 1)))
    assert set(held_out_starts(EVEN)) <= every
    assert not every & {int(prompt) for prompt in digit_prompts(EVEN)}


def test_every_prompt_scores_what_a_good_first_number_scores():
    assert {EVEN.score(prompt) for prompt in digit_prompts(EVEN)} == {1 / 5}


def test_a_rule_without_starts_is_refused():
    with pytest.raises(UserError, match="1001"):
        digit_prompts(DigitRule(False, 1001))


def test_the_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "id": 1}) + "\n" for text in ("a b", "c\nd", "é")))
    assert read_prompts(path) == ["a b", "c\nd", "é"]
    path.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="prompt"):
        read_prompts(path)


def test_all_prompts_come_once_before_any_comes_again():
    plan = PromptPlan([str(i) for i in range(10)], seed=3)
    stream = [prompt for step in range(10) for prompt in plan.batch(step, 4)]
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch, key=int) == list(plan.prompts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_be_larger_than_the_file():
    counts = Counter(PromptPlan(["a", "b", "c"], seed=0).batch(0, 9))
    assert counts == {"a": 3, "b": 3, "c": 3}


def test_a_batch_depends_on_seed_and_step_alone():
    prompts = [str(i) for i in range(50)]
    plan = PromptPlan(prompts, seed=1)
    in_order = [plan.batch(step, 8) for step in range(9)]
    assert [PromptPlan(prompts, seed=1).batch(step, 8) for step in reversed(range(9))] == in_order[::-1]
    assert PromptPlan(prompts, seed=2).batch(0, 8) != in_order[0]


def test_an_epoch_is_shuffled_once(monkeypatch):
    """Not once for every prompt, which took 2 s a step of 200 000 prompts."""
    made, real = [], np.random.default_rng

    def noted(seed):
        made.append(seed)
        return real(seed)

    monkeypatch.setattr(np.random, "default_rng", noted)
    plan = PromptPlan([str(i) for i in range(6)], seed=7)
    stream = [prompt for step in range(3) for prompt in plan.batch(step, 4)]
    assert made == [(7, 0, 2), (7, 1, 2)]
    assert stream == [str(i) for epoch in (0, 1) for i in real((7, epoch, 2)).permutation(6)]


def batch_of(**changed):
    """The prompts of the first step under these settings."""
    settings = PPOSettings(batch_size=8, mini_batch_size=8, num_generations=4, **changed)
    return Prompts(digit_prompts(EVEN), settings).batch(0)


def test_gae_takes_a_prompt_per_completion():
    batch = batch_of()
    assert len(batch) == 8 == len(set(batch))


@pytest.mark.parametrize("advantage", ["group", "rloo"])
def test_the_completions_of_a_group_s_prompt_stand_side_by_side(advantage):
    batch = batch_of(advantage=advantage)
    assert len(batch) == 8 and len(set(batch)) == 2
    assert batch == [batch[0]] * 4 + [batch[4]] * 4


def test_the_flags_choose_the_prompts(tmp_path):
    def chosen(*words):
        return choose_prompts(ppo_parser("").parse_args([str(word) for word in words]), None)

    assert all(int(prompt) % 7 == 0 and int(prompt) >= 100 for prompt in chosen("--decreasing", "--multiple-of", 7))
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    assert chosen("--prompts", path) == ["x", "y"]


class OneTokenAByte:
    """And one before them all."""

    def encode(self, text):
        return [0, *text.encode()]


@pytest.mark.parametrize(
    ("context", "max_tokens", "said"),
    [(None, 10**6, ""), (26, 5, ""), (25, 5, "warning: 1 of 2 prompts, of up to 21 tokens, and completions of 5 exceed "
     "the 25 tokens that the model reads"),
     (25, 24, "warning: 2 of 2 prompts, of up to 21 tokens, and completions of 24")],
)  # fmt: skip
def test_prompts_beyond_the_context_are_one_line(capsys, context, max_tokens, said):
    say_beyond_context(OneTokenAByte(), ["a", "b" * 20, "b" * 20], max_tokens, context)
    out = capsys.readouterr().out
    assert out.startswith(said) and out.count("\n") == bool(said)
