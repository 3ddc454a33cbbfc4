"""Near-duplicates: exactly those that a comparison of every pair finds, by ROUGE-L worked by hand."""

import random

import pytest

from common.errors import UserError
from synth.near_duplicates import Duplicate, find_duplicates, normalise, rouge_l, tokens
from tests.timing import takes_under


def plain_lcs(one, other):
    """The textbook's table, to hold rapidfuzz's."""
    row = [0] * (len(other) + 1)
    for a in one:
        above_left = 0
        for j, b in enumerate(other, 1):
            above_left, row[j] = row[j], above_left + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def by_every_pair(texts, against, threshold):
    kept, found = list(enumerate(against)), []
    for number, text in enumerate(texts, len(against)):
        same = [other for other, its in kept if normalise(its) == normalise(text)]
        near = [
            other
            for other, its in kept
            if 2 * plain_lcs(tokens(its), tokens(text)) >= threshold * (len(tokens(its)) + len(tokens(text))) - 1e-9
            and tokens(text)
        ]
        if same or near:
            of = (same or near)[0]
            found.append((number - len(against), of if of < len(against) else of - len(against), of < len(against)))
        else:
            kept.append((number, text))
    return found


def test_rouge_l_by_hand():
    # The longest common subsequence is "the cat the mat": 2 · 4 / (6 + 5).
    assert rouge_l(tokens("The cat sat on the mat."), tokens("the cat, near the mat")) == pytest.approx(8 / 11)
    assert rouge_l(["a", "b"], ["b", "a"]) == 0.5
    assert rouge_l([], ["a"]) == rouge_l([], []) == 0.0


def test_signs_are_tokens_and_punctuation_is_none():
    assert tokens("What's 12 + 5.0 = ?") == ["what", "s", "12", "+", "5", "0", "="]
    assert find_duplicates(["12 + 5", "12 - 5", "12 * 5"]) == []


def test_case_white_space_and_composed_accents_do_not_count():
    texts = ["Caf\u00e9 or  tea?", "cafe\u0301 OR tea?\n", "...", " ... ", "?"]
    found = find_duplicates(texts)
    assert [(d.number, d.of, d.reason) for d in found] == [(1, 0, "same words"), (3, 2, "same words")]


@pytest.mark.parametrize(
    ("shared", "is_duplicate"),
    [(7, True), (6, False)],  # of ten words each: ROUGE-L is 0.7 or 0.6
)
def test_the_threshold_itself_is_a_duplicate(shared, is_duplicate):
    one = [f"w{i}" for i in range(10)]
    other = one[:shared] + [f"x{i}" for i in range(10 - shared)]
    found = find_duplicates([" ".join(one), " ".join(other)])
    assert found == ([Duplicate(1, 0, False, 0.7)] if is_duplicate else [])


@pytest.mark.parametrize("length", range(1, 120))
def test_no_rounding_moves_the_threshold(length):
    """7 of 10, 14 of 20 and so on are at the threshold; one word fewer is below it."""
    shared = -(-7 * length // 10)
    one = [f"w{i}" for i in range(length)]
    for count, expected in ((shared, 1), (shared - 1, 0)):
        other = one[:count] + [f"x{i}" for i in range(length - count)]
        assert len(find_duplicates([" ".join(one), " ".join(other)])) == expected


def test_a_threshold_that_floating_point_rounds_up_is_met_all_the_same():
    """2 · 7 / (12 + 13) is 0.56, but 25 · 0.56 / 2 in floating point is above 7."""
    one = " ".join(f"w{i}" for i in range(12))
    other = " ".join([f"w{i}" for i in range(7)] + [f"x{i}" for i in range(6)])
    assert [d.score for d in find_duplicates([one, other], threshold=0.56)] == [0.56]


def test_a_dropped_text_drops_none():
    """b repeats a, and c repeats b but not a: c stays."""
    a, b, c = "1 2 3 4 5 6 7 8 9 10", "1 2 3 4 5 6 7 8 x y", "1 2 3 4 5 6 p q x y"
    assert [d.number for d in find_duplicates([b, c])] == [1]
    assert [d.number for d in find_duplicates([a, b, c])] == [1]


def test_against_comes_first_and_is_not_compared_within_itself():
    demos = ["two and three", "two and three"]
    found = find_duplicates(["one alone", "two and three!", "one alone"], against=demos)
    assert found == [Duplicate(1, 0, True, 1.0), Duplicate(2, 0, False, 1.0)]
    assert find_duplicates([], against=demos) == find_duplicates([]) == []


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_every_pair_compared_gives_the_same(seed, threshold):
    rng = random.Random(seed)
    vocabulary = ["a", "b", "c", "d", "+", "7"]
    pool = [" ".join(rng.choices(vocabulary, k=rng.randrange(0, 9))) for _ in range(80)]
    texts, against = pool[:60], pool[60:]
    found = find_duplicates(texts, against, threshold)
    assert [(d.number, d.of, d.in_against) for d in found] == by_every_pair(texts, against, threshold)
    assert 0 < len(found) < 60
    for d in found:
        other = (against if d.in_against else texts)[d.of]
        assert d.score == 1.0 or d.score == pytest.approx(rouge_l(tokens(texts[d.number]), tokens(other)))


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(UserError, match="threshold"):
        find_duplicates(["a"], threshold=threshold)


def test_a_thousand_against_a_thousand_is_quick():
    rng = random.Random(0)
    texts = [" ".join(f"w{int(rng.paretovariate(0.6)) % 5000}" for _ in range(50)) for _ in range(2000)]
    # 0.1 s where nothing else runs; every pair in Python takes minutes
    assert takes_under(2.0, find_duplicates, texts[:1000], texts[1000:])
