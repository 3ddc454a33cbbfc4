"""What `sft.py` can minimise: the language-modelling loss, or the pairwise loss of a reward model.

All have the same interface, so that one loop trains any: reading the rows of a split, the batch of a step, its loss,
and the batches of an evaluation. Not here: DPO (training.preference_tuning).
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common.errors import UserError
from data.batching import BatchPlan, Example, collate, draw_pairs, in_order, num_targets, truncate
from data.examples import LANGUAGE_ROWS, PREFERENCE_ROWS, language_examples, preference_examples
from data.records import located, located_rows
from data.sources import Source
from models.packing import Layout, Level, packed
from models.token_stats import LOGITS_BYTES, token_stats
from models.value_head import forward
from training.losses import pairwise_reward_loss, sft_loss
from training.ranks import ALONE, Ranks


class Figures(NamedTuple):
    """Sums over one batch; divided by `count` (tokens, or pairs) they are the mean loss and the accuracy."""

    loss: mx.array
    correct: mx.array
    count: mx.array
    more: tuple[mx.array, ...] = ()  # sums of what else the objective reports, by its `more`


Arrays = tuple[mx.array, ...]
LAYOUT = 4  # arrays of a layout of rows that go on from nothing
PACKED_MULTIPLE = 64  # tokens to which a packed batch is rounded up, so that few shapes occur


class Objective(Protocol):
    """What the loop needs. Arrays are what `loss` takes after the module."""

    truncated: int  # rows that were truncated
    untrained: int  # of those, rows that have nothing left to train
    examples: list[Example]  # of what was read
    more: tuple[str, ...]  # names of what is reported besides loss and accuracy
    ranks: Ranks  # of whose share `pieces` and `batches` are

    @property
    def steps_per_epoch(self) -> int: ...
    def read(self, source: Source) -> int: ...
    def batch(self, step: int) -> Arrays: ...
    def num_tokens(self, step: int) -> int: ...  # of the batch at `step`, pads not counted
    def pieces(self, step: int, count: int) -> list[Arrays]: ...
    def batches(self, count: int = -1) -> Iterator[Arrays]: ...
    def loss(self, module: nn.Module, *arrays: mx.array) -> tuple[mx.array, Figures]: ...


def stacked(figures: Figures) -> mx.array:
    """All sums in one array (3 + len(more),), float32. A compiled function returns figures as a plain tuple."""
    *sums, more = figures
    return mx.stack([each.astype(mx.float32) for each in (*sums, *more)])


def split(rows: np.ndarray, count: int, ranks: Ranks) -> list[np.ndarray]:
    """A rank's share of `rows`, in pieces as large as `count` pieces of all rows are; none where it has no row.

    Of rows by length, every rank has short and long ones.
    """
    own = rows[ranks.rank :: ranks.size]
    return np.array_split(own, min(-(-count // ranks.size), len(own))) if len(own) else []


def drawn(total: int, size: int) -> np.ndarray:
    """`size` of `total` indices, the same ones every time and for every seed of a run; all where size is negative."""
    if size < 0 or size >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).permutation(total)[:size])


def padded_positions(targets: np.ndarray, multiple: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the targets in `targets` (B, L) laid out row after row, and their mask, both (n,).

    n is rounded up to `multiple`, so that few shapes occur; pads are index 0.
    """
    found = np.flatnonzero(targets)
    size = -(-max(len(found), 1) // multiple) * multiple
    positions, mask = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.float32)
    positions[: len(found)], mask[: len(found)] = found, 1
    return positions, mask


class LanguageModelling:
    """Next-token prediction on the rows of LANGUAGE_ROWS, the EOS included, pads not.

    features: what the data calls a key, where it has another name. mask_prompt: train on completions and replies only.
    """

    more: tuple[str, ...] = ()
    ranks = ALONE

    def __init__(
        self,
        tokenizer,
        prefix: list[int],
        batch_size: int,
        max_length: int,
        seed: int,
        features: Mapping[str, str] | None = None,
        mask_prompt: bool = True,
        logits_bytes: int = LOGITS_BYTES,
    ):
        self.tokenizer, self.prefix = tokenizer, prefix
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.features, self.mask_prompt, self.logits_bytes = features, mask_prompt, logits_bytes
        self.truncated = self.untrained = 0

    def read(self, source: Source) -> int:
        """Encode the rows of a split; returns how many there are."""
        rows = located_rows(source, LANGUAGE_ROWS, self.features, chat=True)
        arguments = (self.prefix, self.mask_prompt)
        of_rows = [located(place, language_examples, self.tokenizer, row, *arguments) for place, row in rows]
        self.truncated = sum(any(len(e.tokens) > self.max_length for e in examples) for examples in of_rows)
        of_rows = [[truncate(example, self.max_length) for example in examples] for examples in of_rows]
        self.untrained = sum(not any(map(num_targets, examples)) for examples in of_rows)
        self.examples = [example for examples in of_rows for example in examples]
        if self.untrained == len(of_rows):
            raise UserError(f"no row of {source} has a token to train within --max-length {self.max_length}; raise it")
        self.plan = BatchPlan([len(example.tokens) for example in self.examples], self.batch_size, self.seed)
        return len(rows)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a pass over all rows."""
        return self.plan.steps_per_epoch

    def batch(self, step: int) -> Arrays:
        """The batch at `step`: tokens (B, L), and of its n targets, padded, positions (n,) and mask (n,).

        A position is an index into the (B · (L - 1)) tokens that something is predicted from, row after row.
        """
        return self._arrays(self.plan.rows(step))

    def num_tokens(self, step: int) -> int:
        """Tokens of the batch at `step`, prompts included, pads not."""
        return sum(len(self.examples[row].tokens) for row in self.plan.rows(step))

    def pieces(self, step: int, count: int) -> list[Arrays]:
        """This rank's share of the batch at `step`, which `count` pieces make up, each with the number of targets of
        the whole batch."""
        rows = self.plan.rows(step)
        total = mx.array(float(sum(num_targets(self.examples[row]) for row in rows)))
        return [(*self._arrays(piece), total) for piece in split(rows, count, self.ranks)]

    def batches(self, count: int = -1) -> Iterator[Arrays]:
        """For evaluation: `count` batches of rows of all lengths, always the same; -1: all rows."""
        rows = drawn(len(self.examples), count * self.batch_size)
        order = rows[np.argsort([len(self.examples[row].tokens) for row in rows], kind="stable")]
        for indices in islice(in_order(len(order), self.batch_size), self.ranks.rank, None, self.ranks.size):
            yield self._arrays(order[indices.start : indices.stop])

    def _arrays(self, rows: np.ndarray) -> Arrays:
        batch = collate([self.examples[row] for row in rows], self.tokenizer.pad_token_id or 0)
        positions, mask = padded_positions(batch.targets)
        return mx.array(batch.tokens), mx.array(positions), mx.array(mask)

    def loss(
        self, module: nn.Module, tokens: mx.array, positions: mx.array, mask: mx.array, total: mx.array | None = None
    ) -> tuple[mx.array, Figures]:
        """Mean cross-entropy in nats per target token; `correct` counts targets that are the most likely token.

        No logits of what is not a target are computed. total: targets of the whole batch, where this is a piece of it.
        """
        _, hidden = forward(module, tokens[:, :-1])  # (B, L - 1, H)
        return self._of_targets(module, hidden, tokens[:, 1:], positions, mask, total)

    def _of_targets(
        self, module: nn.Module, hidden: mx.array, following: mx.array, positions: mx.array, mask: mx.array,
        total: mx.array | None,
    ) -> tuple[mx.array, Figures]:  # fmt: skip
        """The loss by hidden states (B, L, H) and the ids (B, L) that follow them, at the targets' positions."""
        rows = hidden.reshape(-1, hidden.shape[-1])[positions]
        ids = mx.where(mask > 0, following.reshape(-1)[positions], 0)  # what is at pads may be no id of the logits
        training, limit = module.training, self.logits_bytes
        stats = token_stats(module, rows, ids, correct=True, training=training, logits_bytes=limit)
        loss, count = sft_loss(stats.logprobs, mask, None if total is None else mx.maximum(total, 1))
        return loss, Figures(loss * (count if total is None else total), (stats.correct * mask).sum(), count)


class PackedLanguageModelling(LanguageModelling):
    """`LanguageModelling` with the rows of a batch end to end (models.packing): the same loss, without pads."""

    def _arrays(self, rows: np.ndarray) -> Arrays:
        """tokens (1, T) and the ids that follow, positions and mask (n,) of the targets in T, and the layout's arrays.

        A row's last token predicts nothing, so it is left out.
        """
        examples = [self.examples[row] for row in rows]
        lengths = [max(len(example.tokens) - 1, 1) for example in examples]
        width = -(-sum(lengths) // PACKED_MULTIPLE) * PACKED_MULTIPLE
        tokens, following, targets = (np.zeros(width, dtype=np.int32) for _ in range(3))
        start = 0
        for example, length in zip(examples, lengths, strict=True):
            row = collate([example], 0, multiple=1)
            end = start + length
            tokens[start:end] = row.tokens[0, :length]
            following[start : start + row.targets.shape[1]] = row.tokens[0, 1:]
            targets[start : start + row.targets.shape[1]] = row.targets[0]
            start = end
        positions, mask = padded_positions(targets[None])
        packed_rows = (mx.array(array) for array in (tokens[None], following[None], positions, mask))
        return *packed_rows, *Layout.of(lengths, width).levels[0][:LAYOUT]

    def loss(self, module: nn.Module, *arrays: mx.array) -> tuple[mx.array, Figures]:
        """As `LanguageModelling.loss`. arrays: of `_arrays`, and the total where this is a piece of a batch."""
        tokens, following, positions, mask, *rest = arrays
        with packed(module, Layout((Level(*rest[:LAYOUT]),))):
            _, hidden = forward(module, tokens)
        return self._of_targets(module, hidden, following, positions, mask, *(rest[LAYOUT:] or [None]))


class PreferencePairs:
    """Preference pairs, given or drawn from rows with unequal rewards: what reward models and DPO read."""

    more: tuple[str, ...] = ()
    ranks = ALONE

    def __init__(
        self,
        tokenizer,
        prefix: list[int],
        batch_size: int,
        max_length: int,
        seed: int,
        features: Mapping[str, str] | None = None,
    ):
        self.tokenizer, self.prefix = tokenizer, prefix
        self.batch_size, self.max_length, self.seed, self.features = batch_size, max_length, seed, features
        self.truncated = self.untrained = 0

    def read(self, source: Source) -> int:
        """Encode the rows of a split; returns how many pairs an epoch has."""
        rows = located_rows(source, PREFERENCE_ROWS, self.features, chat=True)
        given = ["chosen" in row for _, row in rows]
        if any(given) and not all(given):
            raise UserError(
                f"{source} mixes rows with 'reward' and rows with 'chosen'; put each into a file of its own"
            )
        self.rewards = None if any(given) else [row["reward"] for _, row in rows]
        # Of given pairs, row i becomes examples 2i (chosen) and 2i + 1 (rejected).
        of_rows = [located(place, preference_examples, self.tokenizer, row, self.prefix) for place, row in rows]
        self.truncated = sum(any(len(e.tokens) > self.max_length for e in examples) for examples in of_rows)
        self.examples = [truncate(example, self.max_length) for examples in of_rows for example in examples]
        self._epoch = -1
        self._draw(epoch=0)
        return len(self._pairs)

    def _pairs_of(self, epoch: int) -> list[tuple[int, int]]:
        """(chosen, rejected) indices: as given, or drawn anew for every epoch."""
        if self.rewards is None:
            return [(i, i + 1) for i in range(0, len(self.examples), 2)]
        return draw_pairs(self.rewards, np.random.default_rng((self.seed, epoch, 1)))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a pass over all pairs."""
        return self._plan.steps_per_epoch

    def batch(self, step: int) -> Arrays:
        """The arrays of the batch at `step`."""
        return self._arrays(self._batch(step), self.rewards)

    def pieces(self, step: int, count: int) -> list[Arrays]:
        """This rank's share of the batch at `step`, which `count` pieces make up, each with what `_total` says of the
        whole batch."""
        pairs = self._batch(step)
        total = self._total(pairs)
        parts = split(np.arange(len(pairs)), count, self.ranks)
        return [(*self._arrays([pairs[i] for i in part], self.rewards), total) for part in parts]

    def num_tokens(self, step: int) -> int:
        """Tokens of both texts of every pair of the batch at `step`, pads not counted."""
        return sum(len(self.examples[i].tokens) for pair in self._batch(step) for i in pair)

    def _batch(self, step: int) -> list[tuple[int, int]]:
        """The pairs of the batch at `step`."""
        # Every epoch has the same number of pairs, so the plan of any of them tells the epoch.
        self._draw(step // self._plan.steps_per_epoch)
        return [self._pairs[i] for i in self._plan.rows(step)]

    def _total(self, pairs: list[tuple[int, int]]) -> mx.array:
        """What a batch's loss is divided by: its number of pairs."""
        return mx.array(float(len(pairs)))

    def _draw(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._pairs = epoch, self._pairs_of(epoch)
            self._plan = BatchPlan([self._length(pair) for pair in self._pairs], self.batch_size, self.seed)

    def batches(self, count: int = -1) -> Iterator[Arrays]:
        """For evaluation: `count` batches of the pairs of epoch 0, of all lengths, always the same; -1: all pairs."""
        pairs = self._pairs_of(0)
        pairs = sorted((pairs[i] for i in drawn(len(pairs), count * self.batch_size)), key=self._length)
        for indices in islice(in_order(len(pairs), self.batch_size), self.ranks.rank, None, self.ranks.size):
            yield self._arrays(pairs[indices.start : indices.stop])

    def _length(self, pair: tuple[int, int]) -> int:
        return max(len(self.examples[i].tokens) for i in pair)

    def _arrays(self, pairs: list[tuple[int, int]], rewards: list[float] | None = None) -> Arrays:
        """What `loss` takes. rewards: of all texts, in training on rows that have them."""
        raise NotImplementedError


class RewardModelling(PreferencePairs):
    """The pairwise loss on preference pairs.

    Where rows have rewards, training ranks every two texts of a batch whose rewards differ, not only the pairs that
    were drawn: more to learn from the same forward pass (arXiv:2203.02155, section 3.5).
    """

    def __init__(
        self,
        tokenizer,
        prefix: list[int],
        batch_size: int,
        max_length: int,
        seed: int,
        center_coef: float,
        features: Mapping[str, str] | None = None,
    ):
        super().__init__(tokenizer, prefix, batch_size, max_length, seed, features)
        self.center_coef = center_coef

    def _arrays(self, pairs: list[tuple[int, int]], rewards: list[float] | None = None) -> Arrays:
        """tokens (2B, L), the B chosen first, lengths (2B,), and preferred (2B, 2B)."""
        order = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        batch = collate([self.examples[i] for i in order], self.tokenizer.pad_token_id or 0)
        if rewards is None:
            preferred = np.eye(len(order), k=len(pairs), dtype=np.float32)
        else:
            reward = np.array([rewards[i] for i in order])
            preferred = (reward[:, None] > reward).astype(np.float32)
        return mx.array(batch.tokens), mx.array(batch.lengths), mx.array(preferred)

    def pieces(self, step: int, count: int) -> list[Arrays]:
        """As of all pairs; where every two texts of a batch are ranked, the whole of it, but of the texts this rank's
        share, and their places among all."""
        if self.rewards is None or self.ranks.size == 1:
            return super().pieces(step, count)
        pairs = self._batch(step)
        tokens, lengths, preferred = self._arrays(pairs, self.rewards)
        places = mx.arange(self.ranks.rank, len(tokens), self.ranks.size)
        own = places if places.size else mx.array([0])
        places = places if places.size else mx.array([len(tokens)])  # the score of a text of other ranks counts nothing
        return [(tokens[own], lengths[own], preferred, self._total(pairs), places)]

    def loss(
        self,
        module: nn.Module,
        tokens: mx.array,
        lengths: mx.array,
        preferred: mx.array,
        total: mx.array | None = None,
        places: mx.array | None = None,
    ) -> tuple[mx.array, Figures]:
        """Mean pairwise loss in nats per pair; `correct` counts pairs ranked right (a tie is half).

        preferred: (2B, 2B), 1 where the text of the row is to score above that of the column. total: pairs of the whole
        batch, where this is a piece of it. places: of the texts given among the 2B, whose other scores are computed by
        other ranks; the gradient is then this rank's part, and the figures are 0 on all ranks but one.
        """
        scores = module(tokens, lengths)
        if places is not None:
            scores, total = self.ranks.placed(scores, places, len(preferred) + 1)[:-1], None
        chosen, rejected = mx.broadcast_arrays(scores[:, None], scores)
        count = preferred.sum()
        # Over the count, so that the sum of the weights is not computed twice: mx.compile (0.32) fails to merge the
        # two where one of them is returned.
        loss, accuracy = pairwise_reward_loss(chosen, rejected, None, self.center_coef, preferred / count)
        if places is not None:
            counted = count * self.ranks.writes
            return loss, Figures(loss * counted, accuracy * counted, counted)
        return loss if total is None else loss * (count / total), Figures(loss * count, accuracy * count, count)
