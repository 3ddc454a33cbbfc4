"""The digit rule: scores worked out by hand."""

import pytest

from data.digits import DigitRule
from rewards.digits import digit_reward

EVEN = DigitRule(increasing=True, multiple_of=2)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("8 20 22 30 36", 1.0),
        ("8 20 22 30 36 38 50 60 68", 1.0),
        ("8 20 22 30", 4 / 5),  # shorter than five words: divided by five
        ("8 20 21 30", 2 / 5),  # 21 is odd; nothing after it counts
        ("8 20 22 30 36 37 40", 5 / 7),
        ("8 20 20 30 36", 2 / 5),  # not strictly above
        ("2 2 4", 1 / 5),
        ("8 6 10 12 14", 1 / 5),
        ("3", 0.0),
        ("3 4 6 8 10", 0.0),  # the run is the leading one
        ("", 0.0),
        ("  \n\t ", 0.0),
        ("0 2 4 6 8", 1.0),  # 0 is a multiple of everything
        ("-8 -6 0 2 4", 1.0),
        ("-6 -8", 1 / 5),
        ("  8\t20\n22  30 36 ", 1.0),  # any white space, any amount
        ("08 20 22 30 36", 1.0),
    ],
)
def test_increasing_even(text, score):
    assert EVEN.score(text) == pytest.approx(score, abs=1e-12)


NO_PLAIN_INTEGERS = ["x", "4.0", "1e3", "+10", "1_000", "٣٠", "²", "٢", "-", "--4", "4-", "10,", "0x10", "∞"]


@pytest.mark.parametrize("word", NO_PLAIN_INTEGERS)
def test_a_word_that_is_no_plain_integer_counts_as_a_word_and_breaks_nothing(word):
    assert EVEN.score(f"8 {word} 10 12 14 16") == pytest.approx(5 / 6)
    assert EVEN.score(word) == 0.0


def test_absurd_input_never_raises():
    assert EVEN.score("2" * 100_000) == 0.0
    assert EVEN.score("8 " + "2" * 640) == pytest.approx(2 / 5)
    assert EVEN.score("\x00 \ud800 \U0001f600") == 0.0


@pytest.mark.parametrize(
    ("text", "score"),
    [("900 80 7 -3 -50", 1.0), ("10 10 5 4 3", 1 / 5), ("10 11 5 4 3", 1 / 5), ("10 9 8 7 7 6", 4 / 6)],
)
def test_decreasing(text, score):
    assert DigitRule(increasing=False, multiple_of=1).score(text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "score"), [("3 9 12 30 33", 1.0), ("3 9 13", 2 / 5), ("-9 -3 0 3 6", 1.0), ("4", 0.0)]
)
def test_multiples_of_three(text, score):
    assert DigitRule(multiple_of=3).score(text) == pytest.approx(score)


def test_the_score_is_1_only_for_a_whole_perfect_text():
    words = [str(2 * i) for i in range(1, 16)]
    assert [EVEN.score(" ".join(words[:n])) for n in range(1, 16)] == pytest.approx(
        [min(n / 5, 1.0) for n in range(1, 16)]
    )
    assert EVEN.score(" ".join([*words, "x"])) < 1.0


def test_reward_scores_prompt_and_completion_joined_as_they_are():
    prompts = ["8", "8 20", "8", "7"]
    completions = [" 20 22 30 36", " 22", "0 82 84 86 88", " 20 22 30 36"]
    assert digit_reward(EVEN)(prompts, completions) == pytest.approx([1.0, 3 / 5, 1.0, 0.0])
    assert digit_reward(EVEN)([], []) == []


def test_an_empty_completion_is_one_score_of_its_own():
    assert digit_reward(EVEN)(["8", ""], ["", ""]) == pytest.approx([1 / 5, 0.0])


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="zip"):
        digit_reward(EVEN)(["8", "10"], [" 12"])


def test_name():
    assert EVEN.name == "increasing_mult_2"
    assert DigitRule(increasing=False, multiple_of=7).name == "decreasing_mult_7"


@pytest.mark.parametrize("multiple_of", [0, -2])
def test_a_multiple_below_one_is_refused(multiple_of):
    with pytest.raises(ValueError, match="multiple_of"):
        DigitRule(multiple_of=multiple_of)
