"""Logprobs, entropy and exact KL of tokens, with their gradients, where the logits (B, C, V) would not fit in memory.

    hidden = hidden_states(model, tokens, positions)  # (B, C, H)
    stats = token_stats(model, hidden, completions, temperature, entropy=True)

The twin of models.token_stats: the output layer is applied to a few rows of the hidden states at a time, and once more
in the backward pass, so that only the logits of one piece exist at once.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from common.errors import UserError

LOGITS_BYTES = 256 * 10**6
ALIVE = 8  # arrays (n, V) in float32 at once, in the backward pass of a piece
LARGEST_ARRAY = {"mps": 2**32 - 1}  # bytes, for the devices that have such a limit
LOWEST = -1e38  # for a log probability of −inf, which times a probability of 0 would be NaN


class TokenStats(NamedTuple):
    """One figure for each target, in the shape of the targets; None where it was not asked for."""

    logprobs: Tensor  # nats
    correct: Any = None  # whether the target is the most likely token
    entropy: Any = None  # nats
    ref_logprobs: Any = None  # nats
    kl: Any = None  # nats, policy against reference, over the whole vocabulary


class _BodyOutput(BaseModelOutputWithPast):
    """Of a body that was left out: what a family hands on of it, beside the states, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def hidden_states(model: Any, tokens: Tensor, positions: Tensor, **arguments: Any) -> Tensor:
    """What the output layer would take at the given positions, in one forward pass that applies it nowhere.

    tokens: (B, L) ids, right padded, so that causal attention alone keeps pads out; positions: (B, C) indices into L.
    arguments: what else the model's own forward takes. Returns (B, C, H). Raises UserError where the output layer is
    not found.
    """
    hidden: list[Tensor] = []

    def tap(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        hidden.append(torch.take_along_dim(inputs[0], positions[..., None], dim=1))
        return inputs[0][:, :0]

    hook = _output_layer(model).register_forward_pre_hook(tap)
    try:
        model(input_ids=tokens, **{"use_cache": False, **arguments})
    finally:
        hook.remove()
    if not hidden:
        raise UserError(f"{type(model).__name__} hides its output layer; use another model")
    return hidden[0]


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """What the model makes of hidden states (n, H): logits (n, V), post-processing included.

    The model itself is called, as families differ in what they do to their logits; only its body is left out.
    """
    states = hidden[None]
    body = model.base_model
    hook = _output_layer(model).register_forward_pre_hook(lambda _, inputs: states)
    if body is not model:
        body.forward = lambda *args, **kwargs: _BodyOutput(last_hidden_state=states)
    try:
        token = torch.zeros((1, 1), dtype=torch.long, device=hidden.device)
        return model(input_ids=token, use_cache=False).logits[0]
    finally:
        hook.remove()
        if body is not model:
            del body.forward  # the class has the real one


def _output_layer(model: Any) -> nn.Module:
    layer = model.get_output_embeddings()
    if layer is None:
        raise UserError(
            f"{type(model).__name__} has no output layer, so it cannot be trained by PPO; use another model"
        )
    return layer


def largest_pass(model: Any, keys: int) -> int:
    """The most tokens, of all rows together, that a forward pass may read where each attends to `keys` tokens.

    Beyond that, a layer's attention scores (B, heads, L, keys) in float32 are no array that the device can have.
    """
    heads = model.config.get_text_config().num_attention_heads
    return max(1, largest_array(model.device) // (4 * heads * keys))


def largest_array(device: torch.device) -> int:
    """The bytes of the largest array that a device can have, as far as it has a limit of its own."""
    return LARGEST_ARRAY.get(device.type, sys.maxsize)


def token_stats(
    model: Any,
    hidden: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    correct: bool = False,
    entropy: bool = False,
    reference: tuple[Any, Tensor] | None = None,
    logits_bytes: int = LOGITS_BYTES,
) -> TokenStats:
    """The log probability of each target under the tempered policy, and what else is asked for, at least float32.

    hidden: (..., H), as `hidden_states` gives it; targets: (...) ids; temperature > 0. reference: a model over the same
    vocabulary and its hidden states at the same positions, for ref_logprobs and kl; no gradient flows into it.
    logits_bytes: of all arrays (n, V) together, which sets how many positions make a piece (at least one).
    Gradients reach `hidden` and whatever is trainable in the output layer.
    """
    vocabulary = logits_of(model, hidden.detach().flatten(0, -2)[:1]).shape[-1]
    size = max(1, min(logits_bytes // ALIVE, largest_array(hidden.device)) // (4 * vocabulary))
    ids = targets.flatten().long()
    rows = [hidden.flatten(0, -2).split(size), ids.split(size)]
    if reference is not None:
        ref_model, ref_hidden = reference
        rows.append(ref_hidden.detach().flatten(0, -2).split(size))

    def figures(states: Tensor, ids: Tensor, ref_states: Tensor | None = None) -> dict[str, Tensor]:
        ref_logits = None
        if ref_states is not None:
            with torch.no_grad():
                ref_logits = logits_of(ref_model, ref_states)
        return _figures(logits_of(model, states), ids, temperature, correct, entropy, ref_logits)

    if len(rows[0]) == 1:  # its logits may as well be kept
        pieces = [figures(*(parts[0] for parts in rows))]
    else:
        pieces = [checkpoint(figures, *piece, use_reentrant=False) for piece in zip(*rows, strict=True)]
    return TokenStats(**{name: torch.cat([piece[name] for piece in pieces]).view(targets.shape) for name in pieces[0]})


def _figures(
    logits: Tensor, ids: Tensor, temperature: float | Tensor, correct: bool, entropy: bool, ref_logits: Tensor | None
) -> dict[str, Tensor]:
    """Of one piece: logits and ref_logits (n, V), ids (n,)."""
    log_probs = _log_softmax(logits, temperature)
    figures = {"logprobs": log_probs.gather(-1, ids[:, None])[:, 0]}
    if correct:
        figures["correct"] = logits.argmax(dim=-1) == ids
    if entropy:
        figures["entropy"] = -(log_probs.exp() * log_probs.clamp(min=LOWEST)).sum(dim=-1)
    if ref_logits is not None:
        ref_log_probs = _log_softmax(ref_logits, temperature)
        figures["ref_logprobs"] = ref_log_probs.gather(-1, ids[:, None])[:, 0]
        log_ratio = log_probs.clamp(min=LOWEST) - ref_log_probs.clamp(min=LOWEST)
        figures["kl"] = (log_probs.exp() * log_ratio).sum(dim=-1)
    return figures


def _log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tempered = logits if isinstance(temperature, float) and temperature == 1 else logits / temperature
    return tempered.log_softmax(dim=-1)
