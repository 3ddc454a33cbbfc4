"""The sizes of a model and of what is trained on it, from config.json alone: no weight is fetched, built or read.

    outline = outline_of(config_of("Qwen/Qwen3-0.6B", on_gpu=True), AdapterConfig())
    outline.weights, outline.trained      bytes of the base, number of trained weights

mlx is lazy: mlx-lm's own model, with the adapter on it, has shapes and precisions before anything is computed. So
numbers of weights are exact for every family. What a layer computes is read from the names that most families share.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten

from common.errors import UserError, opening
from models.adapter_config import AdapterConfig
from models.adapters import attach_adapter
from models.random_state import kept_random_state

SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "w2")


@dataclass(frozen=True)
class Adapted:
    """A linear layer that is trained, or has a LoRA. source: what those of one block with the same input share."""

    inputs: int
    outputs: int
    source: str


@dataclass(frozen=True)
class Outline:
    """A model's sizes: numbers, unless bytes are said."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    query_norms: bool  # whether queries and keys are normalised, as in Qwen3
    size: int  # bytes of a number of activations and of the KV cache
    base: int  # bytes of the base as it is stored
    weights: int  # and as it is trained on: with all weights, in float32
    table: int  # bytes of the output layer's table in float32, where it is trained; else 0
    kind: str  # fine-tune type
    rank: int
    dropout: bool
    quantized: bool
    trained: int  # weights
    matrices: int  # of those, weights in matrices, which Muon has one moment of
    largest: int  # weights of the largest trained array
    passed_layers: int  # layers that gradients pass through: from the lowest trained one on
    soft_tokens: int  # of a soft prompt
    adapted: tuple[Adapted, ...]  # in each of these layers


def outline_of(config: Mapping[str, Any], adapter: AdapterConfig | None = None) -> Outline:
    """The outline of the model that `config` (the content of a config.json) describes, with a new adapter on it.

    Raises UserError for a model that mlx-lm does not know, or whose config.json lacks a size; and as `attach_adapter`.
    """
    return _outline(json.dumps(config), None if adapter is None else json.dumps(vars(replace(adapter, provenance=[]))))


@functools.lru_cache(maxsize=64)  # a plan is made anew for every flag that might help
def _outline(config_json: str, adapter_json: str | None) -> Outline:
    """`outline_of`, of what it is given as JSON."""
    config = json.loads(config_json)
    adapter = None if adapter_json is None else AdapterConfig(**json.loads(adapter_json))
    sizes = _sizes(config)
    with kept_random_state():
        model = _lazy_model(config)
        base = _bytes(model)
        kind = "none" if adapter is None else adapter.fine_tune_type
        if adapter is not None:
            attach_adapter(model, adapter)
        else:
            model.freeze()
    trained = [array for _, array in tree_flatten(model.trainable_parameters())]
    layers = list(model.layers)
    lowest = next((i for i, layer in enumerate(layers) if tree_flatten(layer.trainable_parameters())), len(layers))
    size = 4 if kind == "full" else _size(config)
    return Outline(
        **sizes,
        query_norms=any(name.endswith("q_norm") for name, _ in layers[0].named_modules()),
        size=size,
        base=base,
        weights=_bytes(model) if kind == "full" else base,
        table=4 * sizes["vocabulary"] * sizes["hidden"] if kind == "full" else 0,
        kind=kind,
        rank=adapter.lora_parameters["rank"] if adapter is not None and kind in ("lora", "dora") else 0,
        dropout=bool(adapter is not None and adapter.lora_parameters["dropout"]),
        quantized=_quantization(config) is not None,
        trained=sum(array.size for array in trained),
        matrices=sum(array.size for array in trained if array.ndim > 1),
        largest=max((array.size for array in trained), default=0),
        passed_layers=len(layers) if kind == "soft_prompt" else len(layers) - lowest,
        soft_tokens=adapter.num_prompt_tokens if adapter is not None and kind == "soft_prompt" else 0,
        adapted=_adapted(layers[-1], kind),
    )


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """By the names that config.json has in most families, those of a model of text and pictures in its text part."""
    text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else config
    if missing := [name for name in SIZES if not isinstance(text.get(name), int)]:
        raise UserError(
            f"--plan needs {', '.join(missing)}, of which config.json says nothing: the family "
            f"{config.get('model_type')} is built in another way; leave --plan out, and watch the peak of a short run"
        )
    hidden, layers, intermediate, heads, vocabulary = (text[name] for name in SIZES)
    return {
        "hidden": hidden,
        "layers": layers,
        "intermediate": intermediate,
        "heads": heads,
        "kv_heads": text.get("num_key_value_heads") or heads,
        "head_dim": text.get("head_dim") or hidden // heads,
        "vocabulary": vocabulary,
    }


def _lazy_model(config: Mapping[str, Any]) -> nn.Module:
    """mlx-lm's model in the precision that the config says, none of whose weights is computed."""
    with opening("the model that config.json describes"):
        model_class, arguments = mlx_lm.utils._get_classes(config=dict(config))
        model = model_class(arguments.from_dict(dict(config)))
        model.set_dtype(getattr(mx, _precision(config)))
        if (quantization := _quantization(config)) is not None:
            shared = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}

            def quantized(path: str, module: nn.Module) -> bool | dict:
                if not hasattr(module, "to_quantized"):
                    return False
                own = quantization.get(path, shared)
                fits = isinstance(own, Mapping) and module.weight.shape[-1] % own["group_size"] == 0
                return dict(own) if fits else False

            nn.quantize(model, class_predicate=quantized, **shared)
    return model


def _quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Bits and group size of a quantized model, and what differs by module. Raises UserError for other kinds."""
    found = config.get("quantization") or config.get("quantization_config")
    if not found:
        return None
    if "bits" not in found:
        method = found.get("quant_method")
        raise UserError(f"--plan does not know the quantization {method!r}; name a model that mlx-lm quantized")
    return {"group_size": 64, **found}


def _precision(config: Mapping[str, Any]) -> str:
    text = config.get("text_config")
    named = [part.get(key) for part in (config, text or {}) for key in ("dtype", "torch_dtype")]
    return next((str(name).removeprefix("torch.") for name in named if name), "bfloat16")


def _size(config: Mapping[str, Any]) -> int:
    return 4 if _precision(config) == "float32" else 2


def _bytes(model: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def _adapted(block: nn.Module, kind: str) -> tuple[Adapted, ...]:
    """The linear layers of a block that are trained: those with a LoRA, or all."""
    found = []
    for name, module in block.named_modules():
        if kind == "full" and isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
        elif "lora_a" in module and "lora_b" in module:
            # mlx-lm's matrices lie the other way round in a layer of experts: (experts, rank, inputs).
            (a, b), of_experts = (module.lora_a.shape, module.lora_b.shape), module.lora_a.ndim == 3
            inputs, outputs = (a[2], b[1]) if of_experts else (a[0], b[1])
        else:
            continue
        parent, _, own = name.rpartition(".")
        source = name if own in OUTPUT_PROJECTIONS else parent
        found.append(Adapted(inputs, outputs, source))
    return tuple(found)
