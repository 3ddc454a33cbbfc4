"""Fusing a soft prompt into its model: new tokens that the tokenizer prepends, in a standard model folder.

    python fuse.py --adapter-file adapters --save-path ./fused/

The rows of the soft prompt become the embeddings of new tokens. The difficulty is that the output layer then has rows
for them, too, and they must never be sampled: their probability has to stay below 1e-6 without affecting anything else.
If the output layer has a bias, that suffices. Otherwise no row gives a low logit for every hidden state, since hidden
states may point in any direction. So the hidden states get a few additional channels with a constant that is the same
at every position: no layer reads or writes it, it makes up for a reduction of the norms' epsilon, the last norm
amplifies it, and of all output rows only the new ones read it, with a negative sign. With RMS norms this is exact,
except for norms within attention (Qwen 3, OLMo 2), whose epsilon shrinks as well, in proportion to the added width, and
for rounding of the norms' weights in bfloat16. Every result is compared with the original.

Not supported: layer norms (they subtract the mean), quantized weights, and sampling from a tied model right after its
soft prompt, without a text or a BOS. The tokenizer: models.export.prompting_tokenizer.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten

from common.errors import OPENING_ERRORS, UserError, reason
from models.soft_prompt import SoftPromptEmbedding, find_embedding, soft_prompt_ids
from models.value_head import OUTPUT_LAYERS

MOST_PROBABILITY = 1e-6  # of all new tokens together
MARGIN = 60.0  # nats by which new rows lie below the others on the probes; safe for states several times as large
EPSILON_SHARE = 1e-3  # of the norms' epsilon, replaced by the constant
NEVER = -1e4  # the bias of a new output row
PROBES = (4, 32)  # rows and tokens of the texts that check the result
TOLERANCE = {mx.float32: 1e-4, mx.float16: 0.02, mx.bfloat16: 0.1}  # of the largest logit


def fuse_soft_prompt(model: nn.Module, config: dict[str, Any], tokens: list[int]) -> tuple[nn.Module, dict[str, Any]]:
    """A model in which `tokens` act as the soft prompt of `model`, and its configuration.

    tokens: new ids of the tokenizer, above all others. Removes the soft prompt from `model`. Raises UserError if the
    family does not support it.
    """
    path, embedding = find_embedding(model)
    assert isinstance(embedding, SoftPromptEmbedding)
    if any(isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) for module in model.modules()):
        raise UserError("quantized weights cannot represent the rows of a soft prompt exactly; add --de-quantize")
    table = embedding.embedding.weight
    rows = embedding.soft_prompt.astype(table.dtype)
    words = min(tokens[0], len(table))
    probes = mx.random.randint(0, words, PROBES, key=mx.random.key(0))
    expected = _logits_behind(model, soft_prompt_ids(model), probes)[..., :words]
    model.update_modules(tree_unflatten([(path, embedding.embedding)]))

    config = {**config, "vocab_size": max(len(table), tokens[-1] + 1)}
    never = mx.array([*range(len(table), tokens[0]), *tokens])  # the new rows of the output layer
    head = next((name for name, _ in model.named_modules() if name.rpartition(".")[2] in OUTPUT_LAYERS), None)
    if head is not None and "bias" in _module(model, head):
        fused = _padded(model, config)
        _module(fused, path).weight[mx.array(tokens)] = rows
        _module(fused, head).bias[never] = NEVER
    else:
        wider, places = _wider(model, config)
        fused = _padded(model, wider)
        last_norm = _keep_states(fused, path, head, config, wider)
        constant = _write_constant(fused, path, head, never, config, wider)
        scaled = rows * (_embedding_scale(config) / _embedding_scale(wider))
        _module(fused, path).weight[mx.array(tokens), :-places] = scaled.astype(table.dtype)
        _raise_constant(last_norm, constant, places, lambda: _margins(_logits_behind(fused, tokens, probes), never))
        config = wider
    _check(_logits_behind(fused, tokens, probes), never, expected, TOLERANCE[table.dtype], config)
    return fused, config


def _logits_behind(model: nn.Module, prefix: list[int], probes: mx.array) -> mx.array:
    """Logits (B, L, V) in float32 at the probes, each after the prefix."""
    prefixes = mx.broadcast_to(mx.array(prefix), (len(probes), len(prefix)))
    return model(mx.concatenate([prefixes, probes], axis=1))[:, len(prefix) :].astype(mx.float32)


def _module(model: nn.Module, path: str) -> Any:
    for part in path.split("."):
        model = model[part]
    return model


def _refused(config: dict[str, Any], why: str) -> UserError:
    return UserError(
        f"a soft prompt cannot be fused into this {config.get('model_type')} model: {why}; use it with --resume-file"
    )


# --- the same model with more rows and channels ---


def _empty(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """A new model of the configuration, with an output layer if `model` has one."""
    family, arguments = mlx_lm.utils._get_classes(config)
    made = family(arguments.from_dict(config))
    if hasattr(made, "sanitize"):
        made.sanitize(dict(tree_flatten(model.parameters())))  # in which some decide whether it is tied
    return made


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tree_flatten(model.parameters())}


def _padded(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """The model in the sizes of `config`, padded with zeros."""
    fused = _empty(model, config)
    shapes = _shapes(fused)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        added = [(0, new - old) for new, old in zip(shapes[name], array.shape, strict=True)]
        weights.append((name, mx.pad(array, added) if any(after for _, after in added) else array))
    fused.load_weights(weights)
    fused.eval()
    return fused


def _wider(model: nn.Module, config: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A configuration with wider hidden states but the same heads, and the number of additional channels."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if hidden is None or heads is None or "rms_norm_eps" not in config:
        raise _refused(config, "its configuration has no hidden_size, num_attention_heads or rms_norm_eps")
    head_dim = config.get("head_dim") or hidden // heads
    named = {**config, "head_dim": head_dim}
    try:
        # Some families take the head size from the configuration; others compute it by a division that rounds down.
        if _shapes(_empty(model, {**named, "head_dim": head_dim + 2})) != _shapes(_empty(model, named)):
            places = math.lcm(heads, 64 if hidden % 64 == 0 and hidden >= 1024 else 2)
        else:
            places = 2
        wider = {**named, "hidden_size": hidden + places}
        shapes = _shapes(_empty(model, wider))
    except (AssertionError, *OPENING_ERRORS) as error:
        raise _refused(config, f"its hidden states cannot be widened ({reason(error)})") from None
    for name, old in _shapes(_empty(model, named)).items():
        changed = [sizes for sizes in zip(old, shapes[name], strict=True) if sizes[0] != sizes[1]]
        if set(changed) - {(hidden, hidden + places)}:
            raise _refused(config, f"{name} would be {shapes[name]} in place of {old} with wider hidden states")
    wider["rms_norm_eps"] = config["rms_norm_eps"] * hidden * (1 - EPSILON_SHARE) / (hidden + places)
    return wider, places


# --- the constant ---


def _embedding_scale(config: dict[str, Any]) -> float:
    """The factor by which the family scales embeddings."""
    family, hidden = config["model_type"], config["hidden_size"]
    if family in ("gemma", "gemma2"):
        return hidden**0.5
    if family == "gemma3_text":
        return mx.array(hidden**0.5, mx.bfloat16).item()
    return config.get("embedding_multiplier", 1.0)


def _keep_states(fused: nn.Module, path: str, head: str | None, config: dict[str, Any], wider: dict[str, Any]) -> Any:
    """Rescale what depends on the width, so that the original channels keep their values. Returns the last norm."""
    hidden, now = config["hidden_size"], wider["hidden_size"]
    norms = {
        name: module
        for name, module in fused.named_modules()
        if "Norm" in type(module).__name__ and module.weight.shape == (now,)
    }
    outer = [name for name in norms if not any(part.isdigit() for part in name.split("."))]
    if len(outer) != 1 or any("LayerNorm" in type(norm).__name__ for norm in norms.values()):
        raise _refused(config, "it has norms other than RMS norms, which would change the constant")
    ratio = _embedding_scale(config) / _embedding_scale(wider)
    table = _module(fused, path)
    table.weight = (table.weight * ratio).astype(table.weight.dtype)
    for name, norm in norms.items():
        factor = (hidden / now) ** 0.5  # the mean of squares is now over more channels
        if name == outer[0] and head is None:
            factor /= ratio  # the table is also the output layer
        norm.weight = ((norm.weight + _offset(norm)) * factor - _offset(norm)).astype(norm.weight.dtype)
    return norms[outer[0]]


def _offset(norm: Any) -> float:
    """1 where the norm multiplies by 1 + weight, as in the Gemmas."""
    return 1.0 if type(norm).__module__.startswith("mlx_lm.models.gemma") else 0.0


def _write_constant(
    fused: nn.Module, path: str, head: str | None, never: mx.array, config: dict[str, Any], wider: dict[str, Any]
) -> float:
    """Write the constant into every embedding, and make the new output rows read it. Returns its value.

    The last norm multiplies its first half by K and its second by -K (`_raise_constant`), from which a row (1, 1) reads
    0. Tied rows of new tokens are (0, sqrt 2), which has the same norm, and read -sqrt 2 K.
    """
    hidden, places = config["hidden_size"], wider["hidden_size"] - config["hidden_size"]
    squares = EPSILON_SHARE * hidden * config["rms_norm_eps"]
    constant = math.sqrt(squares / places) / _embedding_scale(wider)
    half = hidden + places // 2
    table = _module(fused, path).weight
    table[:, hidden:] = constant
    if head is None:
        table[never, hidden:half] = 0.0
        table[never, half:] = math.sqrt(2) * constant
    else:
        _module(fused, head).weight[never, half:] = constant
    return constant


def _margins(logits: mx.array, never: mx.array) -> mx.array:
    """By how many nats (B, L) the likeliest new token lies below all others together."""
    new = mx.max(logits[..., never], axis=-1)
    others = mx.put_along_axis(logits, mx.broadcast_to(never, (*logits.shape[:-1], len(never))), mx.array(-mx.inf), -1)
    return mx.logsumexp(others, axis=-1) - new


def _raise_constant(norm: Any, constant: float, places: int, margins: Callable[[], mx.array]) -> None:
    """Choose K of the last norm so that every margin, which is linear in K, is at least MARGIN."""
    weight = norm.weight
    signs = mx.array([0.0] * (len(weight) - places) + [1.0] * (places // 2) + [-1.0] * (places // 2))
    first = MARGIN / (constant**2 * places)
    norm.weight = weight - weight * mx.abs(signs)
    none = margins()
    norm.weight = (norm.weight + first * signs).astype(weight.dtype)
    slope = (margins() - none) / first
    needed = mx.max((MARGIN - none) / mx.maximum(slope, 1e-30))
    norm.weight = (weight - weight * mx.abs(signs) + needed * signs).astype(weight.dtype)


def _check(logits: mx.array, never: mx.array, expected: mx.array, tolerance: float, config: dict[str, Any]) -> None:
    """Raise UserError unless the new tokens are never sampled and the other logits are unchanged."""
    probability = mx.max(mx.softmax(logits, axis=-1)[..., never].sum(axis=-1)).item()
    if not probability < MOST_PROBABILITY:
        cap = config.get("final_logit_softcapping")
        why = f", since its logits are capped at {cap}" if cap else ""
        raise _refused(config, f"the new tokens would keep a probability of {probability:.2g}{why}")
    words = expected.shape[-1]
    difference = mx.max(mx.abs(logits[..., :words] - expected)).item() / mx.max(mx.abs(expected)).item()
    if not difference < tolerance:
        raise _refused(config, f"its logits would change by {difference:.2g} of the largest")
