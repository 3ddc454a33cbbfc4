"""Sampling completions in PyTorch, in batches: token ids in, token ids out.

The twin of `models.generation.sample`. `model.generate` is not used: it applies penalties and filters from the
checkpoint's settings, so training's logprobs would not be those of the sampling distribution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from common.errors import UserError
from data.batching import TOKENS_A_PASS, in_order
from models.torch_soft_prompt import soft_prompt_ids
from models.torch_token_stats import hidden_states
from models.torch_value_head import forward

TOKENS_BETWEEN_WAITS = 8  # on a GPU, which has nothing to do while Python looks whether all rows have ended


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    eos_token_ids: Sequence[int] | set[int],
    max_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 128,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """One completion per prompt, each through its first EOS (which is kept) or cut at `max_tokens`.

    prompts: token ids, at least one each; the model's soft prompt is prepended here. Tokens are drawn from
    softmax(logits / temperature), unfiltered; temperature 0 takes the most likely token. batch_size: prompts in flight.
    on_token: called with the number of tokens of each decoding step, for progress. Runs in eval mode, so without
    dropout, and restores the model's mode.
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
            completions += _sample_batch(model, batch, eos_token_ids, max_tokens, temperature, on_token)
    finally:
        model.train(was_training)
    return completions


@torch.no_grad()
def _sample_batch(model: Any, prompts: list[list[int]], eos_token_ids, max_tokens, temperature, on_token):
    """Prompts are padded on the left, so that all rows draw their next token at the same position."""
    width = max(map(len, prompts))
    device = model.device
    eos = torch.tensor(sorted(eos_token_ids), device=device)
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    cache = DynamicCache(config=model.config)
    tokens, positions = _read_prompts(model, cache, tokens, mask, positions)
    drawn, lengths = [], torch.zeros_like(alive, dtype=torch.long)
    counts: list[Tensor] = []  # rows going on, at each token since the last wait
    for number in range(1, max_tokens + 1):
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
        tokens = draw(logits[:, 0], temperature)[:, None]
        drawn.append(tokens)
        lengths += alive
        counts.append(alive.sum())
        alive = alive & ~torch.isin(tokens[:, 0], eos)
        if number % _tokens_between_waits(device) == 0 or number == max_tokens:
            *begun, left = torch.stack([*counts, alive.sum()]).tolist()
            counts.clear()
            for count in filter(None, begun if on_token else ()):
                on_token(count)
            if not left:
                break
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        positions = positions[:, -1:] + 1
    rows = torch.cat(drawn, dim=1).tolist()
    return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]


def _tokens_between_waits(device: torch.device) -> int:
    """How many tokens are drawn before it is known which rows have ended; a CPU would compute what is not needed."""
    return 1 if device.type == "cpu" else TOKENS_BETWEEN_WAITS


def _read_prompts(
    model: Any, cache: DynamicCache, tokens: Tensor, mask: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill the cache with all but the last of `tokens` (B, P), in passes of TOKENS_A_PASS at most where P is long.

    Returns the tokens that are left for the pass that draws, and their positions.
    """
    step, start = max(1, TOKENS_A_PASS // len(tokens)), 0
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


def draw(logits: Tensor, temperature: float) -> Tensor:
    """One token a row from softmax(logits / temperature), or the most likely one at temperature 0.

    logits: (B, V). Returns (B,).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(torch.softmax(logits.float() / temperature, dim=-1), num_samples=1)[:, 0]
