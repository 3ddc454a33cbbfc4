"""Packing sampled completions: masks, positions, EOS, empty completions."""

import numpy as np
import pytest

from training.rollout import Rollout, has_eos, pack, through_eos

EOS, OTHER_EOS, PAD = 2, 7, 0


def test_a_worked_batch():
    packed = pack([[5, 6], [9]], [[10, 11, EOS], [12, 13, 14, 15, 16]], {EOS}, PAD, multiple=1)
    assert packed.tokens.tolist() == [[5, 6, 10, 11, EOS, PAD], [9, 12, 13, 14, 15, 16]]
    assert packed.completions.tolist() == [[10, 11, EOS, PAD, PAD], [12, 13, 14, 15, 16]]
    assert packed.mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    # The position before a token predicts it: the prompt's last for the first.
    assert packed.positions.tolist() == [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]]


def test_positions_point_at_the_token_before_each_completion_token():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 50, size=n).tolist() for n in (1, 4, 9)]
    completions = [rng.integers(8, 50, size=n).tolist() for n in (13, 1, 6)]
    packed = pack(prompts, completions, {EOS}, PAD)
    tokens = np.pad(packed.tokens, ((0, 0), (0, 1)))  # the last place is left off
    after = np.take_along_axis(tokens, packed.positions + 1, axis=1)
    real = packed.mask > 0
    assert (after[real] == packed.completions[real]).all()
    assert packed.positions.max() + 1 == packed.tokens.shape[1]
    assert packed.mask.sum(axis=1).tolist() == [13, 1, 6]


def test_a_completion_ends_with_its_first_eos():
    packed = pack([[5], [5]], [[10, EOS, 11, EOS], [OTHER_EOS, 10]], {EOS, OTHER_EOS}, PAD, multiple=1)
    assert packed.completions.tolist() == [[10, EOS], [OTHER_EOS, PAD]]
    assert packed.mask.tolist() == [[1, 1], [1, 0]]
    assert 11 not in packed.tokens


def test_an_eos_in_the_prompt_ends_nothing():
    packed = pack([[5, EOS, 6]], [[10, 11]], {EOS}, PAD, multiple=1)
    assert packed.mask.tolist() == [[1, 1]]
    assert packed.tokens.tolist() == [[5, EOS, 6, 10]]


def test_a_pad_that_is_the_eos_is_masked():
    packed = pack([[5], [5]], [[10, EOS], [11, 12, 13]], {EOS}, EOS, multiple=1)
    assert packed.mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_an_empty_completion_is_a_row_of_its_own():
    packed = pack([[5], [6], [7]], [[EOS], [], [10, 11]], {EOS}, PAD, multiple=1)
    assert packed.mask.tolist() == [[1, 0], [0, 0], [1, 1]]
    assert packed.tokens.shape[0] == packed.completions.shape[0] == 3
    assert pack([[5]], [[]], {EOS}, PAD).mask.sum() == 0


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (8, 8), (9, 16), (24, 24)])
def test_widths_are_rounded_up_so_that_few_shapes_occur(longest, width):
    packed = pack([[5, 6], [5]], [[9] * longest, [9]], {EOS}, PAD)
    assert packed.completions.shape == packed.mask.shape == packed.positions.shape == (2, width)
    assert packed.tokens.shape == (2, 1 + width)


@pytest.mark.parametrize(
    ("longest", "width"), [(127, 128), (129, 144), (144, 144), (257, 288), (511, 512), (1000, 1024), (1025, 1152)]
)
def test_of_long_ones_by_an_eighth_at_most(longest, width):
    assert pack([[5]], [[9] * longest], {EOS}, PAD).completions.shape == (1, width)


@pytest.mark.parametrize(("prompt", "longest"), [(1, 16), (2, 32), (17, 32), (18, 48), (130, 160)])
def test_lengths_are_rounded_too_where_few_shapes_are_wanted(prompt, longest):
    prompts, completions = [[5] * prompt, [6]], [[9, 8], []]
    plain, rounded = (pack(prompts, completions, {EOS}, PAD, few_shapes=few) for few in (False, True))
    assert plain.tokens.shape == (2, prompt + 7) and plain.completions.shape == (2, 8)
    assert rounded.tokens.shape == (2, longest) and rounded.completions.shape == (2, 16)
    assert (rounded.tokens[:, : prompt + 7] == plain.tokens).all() and (rounded.tokens[:, prompt + 7 :] == PAD).all()
    for field, other in zip(rounded[1:], plain[1:], strict=True):
        assert (field[:, :8] == other).all()
    assert rounded.mask[:, 8:].sum() == 0


def test_fifty_steps_have_few_shapes():
    """Prompts of 20 to 60 tokens, completions of up to 40: as many shapes would be traced as there are."""
    rng = np.random.default_rng(0)
    shapes: dict[bool, set] = {False: set(), True: set()}
    for _ in range(50):
        prompts = [[5] * n for n in rng.integers(20, rng.integers(30, 60), size=8)]
        completions = [[9] * n for n in rng.geometric(0.08, size=8).clip(max=40)]
        for few, found in shapes.items():
            packed = pack(prompts, completions, {EOS}, PAD, few_shapes=few)
            found.add((packed.tokens.shape, packed.completions.shape))
    assert len(shapes[False]) > 40 and len(shapes[True]) <= 8


def test_dtypes_serve_both_frameworks():
    packed = pack([[5]], [[9]], {EOS}, PAD)
    assert [field.dtype.kind for field in packed] == ["i", "i", "i", "f"]


def test_more_completions_than_prompts_are_refused():
    with pytest.raises(ValueError):
        pack([[5]], [[9], [9]], {EOS}, PAD)


@pytest.mark.parametrize(
    ("completion", "ended", "kept"),
    [([], False, []), ([EOS], True, [EOS]), ([9, 9], False, [9, 9]), ([9, EOS, EOS], True, [9, EOS])],
)
def test_where_a_completion_ends(completion, ended, kept):
    assert has_eos(completion, {EOS}) is ended
    assert through_eos(completion, [EOS]) == kept


def test_rows_picks_the_same_rows_of_every_field():
    fields = {name: np.arange(12).reshape(4, 3) + 100 * i for i, name in enumerate(Rollout._fields)}
    rollout = Rollout(**{**fields, "scores": np.arange(4.0)})
    picked = rollout.rows(np.array([2, 0]))
    assert isinstance(picked, Rollout)
    assert picked.scores.tolist() == [2.0, 0.0]
    assert rollout._replace(passes=None).rows(np.array([2, 0])).passes is None
    for field, whole in zip(picked, rollout, strict=True):
        assert (field == whole[[2, 0]]).all()
