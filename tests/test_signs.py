"""What a run that does not learn says of itself: every cause provoked in a run of its own, and none where it learns."""

from typing import Any

import pytest

from data.digits import DigitRule, digit_prompts
from models.adapters import AdapterConfig
from models.loading import load
from training import ppo_step, signs
from training.ppo_learner import PPOLearner, build_policies, make_ppo_optimizer
from training.ppo_loop import first_progress, ppo_steps
from training.settings import PPOSettings

STEPS = signs.PATIENCE + 2
SMALL = {"num_steps": STEPS, "batch_size": 16, "mini_batch_size": 8, "max_completion_length": 6, "num_generations": 4}


def said(reward, **settings):
    """The lines of a short run on tiny-digits by a reward."""
    made = PPOSettings(**SMALL | settings)
    loaded = load("tiny-digits")
    policy, reference = build_policies(loaded, made, AdapterConfig())
    learner = PPOLearner(policy.module, reference, loaded.tokenizer, make_ppo_optimizer(policy, made), made)
    progress = first_progress(made, policy)
    prompts, watch = ppo_step.Prompts(digit_prompts(DigitRule()), made), signs.Signs(made)
    return [line for step in ppo_steps(learner, loaded.tokenizer, prompts, reward, progress)
            for line in watch.see(step.figures)]  # fmt: skip


def odd_checksum(prompts, completions):
    """A reward that no policy of this size can learn: whether the characters' codes add up to an odd number."""
    return [float(sum(map(ord, prompt + text)) % 2) for prompt, text in zip(prompts, completions, strict=True)]


class Falls:
    """1 in the first 15 steps, then 0.2, and never quite the same for all."""

    def __init__(self):
        self.steps = 0

    def __call__(self, prompts, completions):
        self.steps += 1
        return [(1.0 if self.steps <= 15 else 0.2) + 0.01 * (row % 2) for row in range(len(completions))]


@pytest.mark.parametrize(
    ("reward", "settings", "cause", "flag"),
    [
        (lambda prompts, texts: [0.25] * len(texts), {}, "every completion of the last 10 steps scored 0.25",
         "--temperature"),
        (lambda prompts, texts: [len(prompt) / 10 for prompt in prompts], {"advantage": "group"},
         "the 4 completions of a prompt always score alike", "--num-generations"),
        (odd_checksum, {"learning_rate": 1e-9, "step_kl": 0.0}, "a step moves the policy by", "raise --learning-rate"),
        (odd_checksum, {"target": 0.01}, "and the KL is", "a higher --target"),
        (odd_checksum, {"temperature": 1e-3, "learning_rate": 1e-9, "step_kl": 0.0}, "the entropy is", "--entropy-"),
        (Falls(), {}, "the score has fallen from 1", "a lower --step-kl"),
        (Falls(), {"target": 1e-4, "horizon": 16}, "the score has fallen from 1", "a higher --target leaves"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_learn_names_the_cause_and_the_flag_once(reward, settings, cause, flag):
    lines = [line for line in said(reward, **settings) if cause in line]
    assert len(lines) == 1
    assert flag in lines[0]


def test_a_run_that_learns_says_nothing():
    assert said(lambda prompts, texts: [text.count("1") / 6 for text in texts]) == []


def test_a_run_that_reached_the_highest_score_says_nothing():
    watch = signs.Signs(PPOSettings())
    figures = {"kl": 1.0, "kl_coef": 0.01, "approx_kl": 0.0, "completion_length": 5.0, "entropy": 0.0, "score_std": 0.0}
    scores = [0.1 + 0.01 * (step % 3) for step in range(10)] + [1.0] * 40
    assert not any(watch.see({**figures, "mean_score": score}) for score in scores)


def test_a_resumed_run_does_not_repeat_what_was_said():
    figures = {"kl": 1.0, "kl_coef": 0.01, "approx_kl": 0.1, "completion_length": 5.0, "entropy": 1.0, "score_std": 0.0}
    rows = [{**figures, "mean_score": 0.5}] * signs.PATIENCE
    fresh = signs.Signs(PPOSettings(), rows[:-1])
    assert len(fresh.see(rows[-1])) == 1
    assert signs.Signs(PPOSettings(), rows).see(rows[-1]) == []


def test_a_step_without_updates_has_no_sign_of_standing_still():
    watch = signs.Signs(PPOSettings())
    figures = {"kl": 1.0, "kl_coef": 0.01, "completion_length": 5.0, "entropy": 1.0, "score_std": 0.1}
    assert not any(watch.see({**figures, "mean_score": 0.5 + 0.01 * (step % 2)}) for step in range(40))


def test_rows_of_a_resumed_run_that_are_no_steps_are_passed_over():
    rows: list[dict[str, Any]] = [{"step": 1}, {"step": 1, "mean_score": None}, {"step": 1, "mean_score": 0.5}]
    assert signs.Signs(PPOSettings(), rows).first == [0.5]
