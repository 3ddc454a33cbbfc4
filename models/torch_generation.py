"""Sampling completions in PyTorch, in batches: token ids in, token ids out.

The twin of `models.generation.sample`. `model.generate` is not used: it applies penalties and filters from the
checkpoint's settings, so training's logprobs would not be those of the sampling distribution.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from common.errors import UserError
from data.batching import TOKENS_A_PASS, in_order
from models.torch_soft_prompt import soft_prompt_ids
from models.torch_token_stats import hidden_states, largest_pass
from models.torch_value_head import forward

EVENTS: dict[str, Any] = {"cuda": torch.cuda.Event, "mps": torch.mps.Event}


class _OnItsWay:
    """Numbers that a device computes: reading them waits for what it was given before them, not for what came after."""

    def __init__(self, numbers: Tensor):
        self.event = EVENTS[numbers.device.type]() if numbers.device.type in EVENTS else None
        self.numbers = numbers.to("cpu", non_blocking=True)
        if self.event:
            self.event.record()

    def read(self) -> list[int]:
        if self.event:
            self.event.synchronize()
        return self.numbers.tolist()


class _UnreadMasks(DynamicCache):
    """A cache for which transformers makes every token's mask, as it does for compiled models.

    Otherwise it looks whether the mask has a pad, which waits for the device, to leave out one that has none.
    """

    is_compileable = True


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    eos_token_ids: Sequence[int] | set[int],
    max_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 128,
    on_token: Callable[[int], object] | None = None,
    among: tuple[slice, int] | None = None,
) -> list[list[int]]:
    """One completion per prompt, each through its first EOS (which is kept) or cut at `max_tokens`.

    prompts: token ids, at least one each; the model's soft prompt is prepended here. Tokens are drawn from
    softmax(logits / temperature), unfiltered; temperature 0 takes the most likely token. batch_size: prompts in flight.
    on_token: called with the number of tokens of each decoding step, for progress. among: which part the prompts are
    of how many that several processes share; each draws for a row what one process would draw for it. Runs in
    eval mode, so without dropout, and restores the model's mode.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt is empty, and the model has no BOS token to begin with; give every prompt some text")
    prefix = soft_prompt_ids(model)
    was_training = model.training
    model.eval()
    completions: list[list[int]] = []
    try:
        for rows in in_order(len(prompts), batch_size):
            batch = [prefix + list(prompt) for prompt in prompts[rows.start : rows.stop]]
            completions += _sample_batch(model, batch, eos_token_ids, max_tokens, temperature, on_token, among)
    finally:
        model.train(was_training)
    return completions


@torch.no_grad()
def _sample_batch(model: Any, prompts: list[list[int]], eos_token_ids, max_tokens, temperature, on_token, among):
    """Prompts are padded on the left, so that all rows draw their next token at the same position."""
    width = max(map(len, prompts))
    device = model.device
    eos = torch.tensor(sorted(eos_token_ids), device=device)
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    ahead = _passes_ahead(device)
    cache = _UnreadMasks(config=model.config) if ahead else DynamicCache(config=model.config)
    tokens, positions = _read_prompts(model, cache, tokens, mask, positions)
    drawn, lengths = [], torch.zeros_like(alive, dtype=torch.long)
    unread: deque[_OnItsWay] = deque()  # of each token not looked at yet: the rows that it was drawn for, and go on
    for _ in range(max_tokens):
        last = torch.full_like(positions[:, :1], tokens.shape[1] - 1)
        logits, _ = forward(
            model,
            tokens,
            last,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        tokens = draw(logits[:, 0], temperature, among)[:, None]
        drawn.append(tokens)
        lengths += alive
        going_on = alive & ~torch.isin(tokens[:, 0], eos)
        unread.append(_OnItsWay(torch.stack([alive.sum(), going_on.sum()])))
        alive = going_on
        if len(unread) > ahead and not _left(unread.popleft(), on_token):
            break
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        positions = positions[:, -1:] + 1
    else:
        for token in unread:
            _left(token, on_token)
    rows = torch.cat(drawn, dim=1).tolist()
    return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]


def _passes_ahead(device: torch.device) -> int:
    """Passes that are given to the device before a token is looked at: a CPU would compute what may not be needed."""
    return 0 if device.type == "cpu" else 1


def _left(token: _OnItsWay, on_token: Callable[[int], object] | None) -> int:
    """The rows that go on after a token; `on_token` is told of those that it was drawn for."""
    drawn_for, left = token.read()
    if on_token and drawn_for:
        on_token(drawn_for)
    return left


def _read_prompts(
    model: Any, cache: DynamicCache, tokens: Tensor, mask: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill the cache with all but the last of `tokens` (B, P), in passes of TOKENS_A_PASS at most (or what a
    device's largest array allows) where P is long.

    Returns the tokens that are left for the pass that draws, and their positions.
    """
    most = min(TOKENS_A_PASS, largest_pass(model, tokens.shape[1]))
    step, start = max(1, most // len(tokens)), 0
    while tokens.shape[1] - start > step:
        part = slice(start, start + step)
        hidden_states(
            model,
            tokens[:, part],
            torch.zeros_like(tokens[:, :1]),
            attention_mask=mask[:, : part.stop],
            position_ids=positions[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        start = part.stop
    return tokens[:, start:], positions[:, start:]


def draw(logits: Tensor, temperature: float, among: tuple[slice, int] | None = None) -> Tensor:
    """One token a row from softmax(logits / temperature), or the most likely one at temperature 0.

    logits: (B, V); among: see `sample`. Returns (B,).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    own, count = among or (slice(None), len(probabilities))
    noise = torch.empty((count, probabilities.shape[1]), device=probabilities.device).exponential_()
    # torch.multinomial draws so, too, but first waits for the device, to look whether these are probabilities.
    return (probabilities / noise[own]).argmax(dim=-1)
