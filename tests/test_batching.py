"""From rows to batches: which tokens are trained, the order of rows, and that none is lost."""

import numpy as np
import pytest

from common.errors import UserError
from data.batching import (
    BatchPlan,
    Example,
    collate,
    draw_pairs,
    encode_pair,
    encode_text,
    in_order,
    shared_beginning,
    truncate,
)

PAD, BOS, EOS = 0, 1, 2


class Letters:
    """One id per letter (a = 10), except that "xy" is one token; with or without a BOS in front and its own EOS."""

    eos_token_id = EOS

    def __init__(self, bos=True, eos=False):
        self.bos_token_id = BOS if bos else None
        self.bos, self.eos = bos, eos

    def encode(self, text):
        ids = [10 + ord(letter) - ord("a") for letter in text.replace("xy", "~")]
        return [BOS] * self.bos + ids + [EOS] * self.eos


def trained(example):
    """The trained tokens of an example, read off its batch."""
    batch = collate([example], PAD)
    return [int(token) for token, target in zip(batch.tokens[0, 1:], batch.targets[0], strict=True) if target]


def random_lengths(count=203, longest=200, seed=0):
    return np.random.default_rng(seed).integers(2, longest, count).tolist()


@pytest.mark.parametrize("own_eos", [False, True])
def test_all_of_a_text_is_trained_but_what_stands_before_it(own_eos):
    assert encode_text(Letters(eos=own_eos), "abc") == Example([BOS, 10, 11, 12, EOS], 1)
    assert trained(encode_text(Letters(eos=own_eos), "abc")) == [10, 11, 12, EOS]
    # Without BOS, nothing predicts the first token, so it cannot be trained.
    assert trained(encode_text(Letters(bos=False, eos=own_eos), "abc")) == [11, 12, EOS]


def test_a_soft_prompt_stands_first_and_is_not_trained():
    example = encode_text(Letters(), "ab", prefix=[90, 91])
    assert example.tokens == [90, 91, BOS, 10, 11, EOS]
    assert trained(example) == [10, 11, EOS]
    assert trained(encode_text(Letters(bos=False), "ab", prefix=[90, 91])) == [10, 11, EOS]
    pair = encode_pair(Letters(), "ab", "cd", prefix=[90, 91])
    assert pair.tokens == [90, 91, BOS, 10, 11, 12, 13, EOS]
    assert trained(pair) == [12, 13, EOS]


@pytest.mark.parametrize("own_eos", [False, True])
def test_only_the_completion_and_its_end_are_trained(own_eos):
    example = encode_pair(Letters(eos=own_eos), "abc", "de")
    assert example.tokens == [BOS, 10, 11, 12, 13, 14, EOS]
    assert trained(example) == [13, 14, EOS]


def test_an_empty_text_or_completion_trains_the_end():
    assert trained(encode_text(Letters(), "")) == [EOS]
    assert trained(encode_pair(Letters(), "abc", "")) == [EOS]
    assert trained(encode_pair(Letters(), "", "ab")) == [10, 11, EOS]
    assert collate([encode_text(Letters(bos=False), "")], PAD).targets.sum() == 0


def test_a_merge_over_the_seam_belongs_to_the_completion():
    example = encode_pair(Letters(), "abx", "yc")
    assert example.tokens == [*Letters().encode("abxyc"), EOS]
    assert trained(example) == example.tokens[3:]


def test_pads_are_never_trained_nor_the_token_after_the_last():
    """mlx-lm's loss also trains the pad after the last real token."""
    batch = collate([Example([1, 5, 6, 2], 1), Example([1, 7, 2], 2), Example([1, 2], 1)], pad_token_id=9, multiple=4)
    assert batch.tokens.tolist() == [[1, 5, 6, 2], [1, 7, 2, 9], [1, 2, 9, 9]]
    assert batch.lengths.tolist() == [4, 3, 2]
    assert batch.targets.tolist() == [[1, 1, 1], [0, 1, 0], [1, 0, 0]]


def test_a_pad_that_is_the_eos_too_is_trained_once():
    batch = collate([Example([1, 5, EOS], 1), Example([1, 5, 6, 7, EOS], 1)], pad_token_id=EOS, multiple=8)
    assert batch.targets[0].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert batch.targets[1].tolist() == [1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (7, 8), (8, 8), (9, 16)])
def test_widths_are_rounded_up_so_that_few_shapes_occur(longest, width):
    batch = collate([Example([3] * longest, 1)], PAD)
    assert batch.tokens.shape == (1, width) and batch.targets.shape == (1, width - 1)
    assert batch.targets.sum() == longest - 1


def test_a_cut_text_loses_its_end_and_a_cut_away_completion_trains_nothing():
    """A mean loss over no token would be NaN."""
    assert trained(truncate(encode_text(Letters(), "abcdef"), 4)) == [10, 11, 12]
    assert trained(truncate(encode_pair(Letters(), "abcdef", "gh"), 8)) == [16]
    assert trained(truncate(encode_pair(Letters(), "abcdef", "gh"), 7)) == []
    assert trained(truncate(encode_pair(Letters(), "abcdef", "gh"), 4)) == []


@pytest.mark.parametrize("batch_size", [1, 4, 50, 203, 1000])
def test_every_row_comes_once_an_epoch(batch_size):
    """mlx-lm drops rows that do not fill a batch."""
    lengths = random_lengths()
    plan = BatchPlan(lengths, batch_size, seed=1)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        batches = [plan.rows(step) for step in steps]
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        assert all(0 < len(batch) <= batch_size for batch in batches)


def test_rows_of_a_batch_are_near_in_length():
    """mlx-lm does not bucket by length."""
    lengths = np.array(random_lengths(count=400))
    plan = BatchPlan(lengths.tolist(), 8, seed=0)
    batches = [lengths[plan.rows(step)] for step in range(plan.steps_per_epoch)]
    pads = sum((batch.max() - batch).sum() for batch in batches)
    shuffled = np.random.default_rng(0).permutation(lengths).reshape(-1, 8)
    assert pads < 0.05 * lengths.sum() < 0.5 * lengths.sum() < (shuffled.max(1, keepdims=True) - shuffled).sum()


def test_a_batch_is_a_function_of_seed_and_step():
    lengths = random_lengths()
    plan = BatchPlan(lengths, 8, seed=3)
    in_turn = [plan.rows(step).tolist() for step in range(3 * plan.steps_per_epoch)]
    for step in (len(in_turn) - 1, 0, plan.steps_per_epoch, 5):
        assert BatchPlan(lengths, 8, seed=3).rows(step).tolist() == in_turn[step]
        assert plan.rows(step).tolist() == in_turn[step]
    assert in_turn[: plan.steps_per_epoch] != in_turn[plan.steps_per_epoch : 2 * plan.steps_per_epoch]
    other = BatchPlan(lengths, 8, seed=4)
    assert [other.rows(step).tolist() for step in range(plan.steps_per_epoch)] != in_turn[: plan.steps_per_epoch]


def test_the_order_of_lengths_and_the_batch_mates_change():
    lengths = np.array(random_lengths())
    plan = BatchPlan(lengths.tolist(), 8, seed=0)
    means = [lengths[plan.rows(step)].mean() for step in range(plan.steps_per_epoch)]
    assert means != sorted(means) and means != sorted(means, reverse=True)
    mates = {tuple(sorted(plan.rows(step))) for step in range(plan.steps_per_epoch)}
    mates_later = {tuple(sorted(plan.rows(step + plan.steps_per_epoch))) for step in range(plan.steps_per_epoch)}
    assert mates != mates_later


def test_rows_of_equal_length_meet_others_in_every_epoch():
    plan = BatchPlan([5] * 64, 8, seed=0)
    epochs = [{tuple(sorted(plan.rows(8 * epoch + i))) for i in range(8)} for epoch in range(2)]
    assert epochs[0].isdisjoint(epochs[1])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(batch_size):
    with pytest.raises(UserError, match="--batch-size"):
        BatchPlan([1, 2], batch_size, 0)


def test_evaluation_covers_everything_once_in_order():
    assert [list(part) for part in in_order(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_order(0, 3)) == []


def test_each_row_gives_a_pair_whose_first_is_better():
    rewards = np.random.default_rng(0).integers(0, 4, 50) / 4
    for seed in range(20):
        pairs = draw_pairs(rewards.tolist(), np.random.default_rng(seed))
        assert all(rewards[better] > rewards[worse] for better, worse in pairs)  # so a tie is never a pair
        assert len(pairs) == 50 and all(row in pair for row, pair in enumerate(pairs))


def test_pairs_are_a_function_of_the_generator_and_vary_with_it():
    rewards = [0.0, 0.25, 0.5, 0.75, 1.0] * 4
    draws = [draw_pairs(rewards, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_rewards_that_come_as_strings_are_compared_as_numbers():
    pairs = draw_pairs(["9", "10"], np.random.default_rng(0))  # type: ignore[list-item]
    assert pairs == [(1, 0), (1, 0)]


@pytest.mark.parametrize("rewards", [[0.5, 0.5, 0.5], [1.0], []])
def test_rewards_that_rank_nothing_are_refused(rewards):
    with pytest.raises(UserError, match=f"all {len(rewards)} rewards are equal"):
        draw_pairs(rewards, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ([[*range(20), 7], [*range(20), 8, 9]], 20),
        ([[*range(20)], [*range(20), 8]], 19),  # not the last token of any
        ([[*range(9)], [*range(9), 1, 2], [*range(8), 99, 3]], 8),
        ([[*range(8)], [*range(9)]], 0),  # seven, which are too few
        ([[*range(20)], [*range(20)]], 0),  # not different prompts
        ([[*range(20)]], 0),
        ([[5], [5, 6]], 0),
    ],
)
def test_what_different_prompts_begin_with(prompts, count):
    assert shared_beginning(prompts) == shared_beginning(prompts[::-1]) == count
