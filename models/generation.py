"""Sampling completions: in batches for training and evaluation, or one as a stream for chat.

Token ids in, token ids out. Prompts of unequal length share a batch if the family allows it (mlx-lm's batch cache pads
on the left); neither batch mates nor padding change the distribution of a completion.
"""

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from common.errors import UserError
from data.batching import TOKENS_A_PASS, encode_prompt, shared_beginning
from data.chat import render
from models.cpu.process import on_one_core
from models.frozen_layers import SampledStates
from models.gpu import release_memory, rows_at_once
from models.row_keys import KeyedModel, Keys, draw, next_keys
from models.soft_prompt import check_ids, soft_prompt_ids

# Batches of unequal prompts are padded. mlx-lm 0.32 masks the pads in attention, except in families whose mask does not
# fit their heads. Recurrent layers read the pads (up to 1.3 nats off for mamba and jamba, float32), except in
# PADS_HIDDEN, for which tests/test_families.py compares with single prompts. Other families batch prompts of equal
# length only.
ATTENTION_CACHES = (KVCache, RotatingKVCache)
MASK_MISFITS = ("gemma2", "phi3small", "gpt_bigcode")
PADS_HIDDEN = ("mamba2", "qwen3_5", "qwen3_next", "falcon_h1", "granitemoehybrid", "lfm2", "plamo2")

CACHE_STEP = 256  # positions by which a cache grows; fewer if fewer suffice
PREFILL = 2048  # tokens of a prompt processed per forward pass
Agree = Callable[[mx.array], mx.array]


def temperature_sampler(temperature: float) -> Callable[[mx.array], mx.array]:
    """Draw from softmax(logits / temperature), unfiltered, so that training's logprobs are those of the sampling
    distribution; temperature 0 takes the most likely token."""
    if temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    if temperature == 1:
        return mx.random.categorical
    return lambda logprobs: mx.random.categorical(logprobs / temperature)


@on_one_core()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    eos_token_ids: Sequence[int] | set[int],
    max_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 128,
    on_token: Callable[[int], object] | None = None,
    keys: np.ndarray | None = None,
    agree: Agree = lambda tokens: tokens,
    states: SampledStates | None = None,
) -> list[list[int]]:
    """One completion per prompt, each through its first EOS (which is kept) or cut at `max_tokens`.

    prompts: token ids, at least one each; the model's soft prompt is prepended here. batch_size: prompts in flight.
    on_token: called with the number of tokens of each decoding step, for progress. keys: (len(prompts), 2) uint32, the
    random key of each, by which it is drawn whatever else is drawn (models.row_keys); without, mlx's global stream is
    drawn from. agree: of tokens drawn by keys, those that all processes take which share the model. states: to be
    filled with those of this sampling, if all prompts are in flight at once. Runs in eval mode, so without dropout, and
    restores the model's mode.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt is empty, and the model has no BOS token to begin with; give every prompt some text")
    prefix = soft_prompt_ids(model)
    prompts = [prefix + list(prompt) for prompt in prompts]
    check_ids(model, prompts)
    batch_size = rows_at_once(model, batch_size)
    was_training = model.training
    model.eval()
    try:
        decode = _decode if all(type(cache) is KVCache for cache in make_prompt_cache(model)) else _decode_by_mlx_lm
        if not takes_unequal_prompts(model):
            decode = _decode_by_length
        sampler = temperature_sampler(temperature) if keys is None else RowSampler(keys, temperature, agree)
        task = (model, prompts, set(eos_token_ids), max_tokens, sampler, batch_size, on_token)
        if states is None or decode is not _decode or len(prompts) > batch_size:
            return decode(*task)
        with states.listening(model, len(prompts), max(map(len, prompts)) + max_tokens):
            return _decode(*task, states)
    finally:
        model.train(was_training)
        release_memory()  # the caches; an update's arrays have other sizes


class RowSampler:
    """Draws by the keys of rows. Those who call it say which rows the logits are of, and which token of each is drawn.

    keys: (B, 2) of all rows; agree: as of `sample`.
    """

    def __init__(self, keys: np.ndarray, temperature: float, agree: Agree):
        self.keys, self.temperature, self.agree = keys, temperature, agree

    def of(self, rows: Sequence[int] | np.ndarray) -> "RowSampler":
        """The sampler of these rows alone."""
        return RowSampler(self.keys[rows], self.temperature, self.agree)

    def draw(self, logits: mx.array, rows: np.ndarray, places: np.ndarray) -> mx.array:
        """The tokens of these places (from 0) in `rows`, by logits (len(rows), V)."""
        return self.agree(draw(logits, next_keys(self.keys[rows], places + 1), self.temperature))


Sampler = Callable[[mx.array], mx.array] | RowSampler


def takes_unequal_prompts(model: nn.Module) -> bool:
    """Whether this family's completions do not depend on mlx-lm's padding."""
    family = type(model).__module__.rpartition(".")[2]
    if family in PADS_HIDDEN:
        return True
    return family not in MASK_MISFITS and all(type(cache) in ATTENTION_CACHES for cache in make_prompt_cache(model))


def _decode_by_length(
    model, prompts, eos_token_ids, max_tokens, sampler: Sampler, batch_size, on_token
) -> list[list[int]]:
    """Decode prompts of equal length together, without padding, with the model's own caches of any kind."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    completions: list[list[int]] = [[] for _ in prompts]
    for _, group in itertools.groupby(order, key=lambda row: len(prompts[row])):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            rows = alike[start : start + batch_size]
            batch = [prompts[row] for row in rows]
            own = sampler.of(rows) if isinstance(sampler, RowSampler) else sampler
            decoded = _decode(model, batch, eos_token_ids, max_tokens, own, batch_size, on_token)
            for row, completion in zip(rows, decoded, strict=True):
                completions[row] = completion
    return completions


def _decode_by_mlx_lm(
    model, prompts, eos_token_ids, max_tokens, sampler: Sampler, batch_size, on_token
) -> list[list[int]]:
    """Decode with mlx-lm's BatchGenerator, which replaces finished prompts by new ones."""
    width = min(batch_size, len(prompts))
    caches = None
    if isinstance(sampler, RowSampler):
        caches = [[*make_prompt_cache(model), Keys(sampler.keys[row : row + 1])] for row in range(len(prompts))]
        agree, model = sampler.agree, KeyedModel(model, sampler.temperature)
        drawn = model.draw
        sampler = lambda logprobs: agree(drawn(logprobs))  # noqa: E731
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in eos_token_ids],
        sampler=sampler,
        completion_batch_size=width,
        prefill_batch_size=width,
        prefill_step_size=prefill_length(width),
    )
    try:
        ids = generator.insert(prompts, caches=caches)
        completions: dict[int, list[int]] = {uid: [] for uid in ids}
        while responses := generator.next_generated():
            for response in responses:
                completions[response.uid].append(response.token)
            if on_token:
                on_token(len(responses))
    finally:
        generator.close()
    return [completions[uid] for uid in ids]


def _decode(
    model, prompts, eos_token_ids, max_tokens, sampler: Sampler, batch_size, on_token,
    states: SampledStates | None = None,
) -> list[list[int]]:  # fmt: skip
    """Decode without BatchGenerator's overhead per row and token; unequal prompts, and more than `batch_size`, only
    with plain key-value caches.

    Caches are copied where rows leave or enter: so finished rows are dropped once they are an eighth of all, and
    prompts that wait enter, equal ones together, once half of `batch_size` is free. states: only if none waits.
    """
    if not prompts:
        return []
    waits = len(prompts) > batch_size
    waiting = _equal_together(prompts) if waits else list(range(len(prompts)))
    ends = np.array(sorted(eos_token_ids), dtype=np.int64)
    last = np.array([len(prompt) - 1 for prompt in prompts])  # token of each prompt
    completions = np.zeros((len(prompts), max_tokens), dtype=np.int64)
    lengths = np.zeros(len(prompts), dtype=np.int64)

    def drawn_after(tokens: mx.array, caches: list, rows: np.ndarray, places: np.ndarray) -> mx.array:
        logits = model(tokens[:, None], cache=caches)[:, -1]
        if states is not None:
            states.tokens_read(rows, last[rows] + places)
        drawn = sampler.draw(logits, rows, places) if isinstance(sampler, RowSampler) else sampler(logits)
        mx.async_eval(drawn)  # so that the next pass is built while this one runs
        return drawn

    def enter(count: int) -> tuple[list, np.ndarray, np.ndarray, np.ndarray, mx.array]:
        entering = [prompts[row] for row in waiting[:count]]
        rows, places = np.array(waiting[:count]), np.zeros(len(entering), dtype=np.int64)
        del waiting[:count]
        caches, padding = _read_prompts(model, entering, max_tokens, states, batched=waits)
        return caches, padding, rows, places, drawn_after(mx.array([p[-1] for p in entering]), caches, rows, places)

    caches, padding, rows, places, drawn = enter(batch_size)
    going = np.ones(len(rows), dtype=bool)
    while True:
        more = (going & (places + 1 < max_tokens)).any()
        following = drawn_after(drawn, caches, rows, places + 1) if more else drawn
        tokens = np.asarray(drawn)  # the next pass has been given to the device
        completions[rows[going], places[going]] = tokens[going]
        lengths[rows[going]] += 1
        if on_token:
            on_token(int(going.sum()))
        places = places + 1
        going &= ~np.isin(tokens, ends) & (places < max_tokens)
        room = batch_size - int(going.sum())
        entry = bool(waiting) and 2 * room >= batch_size
        if not going.any():
            if not waiting:
                break
            caches, padding, rows, places, following = enter(room)
            going = np.ones(len(rows), dtype=bool)
        elif (entry or 8 * (~going).sum() >= len(rows)) and _have_rows(caches):
            kept = np.flatnonzero(going)
            padding = _keep_rows(caches, kept, padding)
            following, rows, places, going = following[mx.array(kept)], rows[kept], places[kept], going[kept]
            mx.async_eval(following)  # by itself, or it would be known only when the next pass is
            if entry:
                others, its_padding, its_rows, its_places, its_drawn = enter(room)
                padding = _join(caches, padding, others, its_padding)
                rows, places = np.append(rows, its_rows), np.append(places, its_places)
                following, going = mx.concatenate([following, its_drawn]), np.ones(len(rows), dtype=bool)
        drawn = following
    return [row[:length].tolist() for row, length in zip(completions, lengths, strict=True)]


def _read_prompts(
    model, prompts: list[list[int]], max_tokens: int, states: SampledStates | None = None, batched: bool = False
) -> tuple[list, np.ndarray]:
    """Caches of all prompts without their last tokens, and the padding on the left of each, which makes them equal.

    A prompt that several rows have is read once, and so is what all prompts begin with, if their caches can be copied.
    batched: others are to join them, so that caches know of padding even where there is none yet.
    """
    caches: list = make_prompt_cache(model)
    once = _have_rows(caches) and max(map(len, prompts)) > 1
    distinct = _distinct(prompts) if once else [tuple(prompt) for prompt in prompts]
    lengths = np.array([len(prompt) - 1 for prompt in distinct])
    longest, padding = int(lengths.max()), lengths.max() - lengths
    begun = shared_beginning(distinct) if once else 0
    number = {prompt: index for index, prompt in enumerate(distinct)}
    rows = np.arange(len(prompts)) if len(distinct) == len(prompts) else np.array([number[tuple(p)] for p in prompts])
    tokens = mx.array(
        [prompt[:-1] + (0,) * pads for prompt, pads in zip(distinct, padding.tolist(), strict=True)], mx.int32
    )

    def read(tokens: mx.array, start: int, rows: np.ndarray, lengths: np.ndarray) -> None:
        step = prefill_length(len(tokens))
        for first in range(start, tokens.shape[1], step):
            model(tokens[:, first : first + step], cache=caches)
            if states is not None:
                states.prompts_read(rows, lengths, first)
            mx.eval([cache.state for cache in caches])

    for cache in caches:
        if isinstance(cache, KVCache):
            cache.step = min(longest + max_tokens, CACHE_STEP)
    if begun:
        read(tokens[:1, :begun], 0, 0 * rows, 0 * rows + begun)
    ragged = batched or bool(padding.any())
    if ragged:
        caches = [_for_rows(cache, len(distinct)) for cache in caches]
        for cache in caches:
            cache.prepare(right_padding=padding.tolist())
    elif begun:
        _keep_rows(caches, np.zeros(len(distinct), dtype=np.int64), np.zeros(1, dtype=np.int64))
    read(tokens, begun, rows, lengths[rows])
    if ragged:
        for cache in caches:
            cache.finalize()
    if len(distinct) == len(prompts):
        return caches, padding
    return caches, _keep_rows(caches, rows, padding)


def _for_rows(cache: KVCache, count: int) -> BatchKVCache:
    """A batch cache of `count` rows, all of which begin with the one row of a cache, if there is one."""
    batched = BatchKVCache([0] * count)
    batched.step = cache.step
    if cache.offset:
        keys, values = (mx.repeat(array, count, axis=0) for array in cache.keys_and_values())
        batched.state = keys, values, batched.offset + cache.offset, batched.left_padding, cache.offset
    return batched


def _distinct(prompts: list[list[int]]) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(map(tuple, prompts)))


def _equal_together(prompts: list[list[int]]) -> list[int]:
    """The rows of all prompts, those of equal ones side by side, by first appearance."""
    first = {prompt: number for number, prompt in enumerate(_distinct(prompts))}
    return sorted(range(len(prompts)), key=lambda row: first[tuple(prompts[row])])


def prefill_length(rows: int) -> int:
    """Tokens of each of `rows` prompts that a forward pass reads, so that it reads no more than TOKENS_A_PASS."""
    return max(1, min(PREFILL, TOKENS_A_PASS // rows))


def _have_rows(caches: list) -> bool:
    """Whether rows of these caches can be taken."""
    return all(type(cache) in (KVCache, BatchKVCache) for cache in caches)


def _keep_rows(caches: list, rows: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """Let the caches hold the given rows of them, without the padding that all of these have in common.

    rows: indices, of which any may be left out or repeated. padding: of each row of the caches, on the left. Returns
    that of the rows kept. `BatchKVCache.filter` drops rows, too, but waits for a number in every layer.
    """
    index, common = mx.array(rows), int(padding[rows].min())
    for cache in caches:
        if isinstance(cache, BatchKVCache):
            keys, values, offset, left, filled = cache.state
            kept = keys[index, :, common:], values[index, :, common:]
            cache.state = *kept, offset[index], left[index] - common, filled - common
        else:
            cache.keys, cache.values = cache.keys[index], cache.values[index]
    return padding[rows] - common


def _join(caches: list, padding: np.ndarray, others: list, more: np.ndarray) -> np.ndarray:
    """Append the rows of other batch caches, and return the padding of all; `padding` and `more` are of each before."""
    size, size_of_others = caches[0].size(), others[0].size()
    for cache, other in zip(caches, others, strict=True):
        cache.extend(other)
    longest = max(size, size_of_others)
    return np.append(padding + longest - size, more + longest - size_of_others)


class TooLong(UserError):
    """A conversation that is longer than what the model reads."""


class ChatSession:
    """A conversation with one model: keeps the turns and the key-value cache, and streams replies.

    Turns are rendered by the chat template. Without one, the model continues a plain text: the first turn unchanged, as
    in training, and every later turn on a new line.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        system_prompt: str | None = None,
        agree: Agree = lambda tokens: tokens,
    ):
        """agree: of a token drawn, the one that all processes take which share the model."""
        self.model, self.tokenizer, self.agree = model, tokenizer, agree
        self.opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.messages = list(self.opening)
        self.cache = make_prompt_cache(model)
        self.cached: list[int] = []
        self.finish: str | None = None  # why the last reply ended: stop, or length
        self.context = getattr(getattr(model, "args", None), "max_position_embeddings", None)  # tokens, if known
        model.eval()

    def reset(self) -> None:
        """Forget the conversation, but not the system prompt. The cache is kept for the prefix shared with the next."""
        self.messages = list(self.opening)

    def row(self) -> dict[str, Any]:
        """The conversation as a row of data: "messages" if there is a chat template, else "text"."""
        if self.tokenizer.has_chat_template:
            return {"messages": list(self.messages)}
        return {"text": "\n".join(message["content"] for message in self.messages)}

    def prompt_ids(self) -> list[int]:
        """The conversation as token ids, including the soft prompt, ready for the next reply.

        Raises UserError if the chat template rejects it, for example because of a system prompt.
        """
        row = self.row()
        prompt = row["text"] if "text" in row else render(self.tokenizer, row["messages"], reply=True)
        return soft_prompt_ids(self.model) + encode_prompt(self.tokenizer, prompt)

    def reply(
        self, text: str, max_tokens: int, temperature: float = 0.0, top_p: float = 0.0
    ) -> Generator[str, None, None]:
        """Add the user's turn and stream the reply piece by piece. The reply is added to the conversation even if the
        stream is closed early.

        Raises TooLong, and leaves the turn out, if the conversation is longer than the model's context.
        """
        self.messages.append({"role": "user", "content": text})
        tokens = self.prompt_ids()
        self.finish = None
        if self.context:
            if len(tokens) >= self.context:
                self.messages.pop()
                raise TooLong(
                    f"the conversation would have {len(tokens):,} tokens, and the model reads {self.context:,}; type "
                    "less, or /reset"
                )
            max_tokens = min(max_tokens, self.context - len(tokens))
        check_ids(self.model, [tokens])
        common = self._reuse_cache(tokens)
        pieces: list[str] = []
        sampler = make_sampler(temperature, top_p)
        try:
            for response in stream_generate(
                self.model,
                self.tokenizer,
                tokens[common:],
                max_tokens=max_tokens,
                sampler=lambda logprobs: self.agree(sampler(logprobs)),
                prompt_cache=self.cache,
            ):
                tokens.append(response.token)
                pieces.append(response.text)
                self.finish = response.finish_reason
                yield response.text
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
            self.cached = tokens[: self._cache_length()]

    def _cache_length(self) -> int:
        """Tokens in the cache; 0 if it cannot be trimmed, or if an interrupted pass left unequal layers."""
        lengths = {getattr(layer, "offset", 0) for layer in self.cache}
        return lengths.pop() if len(lengths) == 1 and can_trim_prompt_cache(self.cache) else 0

    def _reuse_cache(self, tokens: list[int]) -> int:
        """Trim the cache to the prefix shared with `tokens`. Returns the length of that prefix."""
        common = 0
        # At least one token must be processed to continue from.
        for cached, token in zip(self.cached, tokens[:-1], strict=False):
            if cached != token:
                break
            common += 1
        if common:
            trim_prompt_cache(self.cache, self._cache_length() - common)
        else:
            self.cache = make_prompt_cache(self.model)
        return common
