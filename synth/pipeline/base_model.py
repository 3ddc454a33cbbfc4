"""The model whose pass rates are measured, and how it draws completions.

A completion depends on (model, adapter, temperature, length, seed, prompt, number) and nothing else: each has its own
random key, so neither the rest of the batch nor a restart changes it (up to rounding). The rollouts of one prompt share
its KV cache, so the prompt is read once, however many they are.

Measured on tiny-digits, one of two busy CPU cores, 16 prompts with 8 rollouts of 16 tokens each, best of 3: prompts of
400 tokens take 1.1 s with a shared cache and 4.4 s without; prompts of 5 tokens 0.35 s and 0.47 s.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from common.errors import UserError
from data.batching import encode_prompt
from data.chat import has_template, render
from data.decoding import completion_texts
from models.adapters import load_adapter
from models.generation import takes_unequal_prompts
from models.loading import load
from models.row_keys import KeyedModel, Keys
from models.soft_prompt import check_ids, soft_prompt_ids
from synth.pipeline.rollouts import Draw

PREFILL = 2048  # tokens of a prompt read at once
BATCHES = 4  # whose prompt caches are held at once: a batch is refilled as its rollouts end


class BaseModel:
    """The model whose pass rates are measured: tiny-digits, a folder or a Hugging Face name; with an adapter, if any.

    max_tokens: of a completion; batch_size: completions in flight; chat: give a prompt as a user's turn, if there is a
    chat template. Raises UserError as `load` and `load_adapter` do.
    """

    def __init__(
        self,
        name: str,
        adapter: str | Path | None = None,
        max_tokens: int = 256,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
        chat: bool = False,
    ):
        loaded = load(name)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        if adapter:
            load_adapter(self.model, adapter)
        self.model.eval()
        self.max_tokens, self.temperature, self.seed, self.batch_size = max_tokens, temperature, seed, batch_size
        self.chat = chat and has_template(self.tokenizer)
        weights = [fingerprint(path) for path in (loaded.path, adapter) if path]
        self.identity = repr((weights, max_tokens, temperature, seed, *["chat"] * self.chat))

    def encoded(self, prompt: str) -> list[int]:
        """The token ids of a prompt as the model is given it."""
        turn = [{"role": "user", "content": prompt}]
        return encode_prompt(self.tokenizer, render(self.tokenizer, turn, reply=True) if self.chat else prompt)

    def sample(self, wanted: Sequence[Draw], done: Callable[[int, str], None]) -> None:
        """As `Completer` says. Rollouts of one prompt should be adjacent, so that they share its cache."""
        prefix = soft_prompt_ids(self.model)
        ids = {prompt: self.encoded(prompt) for prompt in {rollout.prompt for rollout in wanted}}

        def ended(index: int, completion: list[int]) -> None:
            _, texts = completion_texts(self.tokenizer, [ids[wanted[index].prompt]], [completion])
            done(index, texts[0])

        sample_shared(
            self.model,
            [prefix + ids[rollout.prompt] for rollout in wanted],
            np.array([own_key(self.seed, rollout) for rollout in wanted], dtype=np.uint32),
            self.temperature,
            self.tokenizer.eos_token_ids,
            self.max_tokens,
            self.batch_size,
            ended,
        )


def sample_shared(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    keys: np.ndarray,
    temperature: float,
    eos_token_ids: Sequence[int] | set[int],
    max_tokens: int,
    batch_size: int,
    done: Callable[[int, list[int]], None],
) -> None:
    """Draw a completion of every prompt; adjacent equal prompts are read once.

    prompts: token ids, at least one each; keys: (len(prompts), 2) uint32, the random key of each, of which the second
    half is counted up at every token; temperature: 0 takes the most likely tokens. Calls done(index, token ids) as each
    ends: with its EOS, which is kept, or at max_tokens. The model must be in eval mode. Raises UserError for an empty
    prompt and for a model whose caches mlx-lm cannot copy.
    """
    if not all(prompts):
        raise UserError("a prompt is empty, and the model has no BOS token to start with; give every input some text")
    check_ids(model, prompts)
    if not all(hasattr(cache, "merge") for cache in make_prompt_cache(model)):
        raise UserError(f"{type(model).__module__} has caches that mlx-lm cannot copy or batch; use another base model")
    width = batch_size if takes_unequal_prompts(model) else 1
    for first in range(0, len(prompts), BATCHES * batch_size):
        chunk = [tuple(prompt) for prompt in prompts[first : first + BATCHES * batch_size]]
        caches = {prompt: _read(model, prompt[:-1]) for prompt in dict.fromkeys(chunk)}
        keyed = KeyedModel(model, temperature)
        generator = BatchGenerator(
            keyed,
            max_tokens=max_tokens,
            stop_tokens=[[token] for token in eos_token_ids],
            sampler=keyed.draw,
            completion_batch_size=width,
            prefill_batch_size=width,
        )
        try:
            uids = generator.insert(
                [list(prompt[-1:]) for prompt in chunk],
                caches=[[*caches[prompt], Keys(keys[at : at + 1])] for at, prompt in enumerate(chunk, first)],
            )
            completions: dict[int, list[int]] = {uid: [] for uid in uids}
            index_of = {uid: index for index, uid in enumerate(uids, first)}
            while responses := generator.next_generated():
                for response in responses:
                    completions[response.uid].append(response.token)
                    if response.finish_reason is not None:
                        done(index_of[response.uid], completions[response.uid])
        finally:
            generator.close()


def _read(model: nn.Module, tokens: tuple[int, ...]) -> list[Any]:
    """The KV cache after `tokens`. A batch copies from it, so one serves all rollouts of a prompt."""
    cache = make_prompt_cache(model)
    for first in range(0, len(tokens), PREFILL):
        model(mx.array([tokens[first : first + PREFILL]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    return cache


def own_key(seed: int, rollout: Draw) -> tuple[int, int]:
    """A random key, two numbers of 32 bits, that depends on the seed, the prompt and the rollout's number alone."""
    digest = hashlib.sha256(f"{seed} {rollout.number} {rollout.prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


def fingerprint(path: str | Path) -> str:
    """A digest that changes with the files of a model or an adapter: their names, sizes and modification times."""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path, path.with_suffix(".json")]
    states = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(repr((str(path.resolve()), states)).encode()).hexdigest()[:16]
