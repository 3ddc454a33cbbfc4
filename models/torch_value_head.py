"""Hidden states, logits and a value head for any causal language model of transformers, in one forward pass.

The twin of models.value_head. Families post-process their logits differently, so bodies and output layers are never
called directly. Instead, during the model's own call, a hook on the output layer records its input (the state after the
last norm) and passes on only the requested positions, so that no other logits are computed.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from common.files import atomic_file
from models.adapter_config import HEAD_FILE, check_head, check_head_width
from models.torch_arrays import read_arrays
from models.torch_token_stats import hidden_states


def forward(model: Any, tokens: Tensor, positions: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """One forward pass: logits (B, C, V) and hidden states (B, C, H) at the given positions.

    tokens: (B, L) ids, right padded, so that causal attention alone hides the pads; positions: (B, C) indices into L.
    arguments: further ones of the model's own forward. Raises UserError if the output layer is not found.
    """
    hidden: list[Tensor] = []

    def tap(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        hidden.append(at_positions(inputs[0], positions))
        return hidden[0]

    output_layer = model.get_output_embeddings()
    if output_layer is None:
        raise UserError(
            f"{type(model).__name__} has no output layer, so it cannot be trained by PPO; use another model"
        )
    hook = output_layer.register_forward_pre_hook(tap)
    try:
        logits = model(input_ids=tokens, **{"use_cache": False, **arguments}).logits
    finally:
        hook.remove()
    if not hidden:
        raise UserError(
            f"{type(model).__name__} does not expose its output layer, which a value head needs; use another model"
        )
    return logits, hidden[0]


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """hidden (B, L, H) at positions (B, C): (B, C, H)."""
    return torch.take_along_dim(hidden, positions[..., None], dim=1)


class ValueHead(nn.Linear):
    """A linear map from a hidden state to a value, in float32; initialised to 0."""

    def __init__(self, hidden_size: int, bias: bool = False):
        """bias: as TRL's head has."""
        super().__init__(hidden_size, 1, bias=bias, dtype=torch.float32)
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., H). Returns values (...) in float32."""
        return super().forward(hidden.float()).squeeze(-1)


def hidden_size(model: Any) -> int:
    """Width of the output layer's input."""
    return model.get_output_embeddings().weight.shape[1]


def new_value_head(model: Any, bias: bool = False) -> ValueHead:
    """A value head for `model`, on its device. bias: as of ValueHead."""
    return ValueHead(hidden_size(model), bias).to(model.device)


class Policy(nn.Module):
    """A language model with an optional value head on the same trunk."""

    def __init__(self, model: nn.Module, value_head: ValueHead | None = None):
        super().__init__()
        self.model = model
        self.value_head = value_head

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens: (B, L) right padded; positions: (B, C), each before the token it predicts.

        Returns hidden states (B, C, H), for models.torch_token_stats, and values (B, C) float32, or None without a
        head.
        """
        hidden = hidden_states(self.model, tokens, positions)
        return hidden, None if self.value_head is None else self.value_head(hidden)


class ScoringModel(nn.Module):
    """A language model that scores a text: the value at its last real token."""

    def __init__(self, model: nn.Module, value_head: ValueHead):
        super().__init__()
        self.model = model
        self.value_head = value_head

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens: (B, L) right padded; lengths: (B,) real tokens. Returns scores (B,) in float32."""
        body: Any = self.model.base_model  # without the output layer, which a sequence classifier lacks
        hidden = body(input_ids=tokens, use_cache=False).last_hidden_state
        return self.value_head(at_positions(hidden, lengths[:, None] - 1)[:, 0])


def save_value_head(folder: str | Path, head: ValueHead) -> dict[str, Any]:
    """Write the head into a model or adapter folder. Returns the entry for that folder's JSON."""
    with atomic_file(Path(folder) / HEAD_FILE) as temporary:
        save_file({"weight": head.weight.detach()}, temporary)
    return {"file": HEAD_FILE, "hidden_size": head.weight.shape[1]}


def load_value_head(folder: str | Path, width: int | None = None) -> ValueHead | None:
    """The head in a model or adapter folder, on the CPU, or None.

    width: of the model's hidden states, if known. Raises UserError for a head of another width, or a damaged one.
    """
    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        return None
    head = head_from(path, read_arrays(path, "train the reward model again"))
    if width is not None:
        check_head_width(path, head.weight.shape[1], width)
    return head


def head_from(source: object, weights: dict[str, Tensor]) -> ValueHead:
    """A value head of these tensors. Raises UserError, which begins with `source`, if they are no head's."""
    check_head(source, weights)
    head = ValueHead(weights["weight"].shape[1])
    head.load_state_dict(weights)
    return head
