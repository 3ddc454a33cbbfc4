"""Several rewards as one score: names, weights, the sum, and what is refused."""

import pytest

from rewards import combined
from rewards.combined import KINDS, Kind, Scored, WeightedSum, named_rewards, reward_weights, rewards_from_flags, score
from tests.test_flags import ppo, refused

REWARDS = """
def long(prompts, completions):
    return [len(c) for c in completions]


def one(p, c):
    return [1] * len(c)
"""


@pytest.fixture
def mine(tmp_path):
    """A file of two reward functions."""
    path = tmp_path / "mine.py"
    path.write_text(REWARDS)
    return path


def no_model(path):
    raise AssertionError("no reward model is named")


def test_the_sum_by_hand(mine):
    words = [
        "--ground-truth-reward",
        "--reward-function",
        f"{mine}:long",
        "--reward-weights",
        "long=-0.5",
        "digit_rule=2",
    ]
    reward = rewards_from_flags(ppo(*words), None, no_model)
    # The rule gives "2 4 6" 3/5 and "2 4 5" 2/5; the completions are 4 and 6 characters long.
    prompts, completions = ["2", "2"], [" 4 6", " 4   5"]
    assert reward(prompts, completions) == pytest.approx([2 * 0.6 - 0.5 * 4, 2 * 0.4 - 0.5 * 6])
    scored = score(reward, prompts, (prompts, completions))
    assert scored.parts == {"digit_rule": [0.6, 0.4], "long": [4.0, 6.0]}
    assert scored.scores == pytest.approx([-0.8, -2.2])
    assert scored.part_means() == pytest.approx({"score_digit_rule": 0.5, "score_long": 5.0})
    assert scored.row(1) == {
        "score": scored.scores[1], "score_digit_rule": 0.4, "score_long": 6.0, "prompt": "2", "completion": " 4   5"
    }  # fmt: skip


def test_a_single_reward_has_no_parts(mine):
    scored = score(
        rewards_from_flags(ppo("--reward-function", f"{mine}:long"), None, no_model), ["p"], (["p"], ["abc"])
    )
    assert scored == Scored(["p"], ["abc"], [3.0], {}) and scored.part_means() == {}
    weighed = rewards_from_flags(ppo("--reward-function", f"{mine}:long", "--reward-weights", "long=2"), None, no_model)
    assert weighed(["p"], ["abc"]) == [6.0]


def test_rewards_get_the_prompts_as_given_and_rows_the_decoded():
    seen = []

    def noted(prompts, completions):
        seen.append(prompts)
        return [1.0]

    reward = WeightedSum({"a": noted}, {"a": 1.0})
    assert score(reward, ["given"], (["decoded"], ["c"])).row(0)["prompt"] == "decoded"
    assert seen == [["given"]]


def test_a_flag_given_once_or_twice_names_all_of_its_rewards(mine, tmp_path):
    functions = [f"{mine}:long", f"{mine}:one"]
    weights = ["--reward-weights", "long=1", "one=3"]
    together = ppo("--reward-function", *functions, *weights)
    apart = ppo("--reward-function", functions[0], "--reward-function", functions[1], *weights)
    assert together.reward_function == apart.reward_function == functions
    assert rewards_from_flags(apart, None, no_model)(["p"], ["abcd"]) == [4 + 3]
    # On the command line they take the place of those of the file.
    path = tmp_path / "flags.yaml"
    path.write_text(f"reward_function: ['{functions[0]}']\nreward_weights: [one=1]\n")
    args = ppo("-c", path, "--reward-function", functions[1])
    assert (args.reward_function, args.reward_weights) == ([functions[1]], ["one=1"])
    assert ppo("-c", path).reward_function == functions[:1]


def test_names_are_words_and_differ():
    words = ["--reward-model", "./runs/reward-model/", "other/reward-model", "--reward-function", "a.py:f", "b.py:f"]
    args = ppo(*words, "--ground-truth-reward", "--answer", "number")
    assert list(named_rewards(args)) == ["digit_rule", "reward_model", "reward_model_2", "f", "f_2", "answer"]
    kind, value = named_rewards(args)["f_2"]
    assert (kind.flag, value) == ("--reward-function", "b.py:f")


def test_a_new_kind_of_reward_is_one_row_of_the_table(monkeypatch):
    def fixed(value, sources):
        return lambda prompts, completions: [float(value)] * len(completions)

    kind = Kind("--fixed", {"type": float}, lambda args: [("fixed", "0.25")], fixed)
    monkeypatch.setattr(combined, "KINDS", (*KINDS, kind))
    words = ["--ground-truth-reward", "--reward-weights", "digit_rule=1", "fixed=2"]
    assert rewards_from_flags(ppo(*words), None, no_model)(["2"], [" x"]) == pytest.approx([1 / 5 + 0.5])


def test_weights_are_in_the_order_of_the_rewards():
    words = ["--ground-truth-reward", "--reward-function", "a.py:f", "--reward-weights", "f=0", "digit_rule=1e-1"]
    assert list(reward_weights(ppo(*words)).items()) == [("digit_rule", 0.1), ("f", 0.0)]


BOTH = ("--ground-truth-reward", "--reward-function", "a.py:f")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "none of --ground-truth-reward"),
        (BOTH, "2 rewards are given, but no weight for digit_rule, f; keep one reward, or sum them by"),
        ([*BOTH, "--reward-weights", "f=0.5"], "no weight for digit_rule; keep one reward, or sum them by "
         "--reward-weights digit_rule=1 f=0.5"),
        ([*BOTH, "--reward-weights", "1", "0.5"], "'1', which is not NAME=NUMBER"),
        ([*BOTH, "--reward-weights", "f=1", "g=1"], "'g=1', which is not NAME=NUMBER for one of the rewards; the"),
        ([*BOTH, "--reward-weights", "f=1", "f=2"], "'f=2', which names a reward a second time"),
        ([*BOTH, "--reward-weights", "f=nan", "digit_rule=1"], "'f=nan'"),
        ([*BOTH, "--reward-weights", "f=inf", "digit_rule=1"], "'f=inf'"),
        ([*BOTH, "--reward-weights", "f=", "digit_rule=1"], "'f='"),
        ([*BOTH, "--reward-weights", "f=0", "digit_rule=0"], "all 0"),
        (["--ground-truth-reward", "--reward-weights", "f=1"], "'f=1'"),
        (["--ground-truth-reward", "--steps-per-samples", -1], "--steps-per-samples is -1"),
    ],
)  # fmt: skip
def test_nonsense_is_one_line(words, named):
    assert named in refused(*words)
