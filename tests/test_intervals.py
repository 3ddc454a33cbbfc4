"""Intervals, against values from the literature and worked by hand."""

import random

import pytest

from training.intervals import Interval, agresti_min, bootstrap, difference, mcnemar, mean_interval, over_seeds, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_newcombe_has_it(successes, count, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    found = wilson(successes, count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    mirrored = wilson(count - successes, count)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(6, 1) == pytest.approx(2 * (1 + 7) / 128)


def test_a_mean_of_shares_is_wilsons_and_else_the_bootstraps():
    assert mean_interval([1.0, 0.0, 1.0]) == wilson(2, 3)
    found = mean_interval([0.5] * 10)
    assert found == Interval(0.5, 0.5, 0.5) and str(found) == "0.500 [0.500, 0.500]"
    rng = random.Random(0)
    values = [rng.random() for _ in range(300)]
    found = bootstrap(values)
    standard_error = 0.288675 / 300**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    assert found == bootstrap(values) and found.low < found.mean < found.high


def test_a_difference_is_paired():
    """Ten questions gained by one model, of a hundred of any difficulty: the interval is that of 10 in 100."""
    first = [float(n % 2) for n in range(100)]
    second = [1.0 if n < 20 else score for n, score in enumerate(first)]
    found = difference(first, second)
    assert (found.gained, found.lost) == (10, 0) and found.p_value == pytest.approx(2 / 1024)
    assert found.interval.mean == pytest.approx(0.1)
    assert 0.03 < found.interval.low < 0.06 and 0.14 < found.interval.high < 0.18
    assert found.interval == agresti_min(10, 0, 100)
    parts = difference([score / 2 for score in first], [score / 2 for score in second]).interval
    assert (parts.mean, parts.low, parts.high) == pytest.approx((0.05, 0.025, 0.08), abs=0.006)  # by the bootstrap
    with pytest.raises(ValueError, match="zip"):
        difference([1.0], [1.0, 0.0])


def test_a_paired_difference_by_hand():
    """The table 794, 86, 150, 570 of approval ratings (Agresti, Categorical Data Analysis, 10.1): 0.04 ± 0.019."""
    found = agresti_min(150, 86, 1600)
    assert (found.mean, found.low, found.high) == pytest.approx((0.04, 0.0212, 0.0587), abs=2e-4)
    assert agresti_min(86, 150, 1600).high == pytest.approx(-found.low)
    assert agresti_min(0, 0, 2) == pytest.approx((0.0, -0.49, 0.49), abs=1e-4)  # 1.96 · √1 / 4


def test_no_scores_have_no_interval():
    for function in (bootstrap, mean_interval):
        with pytest.raises(ValueError, match="at least one"):
            function([])


def test_runs_are_compared_by_students_t():
    """Mean 2, standard deviation 1 (Bessel's), three runs: 2 ± 4.303 / √3."""
    found = over_seeds([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 2.0 - 4.303 / 3**0.5, 2.0 + 4.303 / 3**0.5))
    assert over_seeds([0.5] * 20) == Interval(0.5, 0.5, 0.5)
    for count in (1, 21):
        with pytest.raises(ValueError, match=f"{count} runs"):
            over_seeds([0.5] * count)


def test_the_true_mean_lies_in_students_interval_in_19_of_20_cases():
    rng = random.Random(0)
    spreads = [over_seeds([rng.gauss(1.0, 2.0) for _ in range(5)]) for _ in range(4000)]
    assert sum(low <= 1.0 <= high for _, low, high in spreads) / len(spreads) == pytest.approx(0.95, abs=0.012)
