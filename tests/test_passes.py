"""Rows end to end, each prompt once: the figures and gradients of rows with pads."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import base, llama

from models.frozen_layers import lower_states
from models.value_head import Policy, new_value_head
from tests.architectures import ARCHITECTURES, VOCABULARY, build
from tests.test_packing import NOT_PACKED, close
from training.passes import PackedRows, PaddedRows, Pass, reading, rows_of
from training.rollout import pack

# Of many lengths, one is empty, one is a token; the first and the last prompt are one, and so are two of a token.
PROMPTS = [[5, 6, 7, 8], [9], [3, 4] * 9, [9], [5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8]]
COMPLETIONS = [[11, 12, 13], [14] * 20, [15, 16], [17], [], [18] * 7, [11, 12, 14]]


# All begin alike: one is nothing else, two are one prompt, and two are one that another begins with.
SYSTEM = [*range(20, 32)]
BEGUN = [[*SYSTEM, *rest] for rest in ([5], [6, 7, 8], [6, 7, 8], [6, 7, 8, 9, 10], [4], [6, 7, 8, 9, 10], [3, 1])]
CASES = {"apart": PROMPTS, "begun alike": BEGUN}


def both(prompts=PROMPTS, completions=COMPLETIONS, few_shapes=False):
    """The rows with pads and end to end, and the mask (B, C)."""
    tokens, positions, targets, mask = map(mx.array, pack(prompts, completions, set(), 0))
    return PaddedRows(tokens, positions, targets), PackedRows(prompts, completions, targets.shape[1], few_shapes), mask


def of_rows(policy: Policy, part: Pass, mask: mx.array, frozen=0):
    """A figure (B, C) of every completion token, and the gradient of their sum, in which no two count alike."""
    weights = mx.random.normal(mask.shape, key=mx.random.key(0)) * mask

    def loss(policy):
        with reading(policy.model, part, frozen):
            hidden, values = policy(part.tokens, part.positions)
        own = mx.take_along_axis(hidden, part.targets[..., None] % hidden.shape[-1], axis=-1)[..., 0]
        figures = part.by_row(own + values)
        return (weights * figures).sum(), figures

    (_, figures), gradients = nn.value_and_grad(policy, loss)(policy)
    return np.array(figures * mask), dict(tree_flatten(gradients))


def policy_of(name, **changes):
    model = build(name, **changes)
    model.train()
    return Policy(model, new_value_head(model, std=1.0))


@pytest.mark.parametrize("prompts", CASES)
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - NOT_PACKED))
def test_every_family_gives_the_figures_and_gradients_of_rows_with_pads(name, prompts):
    policy = policy_of(name)
    padded, rows, mask = both(CASES[prompts])
    index = np.arange(len(PROMPTS))
    expected, gradients = of_rows(policy, padded[index], mask)
    found, ours = of_rows(policy, rows[index], mask)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    close(ours, gradients)


@pytest.mark.parametrize("prompts", CASES)
@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("index", [[0], [4], [1, 3], [6, 0, 5], [2, 1, 0, 6], [4, 4, 2]], ids=str)
def test_some_rows_in_any_order(index, few_shapes, prompts):
    policy = policy_of("llama-tied")
    padded, rows, mask = both(CASES[prompts], few_shapes=few_shapes)
    expected, gradients = of_rows(policy, padded[np.array(index)], mask[mx.array(index)])
    found, ours = of_rows(policy, rows[mx.array(index)], mask[mx.array(index)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    close(ours, gradients)


def test_a_prompt_is_read_once_and_no_pad_but_to_a_multiple_of_8():
    prompts, completions = [[*range(1, 34)]] * 6 + [[40, 41]], [[50 + i] * (i + 1) for i in range(7)]
    _, rows, _ = both(prompts, completions)
    part = rows[np.arange(7)]
    assert part.tokens.shape == (1, 40 + 32)  # 32 + 1 tokens of prompts but for their last; 1 + … + 7 of rows
    assert len(rows.tokens) == 32 + 1 + 28
    assert part.targets.shape == part.positions.shape == (1, 32)
    with_token = part.tokens.tolist()[0]
    assert with_token[:33] == [*range(1, 33), 40] and with_token[40:43] == [33, 33, 51]


def test_every_token_asks_once_however_many_rows_go_on_from_it(monkeypatch):
    """Attention's queries and keys (rows, places): of the beginning, the prompts, the rows."""
    asked, plain = [], llama.scaled_dot_product_attention

    def recorded(queries, keys, *args, **kwargs):
        asked.append([(len(array), array.shape[2]) for array in (queries, keys)])
        return plain(queries, keys, *args, **kwargs)

    monkeypatch.setattr(llama, "scaled_dot_product_attention", recorded)
    policy, begun = policy_of("llama-tied", num_hidden_layers=1), [*range(20, 40)]
    prompts = [[*begun, *range(1, 31)]] * 5 + [[*begun, 41, 42]] * 3
    _, rows, mask = both(prompts, [[50 + i] * (i + 1) for i in range(8)])
    of_rows(policy, rows[np.arange(8)], mask)
    assert asked[-3:] == [[(1, 20), (1, 20)], [(2, 29), (2, 49)], [(8, 8), (8, 56)]]


def test_what_all_prompts_begin_with_is_read_once():
    _, rows, _ = both(BEGUN)
    assert len(rows.tokens) == 12 + (2 + 4 + 1) + sum(map(len, COMPLETIONS))
    tokens = rows[np.arange(7)].tokens.tolist()[0]
    assert tokens[:12] == SYSTEM and tokens[12:19] == [6, 7, 6, 7, 8, 9, 3]
    alone = rows[np.array([4])].tokens.tolist()[0]
    assert alone[:12] == SYSTEM and not any(alone[12:16])


@pytest.mark.parametrize("prompts", CASES)
def test_states_that_were_kept_are_those_of_a_pass_over_the_rows(prompts):
    """In two parts, which have a prompt in common."""
    policy = policy_of("llama-tied", num_hidden_layers=3)
    padded, rows, mask = both(CASES[prompts])
    halves = []
    for index in (np.array([2, 0, 1]), np.array([3, 4, 5, 6])):
        part = rows[index]
        with reading(policy.model, part, 0):
            halves.append((index, lower_states(policy.model, part.tokens, 2)))
    rows.keep(halves)
    at = rows.rows_and_places()
    expected = np.array(lower_states(policy.model, padded.tokens, 2))[at]
    np.testing.assert_allclose(np.array(rows.states), expected, atol=1e-5)
    index = np.array([6, 1, 4, 0])
    ours, _ = of_rows(policy, rows[index], mask[mx.array(index)], frozen=2)
    plain, _ = of_rows(policy, padded[index], mask[mx.array(index)])
    np.testing.assert_allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "may_pack", "kind"),
    [([8, 8, 8], True, PaddedRows), ([8, 2, 1], True, PackedRows), ([8, 2, 1], False, PaddedRows)],
)
def test_rows_lie_end_to_end_where_that_saves_a_tenth(lengths, may_pack, kind):
    prompts, completions = [[1, 2, i] for i in range(3)], [[7] * length for length in lengths]
    padded, _, _ = both(prompts, completions)
    assert type(rows_of(padded, prompts, completions, None, may_pack, False)) is kind


def test_rows_alike_in_length_share_prompts():
    prompts, completions = [[*range(1, 9)]] * 4, [[i] * 8 for i in range(4)]
    padded, _, _ = both(prompts, completions)
    assert type(rows_of(padded, prompts, completions, None, True, False)) is PackedRows


def test_random_rows_agree():
    rng, policy = np.random.default_rng(0), policy_of("llama-tied")
    for _ in range(12):
        begun = rng.integers(1, VOCABULARY, 15 * rng.integers(2)).tolist()
        known = [begun + rng.integers(1, VOCABULARY, rng.integers(1, 20)).tolist() for _ in range(rng.integers(1, 5))]
        prompts = [known[rng.integers(len(known))] for _ in range(rng.integers(1, 12))]
        completions = [rng.integers(1, VOCABULARY, rng.integers(0, 15)).tolist() for _ in prompts]
        padded, rows, mask = both(prompts, completions)
        index = rng.permutation(len(prompts))[: rng.integers(1, len(prompts) + 1)]
        expected, gradients = of_rows(policy, padded[index], mask[mx.array(index)])
        found, ours = of_rows(policy, rows[index], mask[mx.array(index)])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        close(ours, gradients)


def test_a_mask_with_a_window_is_of_a_row_and_not_of_all_tokens(monkeypatch):
    """With one of all tokens, a rollout of some thousand would need gigabytes."""
    made, plain = [], base.create_causal_mask

    def recorded(count, *args, **kwargs):
        made.append(count)
        return plain(count, *args, **kwargs)

    monkeypatch.setattr(base, "create_causal_mask", recorded)
    policy, (_, rows, mask) = policy_of("gemma3"), both()
    of_rows(policy, rows[np.arange(len(PROMPTS))], mask)
    assert made and set(made) == {rows.longest}
