"""From rows to batches of token ids: encoded once, bucketed by length, right padded, no row dropped.

The order is a function of (seed, step) alone, so a resumed run sees the same batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError

LARGEST_ID = 2**31
WORTH_SHARING = 8  # tokens, at least, that all prompts begin with, to be read once
TOKENS_A_PASS = 2**13  # of all rows together, where a forward pass may be split: what it needs grows with them


def check_eos(tokenizer: Any, name: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a tokenizer without an EOS token, which ends every text in training and in sampling, and for
    an "eos_token_id" of the model's `config` that is none of its "vocab_size" tokens.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} names no EOS token; set eos_token in its tokenizer_config.json")
    ids, rows = config.get("eos_token_id"), config.get("vocab_size")
    rows = rows if isinstance(rows, int) else LARGEST_ID  # of models that see, too, it is elsewhere
    for own in [] if ids is None else ids if isinstance(ids, list) else [ids]:
        if type(own) is not int or not 0 <= own < rows:
            raise UserError(
                f"{name} has {own!r:.40} as eos_token_id, which is none of its {rows:,} tokens; correct it in its "
                "config.json and generation_config.json"
            )


class Example(NamedTuple):
    """One text: its token ids and the position of the first trained token. Tokens within the gaps are not trained."""

    tokens: list[int]
    first_target: int
    gaps: tuple[tuple[int, int], ...] = ()  # [start, end) of untrained spans after first_target


class Batch(NamedTuple):
    """Right-padded examples: tokens (B, L), lengths (B,), and targets (B, L - 1), 1 where token i + 1 is trained."""

    tokens: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray


def encode_text(tokenizer, text: str, prefix: Sequence[int] = ()) -> Example:
    """A text with its EOS. Everything is trained except what precedes the text itself (BOS, soft prompt)."""
    tokens = _encode(tokenizer, text)
    return Example([*prefix, *tokens, tokenizer.eos_token_id], max(len(prefix) + _num_special(tokenizer, tokens), 1))


def encode_pair(tokenizer, prompt: str, completion: str, prefix: Sequence[int] = ()) -> Example:
    """A prompt and its completion with EOS; only the completion and the EOS are trained."""
    prompt_tokens = _encode(tokenizer, prompt)
    tokens = _encode(tokenizer, prompt + completion)
    # A merge across the boundary changes the prompt's last token; the completion then starts where the two differ.
    shared = next(
        (i for i, (a, b) in enumerate(zip(prompt_tokens, tokens, strict=False)) if a != b), len(prompt_tokens)
    )
    return Example([*prefix, *tokens, tokenizer.eos_token_id], max(len(prefix) + shared, 1))


class Rendered(str):
    """A text rendered by a chat template: it contains its special tokens, so none are added when it is encoded."""

    def __add__(self, other: str) -> "Rendered":
        return Rendered(str.__add__(self, other))


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """The token ids of a prompt, ready for a completion."""
    return list(
        tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, Rendered) else tokenizer.encode(prompt)
    )


def shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens different prompts all begin with, without the last of any, as far as it pays to read them once.

    Of chats, those of the system prompt and of the template; of a soft prompt all of it.
    """
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # all that lie between begin as both do
    longest = min(map(len, prompts)) - 1 if first != last else 0
    count = next((i for i in range(longest) if first[i] != last[i]), longest)
    return count if count >= WORTH_SHARING else 0


def _encode(tokenizer, text: str) -> list[int]:
    tokens = encode_prompt(tokenizer, text)
    # Some tokenizers append an EOS of their own; ours is added once, by the caller.
    while tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return tokens


def _num_special(tokenizer, tokens: Sequence[int]) -> int:
    return int(bool(tokens) and tokens[0] == tokenizer.bos_token_id)


def num_targets(example: Example) -> int:
    """The number of trained tokens of an example."""
    length = len(example.tokens)
    gaps = sum(min(end, length) - min(start, length) for start, end in example.gaps)
    return max(length - example.first_target, 0) - gaps


def truncate(example: Example, max_length: int) -> Example:
    """Cut an example to its first `max_length` tokens (so the EOS is the first to go)."""
    return example._replace(tokens=example.tokens[:max_length])


def collate(examples: Sequence[Example], pad_token_id: int, multiple: int = 8) -> Batch:
    """Right-pad examples to a common length, rounded up to a multiple of `multiple` so that few shapes occur."""
    longest = max(len(example.tokens) for example in examples)
    width = -(-longest // multiple) * multiple
    tokens = np.full((len(examples), width), pad_token_id, dtype=np.int32)
    targets = np.zeros((len(examples), width - 1), dtype=np.float32)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        targets[row, example.first_target - 1 : len(example.tokens) - 1] = 1
        for start, end in example.gaps:
            targets[row, start - 1 : end - 1] = 0
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int32)
    return Batch(tokens, lengths, targets)


class BatchPlan:
    """The rows of the batch of each step: every row once per epoch, rows of similar length together."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        if batch_size < 1:
            raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self._epoch, self._batches = -1, []  # type: tuple[int, list[np.ndarray]]

    def rows(self, step: int) -> np.ndarray:
        """The rows of the batch at `step` (from 0). One batch of each epoch may be smaller."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[index]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        # Jitter of up to 4 tokens makes batches of rows of similar length differ between epochs.
        jitter = rng.uniform(0, 4, len(self.lengths))
        order = np.argsort(self.lengths + jitter, kind="stable")
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rng.shuffle(batches)
        return batches


def in_order(count: int, batch_size: int) -> Iterator[range]:
    """Consecutive index ranges that cover 0..count-1, for evaluation."""
    for start in range(0, count, batch_size):
        yield range(start, min(start + batch_size, count))


def in_passes(count: int, length: int, most: int | None = None) -> Iterator[range]:
    """Consecutive ranges of `count` rows of `length` tokens each, for passes of TOKENS_A_PASS or of a single row.

    most: tokens of a pass, where it has to be smaller.
    """
    return in_order(count, max(1, min(TOKENS_A_PASS, most or TOKENS_A_PASS) // length))


def draw_pairs(rewards: Sequence[float], rng: np.random.Generator) -> list[tuple[int, int]]:
    """One (better, worse) pair for every row, with a random row of a different reward as its partner.

    Ties never form a pair. Raises UserError if all rewards are equal.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if len(values) < 2 or values.min() == values.max():
        raise UserError(f"all {len(values)} rewards are equal, so no pair can be ranked; add rows with other rewards")
    pairs = []
    for row, value in enumerate(values):
        partner = int(rng.choice(np.flatnonzero(values != value)))
        pairs.append((row, partner) if value > values[partner] else (partner, row))
    return pairs
