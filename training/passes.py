"""A rollout as PPO's passes read it: rows with pads beside each other, or end to end without pads.

    rows = rows_of(padded, prompts, completions, ...)
    part = rows[index]  # of a mini batch
    with reading(model, part, frozen_layers):
        _, hidden = forward(model, part.tokens, part.positions)
    part.by_row(token_stats(model, hidden, part.targets).logprobs)  # (B, C)

End to end, a prompt is there once, however many completions it has, and so is what all prompts begin with (a system
prompt). That comes first; then the prompts, each but for its last token; then, of every row, that token and its
completion but for the last: so what follows the prompts predicts the completions' tokens, one each. models.packing lets
a row see its own prompt and nothing of others.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from data.batching import shared_beginning
from models.frozen_layers import SampledStates, from_states
from models.packing import Beginning, Layout, Level, packed
from training.rollout import rounded

SAVED = 0.1  # of the tokens of padded rows, at least: packing has copies to make


class Pass(NamedTuple):
    """What a forward pass reads of B rows: R texts of T tokens, in which N predict one of a completion.

    With pads R is B and N is C; end to end R is 1, and there are places, mask and layout.
    """

    tokens: mx.array  # (R, T) ids
    positions: mx.array  # (R, N) index into T
    targets: mx.array  # (R, N) ids
    states: mx.array | None = None  # (R, T, H) that enter the first trained layer, where they are kept
    places: mx.array | None = None  # (B, C) index into N of each token of a completion; 0 at pads
    mask: mx.array | None = None  # (B, C) whether there is one
    layout: Layout | None = None

    def by_row(self, figures: mx.array) -> mx.array:
        """(R, N) → (B, C)."""
        if self.places is None:
            return figures
        return mx.where(self.mask, figures[0][self.places], mx.zeros((), figures.dtype))


@contextmanager
def reading(model: nn.Module, part: Pass, frozen_layers: int, states: bool = True) -> Iterator[None]:
    """Within it, calls of `model` take the part's tokens and, if wanted, its states for what the frozen layers give."""
    with ExitStack() as stack:
        if part.layout is not None:
            stack.enter_context(packed(model, part.layout))
        stack.enter_context(from_states(model, part.states if states else None, frozen_layers))
        yield


class PaddedRows:
    """Rows as rollout.pack gives them."""

    def __init__(self, tokens: mx.array, positions: mx.array, targets: mx.array, states: mx.array | None = None):
        """tokens, states: (B, L - 1), (B, L - 1, H); positions, targets: (B, C)."""
        self.tokens, self.positions, self.targets, self.states = tokens, positions, targets, states

    def __getitem__(self, rows: mx.array | np.ndarray) -> Pass:
        """The rows of these indices."""
        index = mx.array(rows)
        states = None if self.states is None else self.states[index]
        return Pass(self.tokens[index], self.positions[index], self.targets[index], states)

    def keep(self, states: Sequence[tuple[np.ndarray, mx.array]]) -> None:
        """Keep the states of all rows: of the parts that they make up in their order, with the indices of each."""
        self.states = mx.concatenate([part for _, part in states])


class PackedRows:
    """Rows end to end. Their tokens are numbered: the beginning of all prompts, the rest of each distinct prompt, and
    those of the rows."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        width: int,
        few_shapes: bool = False,
    ):
        """prompts: at least one id each; completions: as far as they are trained on; width: C; few_shapes: as of
        rollout.pack."""
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.begun = begun = shared_beginning([*numbers])  # tokens
        shared = [next(iter(numbers))[:begun], *(prompt[begun:-1] for prompt in numbers)]
        own = [[prompt[-1], *completion][:-1] for prompt, completion in zip(prompts, completions, strict=True)]
        self.prompt_of = np.array([numbers[tuple(prompt)] for prompt in prompts])  # (B,)
        lengths, self.lengths = _lengths(shared), _lengths(own)
        self.prompt_lengths = begun + lengths[1:]  # of each distinct prompt, but for its last token
        self.prompt_starts = _starts(lengths)[1:]  # of what it has beyond the beginning
        self.starts = lengths.sum() + _starts(self.lengths)
        self.tokens, self.targets = _joined([*shared, *own]), _joined([*shared, *completions])  # no target in a prompt
        self.width, self.few_shapes = width, few_shapes
        longest = int((self.prompt_lengths[self.prompt_of] + self.lengths).max())
        self.longest = self._rounded(max(longest, begun + 1), 16)
        # Of what prompts have beyond the beginning, and of rows' own.
        self.longest_rest, self.longest_own = max(int(lengths[1:].max()), 1), max(int(self.lengths.max()), 1)
        if few_shapes:
            self.longest_rest = min(rounded(self.longest_rest, 16), self.longest - begun)
            self.longest_own = min(rounded(self.longest_own, 16), self.longest)
        self.states: mx.array | None = None  # of all tokens (tokens, H), where they are kept

    def _rounded(self, count: int, multiple: int) -> int:
        """On CPU pads take time, on a GPU every new shape does."""
        return rounded(count, multiple) if self.few_shapes else -(-count // 8) * 8

    def rows_and_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every token a row that has it, and its place in that row."""
        firsts, begun = np.unique(self.prompt_of, return_index=True)[1], self.begun
        lengths = np.array([begun, *(self.prompt_lengths - begun), *self.lengths])
        starts = np.array([0, *(0 * firsts + begun), *self.prompt_lengths[self.prompt_of]])
        return np.repeat([0, *firsts, *range(len(self.lengths))], lengths), _spans(starts, lengths)

    def keep(self, states: Sequence[tuple[np.ndarray, mx.array]]) -> None:
        """As of PaddedRows. A prompt may be in several parts."""
        found = mx.zeros((len(self.tokens), states[0][1].shape[-1]), states[0][1].dtype)
        for rows, part in states:
            numbers = self._numbers(rows)[0]
            real = np.flatnonzero(numbers >= 0)
            found[mx.array(numbers[real])] = part[0][mx.array(real)]
        self.states = found

    def _numbers(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Numbers (T,) of the rows' tokens, −1 at pads; the distinct prompts; where in T the rows' own begin."""
        prompts = np.unique(self.prompt_of[rows])
        before, own = self.prompt_lengths[prompts], self.lengths[rows]
        starts = np.array([0, *self.prompt_starts[prompts]])
        lengths = np.array([self.begun, *(before - self.begun)])
        shared = self._rounded(int(lengths.sum()), 64)
        # A mask that the model makes for T tokens has to cover the longest row.
        rest = max(self._rounded(max(int(own.sum()), 1), 64), self.longest - shared)
        parts = [_spans(starts, lengths, shared), _spans(self.starts[rows], own, rest)]
        return np.concatenate(parts), prompts, shared

    def __getitem__(self, rows: mx.array | np.ndarray) -> Pass:
        """The rows of these indices."""
        rows = np.array(rows)
        numbers, prompts, shared = self._numbers(rows)
        real = np.maximum(numbers, 0)
        group = np.searchsorted(prompts, self.prompt_of[rows])  # (B,) of each row its prompt among them
        before, own, within = self.prompt_lengths[prompts], self.lengths[rows], np.arange(self.width)
        mask = within < own[:, None]
        return Pass(
            tokens=_index(np.where(numbers >= 0, self.tokens[real], 0)[None]),
            positions=_index(np.arange(shared, len(numbers))[None]),
            targets=_index(np.where(numbers >= 0, self.targets[real], 0)[None, shared:]),
            places=_index(np.where(mask, _starts(own)[:, None] + within, 0)),
            mask=mx.array(mask),
            layout=self._layout(numbers >= 0, group, before, own, shared),
            states=None if self.states is None else self.states[mx.array(real)][None],
        )

    def _layout(
        self, is_token: np.ndarray, group: np.ndarray, before: np.ndarray, own: np.ndarray, shared: int
    ) -> Layout:  # fmt: skip
        """Levels: the beginning, the prompts, the rows.

        group (B,): each row's prompt among G; before (G,), own (B,): tokens; shared: where the rows' own begin.
        """
        begun, rest, length, prompts = self.begun, before - self.begun, self.longest, np.arange(len(before))
        levels = [Level.of(np.array([begun]), begun, begun)] if begun else []
        if shared > begun:
            width, goes_on = self.longest_rest, None
            if begun:
                starts, lengths = np.stack([0 * rest, begun + _starts(rest)]), np.stack([0 * rest + begun, rest])
                goes_on = _going_on(starts, lengths, begun + width, width, shared - begun, np.ones((1, len(rest))),
                                    np.arange(begun), is_token[:begun])  # fmt: skip
            levels.append(Level.of(rest, width, shared - begun, goes_on))
        count, goes_on = len(is_token) - shared, None
        if shared:
            starts = np.stack([0 * own, begun + _starts(rest)[group], shared + _starts(own)])
            lengths = np.stack([0 * own + begun, rest[group], own])
            has = np.vstack([np.full(len(own), True), prompts[:, None] == group])  # the beginning, and each prompt
            places = _spans(np.array([0, *((1 + prompts) * length + begun)]), np.array([begun, *rest]), shared)
            goes_on = _going_on(starts, lengths, length, self.longest_own, count, has, places, is_token[:shared])
        levels.append(Level.of(own, self.longest_own, count, goes_on))
        return Layout(tuple(levels))


def _going_on(
    starts: np.ndarray, lengths: np.ndarray, width: int, asked: int, count: int, rows: np.ndarray, shared: np.ndarray,
    is_token: np.ndarray,
) -> Beginning:  # fmt: skip
    """What R rows go on from. starts, lengths (parts, R): in T, of a row's parts, of which the last is its own; width:
    K; asked: Q; count: N; rows, shared, is_token: as of Beginning."""
    within, offsets, before = np.arange(width), np.cumsum(lengths, axis=0) - lengths, lengths[:-1].sum(axis=0)
    seen = np.zeros((lengths.shape[1], width), dtype=np.int64)
    for start, offset in zip(starts[..., None], offsets[..., None], strict=True):
        seen = np.where(within >= offset, start - offset + within, seen)
    places = np.minimum(before[:, None] + np.arange(asked), width - 1)
    slots = _spans(np.arange(len(before)) * width + before, lengths[-1], count)
    seen = np.where(within < lengths.sum(axis=0)[:, None], seen, 0)
    one_hot = mx.array(rows.astype(np.float32))
    return Beginning(_index(seen), _index(places), _index(slots), one_hot, _index(shared), mx.array(is_token))


def rows_of(
    padded: PaddedRows,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    sampled: SampledStates | None,
    may_pack: bool,
    few_shapes: bool,
) -> PaddedRows | PackedRows:
    """The rows of a rollout end to end, if a model takes them so (`may_pack`) and it saves enough; else with pads.

    padded, prompts, completions: the same rows; sampled: what was kept of the frozen layers while they were sampled.
    """
    count, length = padded.tokens.shape
    if may_pack:
        rows = PackedRows(prompts, completions, padded.targets.shape[1], few_shapes)
        if len(rows.tokens) <= (1 - SAVED) * count * length:
            rows.states = None if sampled is None else sampled.at(*rows.rows_and_places())
            return rows
    lengths = [len(prompt) + len(completion) - 1 for prompt, completion in zip(prompts, completions, strict=True)]
    padded.states = None if sampled is None else sampled.of(lengths, length)
    return padded


def _index(numbers: np.ndarray) -> mx.array:
    """As indices: 0 where there is no number."""
    return mx.array(np.maximum(numbers, 0).astype(np.int32))


def _lengths(texts: Iterable[Sequence[int]]) -> np.ndarray:
    return np.array([len(text) for text in texts], dtype=np.int64)


def _joined(texts: Iterable[Sequence[int]]) -> np.ndarray:
    return np.array([*chain.from_iterable(texts)], dtype=np.int64)


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of several texts of these lengths begins, end to end."""
    return np.cumsum(lengths) - lengths


def _spans(starts: np.ndarray, lengths: np.ndarray, width: int | None = None) -> np.ndarray:
    """Of every start the numbers from it on, as many as its length says, end to end; −1 from there up to `width`."""
    count = int(lengths.sum())
    found = np.full(count if width is None else width, -1)
    found[:count] = np.repeat(starts - _starts(lengths), lengths) + np.arange(count)
    return found
