"""docs/extending.md: the files that it names exist and are few, and its three examples need no other change."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from data.digits import DigitRule, digit_prompts
from models.adapters import AdapterConfig
from models.loading import load
from rewards import answers, combined
from rewards.answers import AnswerType, answer_type
from rewards.combined import Kind, rewards_from_flags
from rewards.digits import digit_reward
from training import advantages, ppo_flags
from training.advantages import Estimator
from training.ppo_learner import build_policies, train_ppo
from training.settings import PPOSettings

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
LIMITS = [2, 2, 2, 4, 3, 1]  # files


def changes():
    table = PAGE.split("<!-- changes -->")[1].split("<!-- end -->")[0]
    for line in table.strip().splitlines()[2:]:
        change, files, most = (cell.strip() for cell in line.strip("|").split("|"))
        yield change, re.findall(r"`([^`]+)`", files), files.count("a module in"), int(most)


def test_each_change_touches_few_files_and_all_of_them_are_there():
    rows = list(changes())
    assert [most for *_, most in rows] == LIMITS
    for change, paths, new, most in rows:
        assert all((ROOT / path).exists() for path in paths), change
        assert len([path for path in paths if path.endswith(".py")]) + new <= most, change


def centered(rollout, settings, kl_coef, least):
    scores = rollout.scores - rollout.scores.mean()
    return scores[:, None] * rollout.mask, 0.0 * rollout.mask


def test_an_estimator_is_a_function_and_a_row(tiny_folder, monkeypatch):
    asked = []

    def recorded(*words):
        asked.append(words)
        return centered(*words)

    row = Estimator(recorded, uses_value_head=False, kl_in_loss=True, compares_completions=False)
    monkeypatch.setitem(advantages.ESTIMATORS, "centered", row)
    loaded = load(str(tiny_folder))
    settings = PPOSettings(num_steps=2, batch_size=4, mini_batch_size=4, max_completion_length=4, advantage="centered")
    policy, reference = build_policies(loaded, settings, AdapterConfig())
    rule = DigitRule()
    history = train_ppo(policy, reference, loaded.tokenizer, digit_prompts(rule), digit_reward(rule), settings)
    assert len(history) == len(asked) == 2
    assert "value_head" not in policy.module and all("kl" in step for step in history)


def test_a_reward_is_a_row_with_its_flag(monkeypatch):
    kind = Kind(
        "--reward-length",
        {"type": int, "metavar": "N", "help": "score 1 for completions of at most N characters"},
        lambda args: [("length", str(args.reward_length))] if args.reward_length else [],
        lambda value, sources: lambda prompts, completions: [float(len(text) <= int(value)) for text in completions],
    )
    kinds = (*combined.KINDS, kind)
    for module in (combined, ppo_flags):
        monkeypatch.setattr(module, "KINDS", kinds)
    args = ppo_flags.ppo_parser("").parse_args(["--reward-length", "3"])
    ppo_flags.check(args)
    reward = rewards_from_flags(args, None, pytest.fail)
    assert list(reward(["a", "a"], ["abc", "abcd"])) == [1.0, 0.0]


@dataclass(frozen=True)
class YesNo(AnswerType):
    """The last "yes" or "no"."""

    name: ClassVar[str] = "yes_no"

    def extract(self, completion):
        found = re.findall(r"\b(yes|no)\b", completion.lower())
        return found[-1] if found else None


def test_an_answer_type_is_a_class_and_a_row(monkeypatch):
    monkeypatch.setitem(answers._BUILDERS, "yes_no", (YesNo, (), None))
    read = answer_type("yes_no")
    assert read.score("No. On reflection: Yes.", "yes") == 1.0
    assert read.score("I don't know.", "yes") == 0.0
