"""The tasks of benchmarks/families.py: their scores by hand, their texts, their halves; and what a curve says."""

import math

import numpy as np
import pytest

from benchmarks import families, family_tasks, trl_families
from benchmarks.families import finite, measure, table, verdicts


@pytest.mark.parametrize(
    ("rule", "numbers", "expected"),
    [
        ("palindrome", [1, 2, 3, 2, 1], 1.0),
        ("palindrome", [1, 2, 3, 2, 4], 0.5),
        ("palindrome", [1, 2, 3, 3, 2, 1], 1.0),
        ("palindrome", [1, 2, 1], 0.0),
        ("palindrome", [7, 7, 7, 7, 7], 0.0),
        ("total", [10, 10, 10, 10, 10], 1.0),
        ("total", [10, 10, 10, 10, 5], 0.9),
        ("total", [25, 25], 0.0),
        ("total", [50, 50, 50, 50, 50], 0.0),
        ("alternation", [1, 2, 3, 4, 5], 1.0),
        ("alternation", [1, 2], 0.4),
        ("alternation", [1, 2, 4, 5, 6, 7], 2 / 6),
        ("length", [4, 1, 1, 1], 1.0),
        ("length", [4, 1], 0.5),
        ("length", [4] * 9, 0.0),
        ("length", [0, 1], 0.0),
    ],
)
def test_word_rules_by_hand(rule, numbers, expected):
    prompt, completion = str(numbers[0]), "".join(f" {number}" for number in numbers[1:])
    assert getattr(family_tasks, rule)([prompt], [completion]) == pytest.approx([expected])
    assert getattr(family_tasks, f"{rule}_whole")([prompt], [completion]) == [float(expected == 1)]
    assert getattr(family_tasks, rule)([prompt], [completion + " -3"]) == [0.0]


@pytest.mark.parametrize("rule", family_tasks.WORD_RULES)
def test_texts_follow_their_rule_until_they_are_spoilt(rule, monkeypatch):
    rng = np.random.default_rng(0)
    score = {"palindrome": family_tasks.palindrome_score, "total": family_tasks.total_score,
             "alternation": family_tasks.alternation_score, "length": family_tasks.length_score}[rule]  # fmt: skip
    assert all(score(family_tasks.WORD_RULES[rule](rng)) == 1 for _ in range(200))
    spoilt = [[int(n) for n in family_tasks.noisy_text(rng, rule).split()] for _ in range(200)]
    assert 0.2 < np.mean([score(numbers) for numbers in spoilt]) < (1.01 if rule == "length" else 0.95)


def test_every_task_is_in_one_half_only():
    names = [task.name for half in family_tasks.HALVES.values() for task in half]
    assert len(names) == len(set(names)) == 18
    assert {len(half) for half in family_tasks.HALVES.values()} == {9}


def test_sums_have_their_answers():
    rows = family_tasks.sum_rows(np.random.default_rng(0), 3, 50)
    for row in rows:
        a, b = (int(word) for word in row["prompt"].removesuffix(" =").split(" + "))
        assert str(a + b) == row["answer"]
        assert 100 <= a <= 999


def rows(scores):
    return [{"mean_score": s, "kl": 2.0, "seconds": float(i + 1)} for i, s in enumerate(scores)]


def test_what_a_curve_shows():
    rising = measure(rows([0.1] * 10 + [0.6] * 10 + [1.0] * 20), batch_size=10)
    assert rising.first == 0.1
    assert rising.final == 1.0
    # The mean of steps 20 to 24 is (0.6 + 4) / 5 = 0.92, that of 19 to 23 0.84.
    assert rising.completions_to_final == 24 * 10
    assert not rising.collapsed
    assert finite(rising)["completions_to_final"] == 24 * 10
    late = measure(rows([0.1] * 4 + [1.0]), batch_size=10)  # no mean of 5 steps has 0.9
    assert math.isinf(late.completions_to_final) and finite(late)["completions_to_final"] is None
    assert rising.kl == 2.0
    assert measure(rows([0.1] * 10 + [0.8] * 20 + [0.3] * 10)).collapsed
    assert not measure(rows([0.1] * 10 + [0.8] * 20 + [0.5] * 10)).collapsed


def test_labels_are_compared_over_cells_that_all_have():
    def result(final):
        return measure(rows([0.1] * 10 + [final] * 40))

    cells = {("total", "gae", 0): result(1.0), ("total", "gae", 1): result(0.5)}
    other = {("total", "gae", 0): result(0.8)}
    results = {"defaults": cells, "fast": other}
    assert verdicts(results, "held out") == [
        "defaults: 0.9 of the best label in 1 of 1 cells, 1.00 of it on average",
        "fast: 0.9 of the best label in 0 of 1 cells, 0.80 of it on average",
    ]
    assert verdicts({"defaults": cells}, "held out") == []
    assert "| total, gae | 0.10 | 0.75 (0.50 to 1.00), KL 2 | 0.80, KL 2 |" in table(results, "held out")


def test_a_cell_that_was_cut_goes_on(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(families, "script", lambda log, jobs, *words: seen.append(words))
    families.train(tmp_path / "log", tmp_path / "run", "ppo_training.py", "--seed", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    families.train(tmp_path / "log", tmp_path / "run", "ppo_training.py", "--seed", 1)
    assert seen == [
        ("ppo_training.py", "--seed", 1, "--output-dir", tmp_path / "run"),
        ("ppo_training.py", "--resume", tmp_path / "run"),
    ]


def test_trl_s_best_rate_stands_beside_ours():
    """Of 40 steps of 128 completions: a mean of 5 steps reaches the goal with the fifth step behind the rise."""

    def rows(before, after, rise):
        scores = [before] * rise + [after] * (40 - rise)
        return [{"mean_score": score, "kl": 1.0, "seconds": float(i)} for i, score in enumerate(scores)]

    key = ("total", "gae", 0)
    runs = {
        "defaults": {key: rows(0.0, 1.0, 10), ("length", "gae", 0): rows(0.0, 1.0, 5)},
        "TRL_0.001": {key: rows(0.0, 0.8, 2)},
        "TRL_0.01": {key: rows(0.0, 0.2, 1)},
    }
    lines = trl_families.table(runs, ["total", "length"]).splitlines()[2:]
    assert lines == ["| total, 0 | 1.000 | 1,920 | 0.800, 0.001 | 896 | never |"]
