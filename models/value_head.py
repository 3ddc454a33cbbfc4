"""Hidden states, logits and a value head for any mlx-lm architecture, in one forward pass.

Families name and post-process their output layers differently, so bodies and heads are never called directly. Instead,
during the model's own call, a tap in place of the output layer records its input (the state after the last norm) and
passes on only the requested positions, so that no other logits are computed. If a model multiplies by its table without
calling it, the last norm is tapped instead.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.errors import UserError
from common.files import atomic_file
from models.adapter_config import HEAD_FILE, check_head, check_head_width
from models.arrays import read_arrays
from models.modules import outer_modules
from models.soft_prompt import find_embedding

OUTPUT_LAYERS = ("lm_head", "embed_out", "output")
LAST_NORMS = ("norm",)


class Tap:
    """Stands in for an output layer during one forward pass.

    positions: those whose states the layer gets (None: all). given: states that it gets in place of what comes in.
    """

    def __init__(self, layer: nn.Module, positions: mx.array | None = None, given: mx.array | None = None):
        self.layer, self.positions, self.given = layer, positions, given
        self.hidden: mx.array | None = None

    def __getattr__(self, name: str) -> Any:
        """Some models read the layer's weight directly, which bypasses the tap; `forward` notices that."""
        return getattr(self.layer, name)

    def _record(self, hidden: mx.array) -> mx.array:
        if self.given is not None:
            hidden = self.given
        if self.positions is not None:
            hidden = mx.take_along_axis(hidden, self.positions[..., None], axis=1)
        self.hidden = hidden
        return hidden


class _LinearTap(Tap):
    def __call__(self, hidden: mx.array) -> mx.array:
        return self.layer(self._record(hidden))


class _EmbeddingTap(Tap):
    def __call__(self, tokens: mx.array) -> mx.array:
        return self.layer(tokens)

    def as_linear(self, hidden: mx.array) -> mx.array:
        return self.layer.as_linear(self._record(hidden))


class _NormTap(Tap):
    def __call__(self, hidden: mx.array) -> mx.array:
        return self._record(self.layer(hidden))


def tap_places(model: nn.Module) -> Iterator[tuple[nn.Module, str, type[Tap]]]:
    """Candidate places, best first: the module that holds a layer, the layer's key in it, and the kind of tap.

    The output layer is found by presence; if it turns out not to be called, the norm before it is tapped.
    """
    place = _outside_the_layers(model, OUTPUT_LAYERS)
    if place is not None:
        yield *place, _LinearTap
    else:
        parent, _, key = find_embedding(model)[0].rpartition(".")
        yield module_at(model, parent), key, _EmbeddingTap
    place = _outside_the_layers(model, LAST_NORMS)
    if place is not None:
        yield *place, _NormTap


@contextmanager
def standing_in(parent: nn.Module, key: str, stand_in: Any) -> Iterator[None]:
    """Have `stand_in` in the place of `parent[key]`."""
    module = parent[key]
    dict.__setitem__(parent, key, stand_in)  # keeps the order of the parameters, which attribute assignment does not
    try:
        yield
    finally:
        dict.__setitem__(parent, key, module)


def _outside_the_layers(model: nn.Module, keys: tuple[str, ...]) -> tuple[nn.Module, str] | None:
    for name, _ in outer_modules(model):
        parent, _, key = name.rpartition(".")
        if key in keys:
            return module_at(model, parent), key
    return None


def module_at(model: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        model = model[part]
    return model


def forward(model: nn.Module, tokens: mx.array, positions: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """One forward pass: logits and hidden states at the given positions, by default all.

    tokens: (B, L) ids, right padded; positions: (B, C) indices into L. Returns logits (B, C, V) and hidden
    (B, C, H); without positions C is L. Unused results cost nothing, since mlx evaluates lazily. Raises UserError if
    the model's output layer is not found.
    """
    for parent, key, tap_type in tap_places(model):
        tap = tap_type(parent[key], positions)
        with standing_in(parent, key, tap):
            logits = model(tokens)
        if tap.hidden is not None:
            return logits, tap.hidden
    raise UserError(
        f"{type(model).__module__} does not expose its output layer, which a value head needs; use another model"
    )


class ValueHead(nn.Module):
    """A linear map from a hidden state to a value, in float32."""

    def __init__(self, hidden_size: int, std: float = 0.0, bias: bool = False):
        """std: standard deviation of the initial weights; with 0, every value starts at 0. bias: as TRL's head has."""
        super().__init__()
        self.weight = std * mx.random.normal((1, hidden_size))
        if bias:
            self.bias = mx.zeros((1,))

    def __call__(self, hidden: mx.array) -> mx.array:
        """hidden: (..., H). Returns values (...) in float32."""
        values = hidden.astype(mx.float32) @ self.weight.T
        return (values + self.bias if "bias" in self else values).squeeze(-1)


def hidden_size(model: nn.Module) -> int:
    """Width of the output layer's input, measured by a forward pass over one token."""
    return forward(model, mx.array([[0]]))[1].shape[-1]


def new_value_head(model: nn.Module, std: float | None = 0.0, bias: bool = False) -> ValueHead:
    """A value head for `model`. std, bias: as of ValueHead; a std of None means 1/sqrt(H), for a reward model."""
    size = hidden_size(model)
    return ValueHead(size, 1 / math.sqrt(size) if std is None else std, bias)


class ScoringModel(nn.Module):
    """A language model that scores a text: the value at its last real token."""

    def __init__(self, model: nn.Module, value_head: ValueHead):
        super().__init__()
        self.model = model
        self.value_head = value_head

    def __call__(self, tokens: mx.array, lengths: mx.array) -> mx.array:
        """tokens: (B, L) right padded; lengths: (B,) real tokens. Returns scores (B,) in float32."""
        _, hidden = forward(self.model, tokens, (lengths - 1)[:, None])
        return self.value_head(hidden[:, 0])


class Policy(nn.Module):
    """A language model with an optional value head on the same trunk."""

    def __init__(self, model: nn.Module, value_head: ValueHead | None = None):
        super().__init__()
        self.model = model
        if value_head is not None:
            self.value_head = value_head

    def __call__(self, tokens: mx.array, positions: mx.array) -> tuple[mx.array, mx.array | None]:
        """tokens: (B, L) right padded; positions: (B, C), each before the token it predicts.

        Returns hidden states (B, C, H), for models.token_stats, and values (B, C) float32, or None without a head.
        """
        _, hidden = forward(self.model, tokens, positions)
        return hidden, self.value_head(hidden) if "value_head" in self else None


def save_value_head(folder: str | Path, head: ValueHead) -> dict[str, Any]:
    """Write the head into a model or adapter folder. Returns the entry for that folder's JSON.

    The weights have a file of their own, because mlx-lm rejects unknown tensors in its files.
    """
    with atomic_file(Path(folder) / HEAD_FILE) as temporary:
        mx.save_safetensors(str(temporary), {"weight": head.weight})
    return {"file": HEAD_FILE, "hidden_size": head.weight.shape[1]}


def load_value_head(folder: str | Path, width: int | None = None) -> ValueHead | None:
    """The head in a model or adapter folder, or None.

    width: of the model's hidden states, if known. Raises UserError for a head of another width, or a damaged one.
    """
    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        return None
    head = head_from(path, read_arrays(path, "train the reward model again"))
    if width is not None:
        check_head_width(path, head.weight.shape[1], width)
    return head


def head_from(source: object, weights: dict[str, mx.array]) -> ValueHead:
    """A value head of these tensors. Raises UserError, which begins with `source`, if they are no head's."""
    check_head(source, weights)
    head = ValueHead(weights["weight"].shape[1])
    head.weight = weights["weight"].astype(mx.float32)
    return head
