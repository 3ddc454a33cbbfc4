"""models/tiny_texts.py: the training sums of tiny-arithmetic, and its evaluation file."""

import re

import numpy as np
import pytest

from models.tiny import BOS, EOS, PAD, RECIPES, WORD_END, _batches, build_tokenizer
from models.tiny_texts import FORGOTTEN_CARRIES, _sum_with_slips, is_held_out_sum, operand, sums
from synth.task import SHIPPED, load_task

ARITHMETIC = RECIPES["tiny-arithmetic"]
EVALUATION = load_task(SHIPPED / "arithmetic.yaml").evaluation


def numbers(text, form):
    found = re.fullmatch(form, text)
    assert found is not None, text
    return [int(number) for number in found.groups()]


@pytest.mark.parametrize(
    ("a", "b", "kept", "without"), [(3, 4, 7, 7), (8, 5, 13, 3), (95, 7, 102, 92), (999, 1, 1000, 990), (0, 0, 0, 0)]
)
def test_carries_are_added_or_forgotten(a, b, kept, without):
    rng = np.random.default_rng(0)
    assert _sum_with_slips(rng, a, b, 0.0) == kept == a + b
    assert _sum_with_slips(rng, a, b, 1.0) == without


def test_a_carry_is_forgotten_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [_sum_with_slips(rng, 8, 5, 0.3) for _ in range(4000)]
    assert set(found) == {13, 3} and np.mean(np.array(found) == 3) == pytest.approx(0.3, abs=0.03)


def test_texts_are_sums_that_are_not_held_out_and_mostly_wrong_only_where_they_are_large():
    rng = np.random.default_rng(0)
    right: dict[int, list[bool]] = {1: [], 2: [], 3: []}
    for _ in range(6000):
        a, b, total = numbers(sums(rng), r"(\d+) \+ (\d+) = (\d+)")
        assert not is_held_out_sum(a, b)
        right[len(str(max(a, b)))].append(a + b == total)
    shares = {size: np.mean(found) for size, found in right.items()}
    assert FORGOTTEN_CARRIES[0] == 0 and shares[1] == 1.0
    assert 0.7 < shares[2] < 1 and shares[3] < 0.5


@pytest.mark.parametrize(("size", "lowest", "highest"), [(1, 0, 9), (2, 10, 99), (3, 100, 999)])
def test_an_operand_has_its_digits(size, lowest, highest):
    rng = np.random.default_rng(0)
    found = [operand(rng, size) for _ in range(40_000)]
    assert (min(found), max(found)) == (lowest, highest)


def test_one_sum_in_ten_is_held_out():
    assert np.mean([is_held_out_sum(a, b) for a in range(100) for b in range(100)]) == pytest.approx(0.1, abs=0.01)


def test_the_evaluation_set_holds_right_sums_that_were_held_out():
    assert len({row["input"] for row in EVALUATION}) == len(EVALUATION) == 300
    sizes = set()
    for row in EVALUATION:
        a, b = numbers(row["input"], r"(\d+) \+ (\d+) =")
        assert is_held_out_sum(a, b) and row["output"] == str(a + b)
        sizes.add((len(str(a)), len(str(b))))
    assert sizes == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3)}


def test_only_what_follows_the_equals_sign_is_trained_on():
    tokenizer = build_tokenizer(ARITHMETIC)
    batch, _ = next(_batches(ARITHMETIC, tokenizer))
    equals = tokenizer.convert_tokens_to_ids("=" + WORD_END)
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        place = list(tokens).index(equals)
        length = list(tokens).index(EOS)
        assert tokens[0] == BOS and (tokens[length + 1 :] == PAD).all()
        assert list(np.flatnonzero(targets)) == list(range(place, length))
