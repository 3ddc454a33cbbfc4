"""Sampling completions: many prompts at once for training and evaluation, or one as a stream for chat.

Token ids in, token ids out. Prompts of unequal length share a batch where the family allows (mlx-lm's batch cache pads
left inside); neither batch mates nor padding change the distribution of a completion.
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
from data.batching import encode_prompt
from data.chat import render
from models.soft_prompt import check_ids, soft_prompt_ids

# A batch of unequal prompts is padded. mlx-lm 0.32 hides the pads from attention, but for families whose mask does not
# fit their heads; the state of a recurrent layer reads them (up to 1.3 nats off for mamba and jamba, float32), but for
# families that tests/test_families.py holds to single prompts. All others share a batch with prompts of their length.
ATTENTION_CACHES = (KVCache, RotatingKVCache)
MASK_MISFITS = ("gemma2", "phi3small", "gpt_bigcode")
PADS_HIDDEN = ("mamba2", "qwen3_5", "qwen3_next", "falcon_h1", "granitemoehybrid", "lfm2", "plamo2")

CACHE_STEP = 256  # places by which a cache grows at a time; fewer where fewer will do
PREFILL = 2048  # tokens of every prompt that are read in one pass


def temperature_sampler(temperature: float) -> Callable[[mx.array], mx.array]:
    """Draw from softmax(logits / temperature), unfiltered, so that training's logprobs are those of the draw;
    temperature 0 takes the most likely token."""
    if temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    return lambda logprobs: mx.random.categorical(logprobs / temperature)


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    eos_token_ids: Sequence[int] | set[int],
    max_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 128,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """One completion per prompt, each through its first EOS (which is kept) or cut at `max_tokens`.

    prompts: token ids, at least one each; a soft prompt of the model is put before them here. batch_size: prompts
    in flight. on_token: called with the number of tokens of each decoding step, for progress.
    Runs in eval mode, so dropout is off, and leaves the model in the mode it was in.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt is empty, and the model has no BOS token to begin with; give every prompt some text")
    prefix = soft_prompt_ids(model)
    prompts = [prefix + list(prompt) for prompt in prompts]
    check_ids(model, prompts)
    was_training = model.training
    model.eval()
    try:
        plain = all(type(cache) is KVCache for cache in make_prompt_cache(model))
        if not takes_unequal_prompts(model):
            decode = _decode_by_length
        else:
            decode = _decode if plain and len(prompts) <= batch_size else _decode_by_mlx_lm
        return decode(
            model, prompts, set(eos_token_ids), max_tokens, temperature_sampler(temperature), batch_size, on_token
        )
    finally:
        model.train(was_training)


def takes_unequal_prompts(model: nn.Module) -> bool:
    """Whether mlx-lm's padding leaves each completion of this family what its prompt alone would have given."""
    family = type(model).__module__.rpartition(".")[2]
    if family in PADS_HIDDEN:
        return True
    return family not in MASK_MISFITS and all(type(cache) in ATTENTION_CACHES for cache in make_prompt_cache(model))


def _decode_by_length(model, prompts, eos_token_ids, max_tokens, sampler, batch_size, on_token) -> list[list[int]]:
    """Prompts of one length at a time, which need no padding, over the model's own caches of any kind."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    completions: list[list[int]] = [[] for _ in prompts]
    for _, group in itertools.groupby(order, key=lambda row: len(prompts[row])):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            rows = alike[start : start + batch_size]
            batch = [prompts[row] for row in rows]
            decoded = _decode(model, batch, eos_token_ids, max_tokens, sampler, batch_size, on_token)
            for row, completion in zip(rows, decoded, strict=True):
                completions[row] = completion
    return completions


def _decode_by_mlx_lm(model, prompts, eos_token_ids, max_tokens, sampler, batch_size, on_token) -> list[list[int]]:
    """By mlx-lm's BatchGenerator: a new prompt wherever one of those in flight has ended."""
    width = min(batch_size, len(prompts))
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in eos_token_ids],
        sampler=sampler,
        completion_batch_size=width,
        prefill_batch_size=width,
    )
    try:
        ids = generator.insert(prompts)
        completions: dict[int, list[int]] = {uid: [] for uid in ids}
        while responses := generator.next_generated():
            for response in responses:
                completions[response.uid].append(response.token)
            if on_token:
                on_token(len(responses))
    finally:
        generator.close()
    return [completions[uid] for uid in ids]


def _decode(model, prompts, eos_token_ids, max_tokens, sampler, batch_size, on_token) -> list[list[int]]:
    """All prompts at once, without the work that BatchGenerator does per row and token; unequal ones over key-value
    caches alone.

    What ends is left out of the later passes once it is an eighth of the rows, since that copies the caches.
    """
    if not prompts:
        return []
    caches = _read_prompts(model, prompts, max_tokens)

    def draw(tokens: mx.array) -> mx.array:
        drawn = sampler(model(tokens[:, None], cache=caches)[:, -1])
        mx.async_eval(drawn)  # so that the next pass is prepared while this one runs
        return drawn

    ends = np.array(sorted(eos_token_ids), dtype=np.int64)
    completions = np.zeros((len(prompts), max_tokens), dtype=np.int64)
    lengths = np.zeros(len(prompts), dtype=np.int64)
    rows, going = np.arange(len(prompts)), np.ones(len(prompts), dtype=bool)  # of the batch, by its row
    drawn = draw(mx.array([prompt[-1] for prompt in prompts]))
    for count in range(max_tokens):
        following = draw(drawn) if count + 1 < max_tokens else drawn
        completions[rows, count] = drawn
        lengths[rows[going]] = count + 1
        if on_token:
            on_token(int(going.sum()))
        going &= ~np.isin(completions[rows, count], ends)
        if not going.any():
            break
        if 8 * (~going).sum() >= len(rows) and _can_drop_rows(caches):
            kept = np.flatnonzero(going)
            _keep_rows(caches, kept)
            following, rows, going = following[mx.array(kept)], rows[kept], going[kept]
        drawn = following
    return [row[:length].tolist() for row, length in zip(completions, lengths, strict=True)]


def _read_prompts(model, prompts: list[list[int]], max_tokens: int) -> list:
    """Caches that hold all prompts but for their last tokens; shorter ones are padded on the left within."""
    lengths = [len(prompt) - 1 for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    ragged = any(padding)
    caches: list = make_prompt_cache(model)
    if ragged:
        caches = [BatchKVCache([0] * len(prompts)) for _ in caches]
    for cache in caches:
        if isinstance(cache, KVCache | BatchKVCache):
            cache.step = min(max(lengths) + max_tokens, CACHE_STEP)
        if ragged:
            cache.prepare(right_padding=padding)
    tokens = mx.array([prompt[:-1] + [0] * pads for prompt, pads in zip(prompts, padding, strict=True)], mx.int32)
    for start in range(0, max(lengths), PREFILL):
        model(tokens[:, start : start + PREFILL], cache=caches)
        mx.eval([cache.state for cache in caches])
    if ragged:
        for cache in caches:
            cache.finalize()
    return caches


def _can_drop_rows(caches: list) -> bool:
    return all(type(cache) in (KVCache, BatchKVCache) for cache in caches)


def _keep_rows(caches: list, rows: np.ndarray) -> None:
    """Leave all rows but these out of the caches."""
    index = mx.array(rows)
    for cache in caches:
        if isinstance(cache, BatchKVCache):
            cache.filter(index)
        else:
            cache.keys, cache.values = cache.keys[index], cache.values[index]


class ChatSession:
    """A conversation with one model: keeps the turns and the key-value cache, and streams replies.

    With a chat template, a turn is rendered by it. Without one, the model goes on from a text: the first turn as it
    stands, which is how training has met it, and every later one on a line of its own.
    """

    def __init__(self, model: nn.Module, tokenizer: TokenizerWrapper, system_prompt: str | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.messages = list(self.opening)
        self.cache = make_prompt_cache(model)
        self.cached: list[int] = []
        model.eval()

    def reset(self) -> None:
        """Forget the conversation, but not the system prompt. The cache stays for what the next one shares with it."""
        self.messages = list(self.opening)

    def row(self) -> dict[str, Any]:
        """The conversation as a row of data: "messages" where there is a chat template, else "text"."""
        if self.tokenizer.has_chat_template:
            return {"messages": list(self.messages)}
        return {"text": "\n".join(message["content"] for message in self.messages)}

    def prompt_ids(self) -> list[int]:
        """The whole conversation as token ids, ready for the next reply, the soft prompt included.

        Raises UserError where the chat template refuses it (a system prompt, say).
        """
        row = self.row()
        prompt = row["text"] if "text" in row else render(self.tokenizer, row["messages"], reply=True)
        return soft_prompt_ids(self.model) + encode_prompt(self.tokenizer, prompt)

    def reply(
        self, text: str, max_tokens: int, temperature: float = 0.0, top_p: float = 0.0
    ) -> Generator[str, None, None]:
        """Add the user's turn and stream the reply piece by piece; the reply joins the conversation, also if the
        stream is closed early."""
        self.messages.append({"role": "user", "content": text})
        tokens = self.prompt_ids()
        check_ids(self.model, [tokens])
        common = self._reuse_cache(tokens)
        pieces: list[str] = []
        try:
            for response in stream_generate(
                self.model,
                self.tokenizer,
                tokens[common:],
                max_tokens=max_tokens,
                sampler=make_sampler(temperature, top_p),
                prompt_cache=self.cache,
            ):
                tokens.append(response.token)
                pieces.append(response.text)
                yield response.text
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
            self.cached = tokens[: self._cache_length()]

    def _cache_length(self) -> int:
        """Tokens in the cache; 0 where it cannot be cut back, or where a stop amid a pass left its layers unequal."""
        lengths = {getattr(layer, "offset", 0) for layer in self.cache}
        return lengths.pop() if len(lengths) == 1 and can_trim_prompt_cache(self.cache) else 0

    def _reuse_cache(self, tokens: list[int]) -> int:
        """Cut the cache back to what it shares with `tokens`; returns how many tokens need not be read again."""
        common = 0
        # At least one token has to be read for the model to go on from.
        for cached, token in zip(self.cached, tokens[:-1], strict=False):
            if cached != token:
                break
            common += 1
        if common:
            trim_prompt_cache(self.cache, self._cache_length() - common)
        else:
            self.cache = make_prompt_cache(self.model)
        return common
