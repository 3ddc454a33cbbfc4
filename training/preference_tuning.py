"""DPO and its like: a language model learns from preference pairs, without a reward model (arXiv:2305.18290).

The reference policy is what the policy was before its first step, and never changes. So the log probabilities of all
texts under it are computed once (`refer_to`), and no second model is kept. The two texts of a pair read their prompt
once, end to end (training.passes), where a model allows it and that saves enough.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common.errors import UserError
from common.files import atomic_file
from data.batching import Batch, Example, collate, in_order, num_targets
from data.sources import Source
from models.packing import Layout, packed
from models.token_stats import LOGITS_BYTES, token_stats
from models.value_head import forward
from training.checkpoint import Trainee
from training.losses import dpo_losses, ipo_losses, odds_ratio_losses, sft_loss
from training.objectives import Figures, Objective, PreferencePairs, padded_positions
from training.optimizer import compiling_pays
from training.passes import SAVED, PackedRows
from training.ranks import Ranks

REFERENCE_FILE = "reference.safetensors"  # in the run folder: of each split, the logprob of every text


class Reference(NamedTuple):
    """The reference policy, and whether it reads the soft prompt that texts begin with."""

    model: nn.Module
    soft_prompt: bool


class Texts(NamedTuple):
    """B texts as a forward pass reads them: beside each other with pads, or end to end; and their n targets, padded."""

    tokens: mx.array  # (R, T) that something is predicted from
    positions: mx.array  # (n,) index into R · T
    ids: mx.array  # (n,) the targets; 0 at pads
    mask: mx.array  # (n,)
    owners: mx.array  # (n,) which of the texts a target is of
    layout: Layout | None  # end to end: R is 1


def start_reference(trainee: Trainee) -> Reference:
    """The policy as it is now, before its first step: the base, or the adapter that it continues from.

    A new LoRA, DoRA or copy of all weights gives what the base gives. A new soft prompt does not, so it is left out.
    """
    return Reference(trainee.model, not trainee.new)


class PreferenceTuning(PreferencePairs):
    """DPO, IPO or ORPO on preference pairs: only what follows the prompt counts, its EOS included.

    loss: of losses.PREFERENCE_LOSSES; beta, label_smoothing: see training.losses. Implicit rewards are beta times the
    log ratio of policy to reference (ORPO, without a reference: times the mean logprob of a token). may_pack: whether
    the model can read texts end to end (`models.packing.packs`).
    """

    more: tuple[str, ...] = ("chosen_reward", "rejected_reward", "reward_margin")

    def __init__(
        self,
        tokenizer,
        prefix: list[int],
        batch_size: int,
        max_length: int,
        seed: int,
        features: Mapping[str, str] | None = None,
        loss: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        logits_bytes: int = LOGITS_BYTES,
        may_pack: bool = False,
    ):
        super().__init__(tokenizer, prefix, batch_size, max_length, seed, features)
        self.kind, self.beta, self.label_smoothing, self.logits_bytes = loss, beta, label_smoothing, logits_bytes
        self.may_pack = may_pack
        self.reference: np.ndarray | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether `refer_to` has to be called, or `reference` set, before anything is trained."""
        return self.kind != "orpo"

    def read(self, source: Source) -> int:
        """Encode the rows of a split; returns how many pairs an epoch has."""
        count = super().read(source)
        # Nothing but a soft prompt, of which the reference may know nothing, could predict the first token.
        least = len(self.prefix) + 1
        self.examples = [e._replace(first_target=max(e.first_target, least)) for e in self.examples]
        trained = [bool(num_targets(example)) for example in self.examples]
        if not any(trained):
            raise UserError(f"no row of {source} has a token to train within --max-length {self.max_length}; raise it")
        texts_a_row = 2 if self.rewards is None else 1
        self.untrained = sum(not any(trained[i : i + texts_a_row]) for i in range(0, len(trained), texts_a_row))
        return count

    def refer_to(self, reference: Reference) -> None:
        """Compute the log probability of every text under the reference policy, in one pass of all ranks."""
        model, cut = reference.model, 0 if reference.soft_prompt else len(self.prefix)
        examples = [_without_prefix(example, cut) for example in self.examples]
        order = sorted(range(len(examples)), key=lambda i: self._likeness(examples[i]))
        found = np.zeros(len(examples), dtype=np.float32)
        was_training = model.training
        model.eval()
        for indices in islice(in_order(len(order), 2 * self.batch_size), self.ranks.rank, None, self.ranks.size):
            rows = order[indices.start : indices.stop]
            texts = self._texts([examples[i] for i in rows])
            found[rows] = np.array(self._sums(model, texts, len(rows))[0])
        model.train(was_training)
        self.reference = self.ranks.sum_host(found)

    def _likeness(self, example: Example) -> tuple:
        """What texts of a batch should have alike: the prompt where it is read once, or else their length."""
        prompt = example.tokens[: example.first_target] if self.may_pack else []
        return len(prompt), prompt, len(example.tokens)

    def _texts(self, examples: Sequence[Example]) -> Texts:
        """Texts end to end, if that saves enough, or else with pads."""
        batch = collate(examples, self.tokenizer.pad_token_id or 0)
        if self.may_pack:
            prompts = [example.tokens[: example.first_target] for example in examples]
            completions = [example.tokens[example.first_target :] for example in examples]
            rows = PackedRows(prompts, completions, batch.targets.shape[1], compiling_pays())
            if len(rows.tokens) <= (1 - SAVED) * batch.targets.size:
                return _end_to_end(rows, batch)
        positions, mask = padded_positions(batch.targets)
        ids = np.where(mask > 0, batch.tokens[:, 1:].reshape(-1)[positions], 0)  # what is at pads may be no id
        owners = mx.array(positions // batch.targets.shape[1])
        return Texts(mx.array(batch.tokens[:, :-1]), mx.array(positions), mx.array(ids), mx.array(mask), owners, None)

    def _arrays(self, pairs: list[tuple[int, int]], rewards: list[float] | None = None) -> tuple[Texts, mx.array]:
        """The 2B texts, the B chosen first, and their logprobs under the reference (2B,)."""
        order = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        known = np.zeros(len(self.examples), dtype=np.float32) if self.reference is None else self.reference
        return self._texts([self.examples[i] for i in order]), mx.array(known[order])

    def _sums(self, model: nn.Module, texts: Texts, count: int) -> tuple[mx.array, mx.array, mx.array]:
        """Logprob of each text's targets together and their number, both (count,), and each target's logprob (n,).

        No logits of the prompts are computed.
        """
        with packed(model, texts.layout) if texts.layout else nullcontext():
            _, hidden = forward(model, texts.tokens)  # (R, T, H)
        rows = hidden.reshape(-1, hidden.shape[-1])[texts.positions]
        stats = token_stats(model, rows, texts.ids, training=model.training, logits_bytes=self.logits_bytes)
        logprobs = mx.where(texts.mask > 0, stats.logprobs, 0.0)
        return _by_text(logprobs, texts.owners, count), _by_text(texts.mask, texts.owners, count), logprobs

    def loss(
        self, module: nn.Module, texts: Texts, reference: mx.array, total: mx.array | None = None
    ) -> tuple[mx.array, Figures]:
        """Mean loss per pair; `correct` counts pairs whose chosen text has the higher implicit reward (a tie is half).

        texts: 2B, the chosen first; reference: (2B,) nats. total: `_total` of the whole batch, where this is a piece of
        it.
        """
        sums, lengths, logprobs = self._sums(module, texts, len(reference))
        lengths = mx.maximum(lengths, 1)
        ratios = sums / lengths if self.kind == "orpo" else sums - reference
        chosen, rejected = mx.split(ratios, 2)
        count = mx.array(float(len(reference) // 2))
        pairs, tokens_chosen = (count, None) if total is None else (total[0], mx.maximum(total[1], 1))
        loss = self._losses(ratios, lengths).sum() / pairs
        if self.kind == "orpo":
            of_chosen = mx.where(texts.owners < len(reference) // 2, texts.mask, 0.0)
            loss = loss + sft_loss(logprobs, of_chosen, tokens_chosen)[0]
        correct = 0.5 * ((chosen > rejected).astype(mx.float32) + (chosen >= rejected).astype(mx.float32)).sum()
        rewards = [self.beta * chosen.sum(), self.beta * rejected.sum(), self.beta * (chosen - rejected).sum()]
        return loss, Figures(loss * pairs, correct, count, tuple(map(mx.stop_gradient, rewards)))

    def _total(self, pairs: list[tuple[int, int]]) -> mx.array:
        """The number of pairs, and of their chosen completions' tokens."""
        return mx.array([float(len(pairs)), float(sum(num_targets(self.examples[chosen]) for chosen, _ in pairs))])

    def _losses(self, ratios: mx.array, lengths: mx.array) -> mx.array:
        """The loss of each pair (B,) by log ratios and numbers of tokens (2B,)."""
        chosen, rejected = mx.split(ratios / lengths if self.kind == "ipo" else ratios, 2)
        if self.kind == "ipo":
            return ipo_losses(chosen, rejected, self.beta)
        if self.kind == "orpo":
            return odds_ratio_losses(chosen, rejected, self.beta)
        return dpo_losses(chosen, rejected, self.beta, self.label_smoothing)


def _end_to_end(rows: PackedRows, batch: Batch) -> Texts:
    """All rows of a batch. What follows the prompts predicts a token of a completion each, trained or not."""
    part = rows[np.arange(len(rows.lengths))]
    count = int(rows.lengths.sum())
    owners, mask = (np.zeros(part.positions.shape[1], dtype) for dtype in (np.int32, np.float32))
    owners[:count] = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
    first = rows.prompt_lengths[rows.prompt_of]  # of a text's tokens, the one that predicts its completion's first
    spans = zip(batch.targets, first, rows.lengths, strict=True)
    mask[:count] = np.concatenate([targets[start : start + length] for targets, start, length in spans])
    return Texts(part.tokens, part.positions[0], part.targets[0], mx.array(mask), mx.array(owners), part.layout)


def _by_text(values: mx.array, owners: mx.array, count: int) -> mx.array:
    """Sums (count,) of values (n,) by the text that each is of. A sum has the same order every time, unlike a scatter
    on a GPU."""
    return mx.where(owners[None] == mx.arange(count)[:, None], values[None], 0.0).sum(axis=1)


def _without_prefix(example: Example, length: int) -> Example:
    """An example without its first `length` tokens, none of which is trained."""
    gaps = tuple((start - length, end - length) for start, end in example.gaps)
    return Example(example.tokens[length:], example.first_target - length, gaps)


def refer(objectives: Mapping[str, Objective], reference: Reference) -> None:
    """Let every objective that needs a reference policy compute what it needs of it."""
    for objective in _with_reference(objectives).values():
        objective.refer_to(reference)


def refer_in(
    folder: Path, objectives: Mapping[str, Objective], reference: Reference, again: bool, ranks: Ranks
) -> None:
    """`refer` for a run in `folder`, which keeps the log probabilities. again: read them, in a resumed run.

    By then the adapter that the run started from may have been replaced. Raises UserError where the rows are others.
    """
    needed, path = _with_reference(objectives), folder / REFERENCE_FILE
    if not again:
        refer(objectives, reference)
        if needed and ranks.writes:
            with atomic_file(path) as temporary:
                mx.save_safetensors(str(temporary), {split: mx.array(each.reference) for split, each in needed.items()})
        return
    known = ranks.from_writer(lambda: _kept(path)) if needed else {}
    for split, objective in needed.items():
        if len(known.get(split, ())) != len(objective.examples):
            raise UserError(f"{path} is of other rows than {split} has now; resume with the run's own data")
        objective.reference = np.array(known[split], dtype=np.float32)


def _kept(path: Path) -> dict[str, list[float]]:
    """The log probabilities that a run keeps, by split."""
    if not path.is_file():
        raise UserError(f"{path} is missing, without which the run cannot go on; start a new one")
    return {split: array.tolist() for split, array in mx.load(str(path)).items()}


def _with_reference(objectives: Mapping[str, Objective]) -> dict[str, PreferenceTuning]:
    tuned = {split: each for split, each in objectives.items() if isinstance(each, PreferenceTuning)}
    return {split: each for split, each in tuned.items() if each.needs_reference}
