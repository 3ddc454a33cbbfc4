"""The benchmarks' own arithmetic, on runs made by hand."""

import math

from benchmarks.digits_seeds import measure, table

import pytest


def rows(scores):
    return [{"step": i + 1, "mean_score": s, "kl": float(i), "seconds": 2.0 * (i + 1)} for i, s in enumerate(scores)]


def test_a_run_is_measured_from_where_the_goal_was_first_reached():
    result = measure(rows([0.5] * 9 + [0.9] + [0.8] * 10 + [1.0] * 20), batch_size=100)
    assert result.completions_to_goal == 1000 and result.seconds_to_goal == 20.0
    assert result.last_fifth == pytest.approx(1.0)
    assert result.lowest_10_steps == result.lowest_1000 == pytest.approx(0.8)
    assert result.final_kl == pytest.approx(34.5) and result.seconds == 80.0


def test_a_run_that_never_arrives_says_so():
    result = measure(rows([0.5] * 20), batch_size=100)
    assert math.isinf(result.completions_to_goal) and math.isnan(result.lowest_1000)
    assert "inf" in table({("mlx", "lora"): [result]})


def test_a_learned_reward_is_judged_by_the_ground_truth():
    made = [{**row, "true_score": 0.1} for row in rows([0.95] * 20)]
    assert math.isinf(measure(made, batch_size=100).completions_to_goal)
