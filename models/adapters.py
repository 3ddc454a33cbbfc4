"""Adapters: attaching, saving, loading and fusing them.

An adapter has one of four fine-tune types: "lora", "dora", "full" (every weight) or "soft_prompt"; "none" is a reward
model of which only the value head is trained. On disk it is mlx-lm's folder (`adapters.safetensors` and
`adapter_config.json`, which `mlx_lm.generate --adapter-path` opens) or, if the path ends in `.npz` or `.safetensors`,
that one file with a `.json` beside it. In a folder, a value head has a file of its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from common.errors import UserError
from common.files import atomic_folder, write_json
from models import peft_format
from models.adapter_config import (
    ADAPTER,
    CONFIG_FILE,
    REMEDY,
    SINGLE_FILE_SUFFIXES,
    WEIGHTS_FILE,
    AdapterConfig,
    check_fit,
    check_head_width,
    find_adapter,
    write_single,
)
from models.arrays import read_arrays
from models.random_state import kept_random_state
from models.soft_prompt import add_soft_prompt
from models.value_head import ValueHead, head_from, hidden_size, load_value_head, save_value_head


def attach_adapter(model: nn.Module, config: AdapterConfig, seed: int = 0) -> None:
    """Freeze `model` and attach a fresh adapter, which alone is trainable.

    seed: mlx's global random stream, from which new LoRA layers draw, is seeded with it. Trained weights are float32,
    whatever the base's precision. A fresh LoRA or DoRA does not change the output, and no type changes the mode.
    Raises UserError if no layer matches the keys or mlx-lm cannot train the model this way.
    """
    mx.random.seed(seed)
    try:
        model.freeze()
    except AttributeError as error:  # mlx-lm 0.32's recurrent_gemma does not initialise its base class
        raise UserError(f"{type(model).__module__} cannot be trained ({error}); use another model") from None
    if config.fine_tune_type in ("lora", "dora"):
        use_dora = config.fine_tune_type == "dora"
        _check_lora(model, config)
        # The new layers' own weights are created unfrozen; the weights they wrap stay frozen.
        try:
            linear_to_lora_layers(model, config.num_layers, config.lora_parameters, use_dora=use_dora)
        except ValueError as error:  # DoRA of a layer of experts
            raise UserError(
                f"mlx-lm does not support {config.fine_tune_type} here ({error}); use --fine-tune-type lora"
            ) from None
        if not tree_flatten(model.trainable_parameters()):
            raise UserError(f"no layer matches the LoRA keys {config.lora_parameters.get('keys')}; see `model.layers`")
    elif config.fine_tune_type == "full":
        if any(isinstance(module, nn.QuantizedLinear) for module in model.modules()):
            raise UserError("a quantized model cannot be trained in full; use LoRA, or fuse.py --de-quantize first")
        model.set_dtype(mx.float32)  # in bfloat16 most updates would be rounded away
        model.unfreeze()
    elif config.fine_tune_type == "soft_prompt":
        add_soft_prompt(model, config.num_prompt_tokens, seed)
        model.unfreeze(keys="soft_prompt")
    # New layers are created in training mode, so dropout would be active in a model in eval mode.
    model.train(model.training)


def _check_lora(model: nn.Module, config: AdapterConfig) -> None:
    if any(name.endswith(".lora_a") for name, _ in tree_flatten(model.parameters())):
        raise ValueError("the model already has a LoRA; a second one would be nested in it")
    config.check_lora()
    quantized = [module.bits for module in model.modules() if isinstance(module, nn.QuantizedLinear)]
    odd = [bits for bits in quantized if 32 % bits]
    if config.fine_tune_type == "dora" and odd:
        raise UserError(f"mlx-lm supports DoRA on bases of 4 or 8 bits, not of {odd[0]}; use --fine-tune-type lora")


def turn_dropout_off(model: nn.Module) -> None:
    """Remove the dropout of every adapter, since PPO must train the policy that sampled."""
    layers = [(name, nn.Dropout(0.0)) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    model.update_modules(tree_unflatten(layers))
    model.train(model.training)


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The trainable weights by name: the content of an adapter file."""
    return dict(tree_flatten(model.trainable_parameters()))


def save_adapter(path: str | Path, model: nn.Module, config: AdapterConfig, head: ValueHead | None = None) -> None:
    """Write the trainable weights of `model` with their configuration, atomically replacing what `path` held.

    path: a folder, or a file ending in .npz or .safetensors.
    """
    write_adapter(path, adapter_weights(model), config, head)


def write_adapter(
    path: str | Path, weights: dict[str, mx.array], config: AdapterConfig, head: ValueHead | None = None
) -> None:
    """Write an adapter with these weights, as `save_adapter` does."""
    path = Path(path)
    description = dict(vars(config))
    if path.suffix not in SINGLE_FILE_SUFFIXES:
        with atomic_folder(path, ADAPTER) as folder:
            mx.save_safetensors(str(folder / WEIGHTS_FILE), weights)
            if head is not None:
                description["value_head"] = save_value_head(folder, head)
            write_json(folder / CONFIG_FILE, description)
        return
    if head is not None:
        weights = {**weights, "value_head.weight": head.weight}

    def write(temporary: Path) -> None:
        if path.suffix == ".npz":
            # Not mx.savez, which passes over a full disk without a word.
            arrays: dict[str, Any] = {name: np.array(weight) for name, weight in weights.items()}
            np.savez(temporary, **arrays)
        else:
            mx.save_safetensors(str(temporary), weights)

    write_single(path, description, write)


@dataclass
class SavedAdapter:
    """An adapter read from disk: its configuration, its weights by name, and its value head, if any."""

    path: Path
    config: AdapterConfig
    weights: dict[str, mx.array]
    value_head: ValueHead | None


def read_adapter(path: str | Path) -> SavedAdapter:
    """Read an adapter in any form. Raises UserError if a part is missing or malformed."""
    files = find_adapter(path)
    weights = read_arrays(files.weights, REMEDY)
    if files.peft:
        named = {peft_format.our_name(name): weight.astype(mx.float32) for name, weight in weights.items()}
        weights = {name: _turned(name, weight) for name, weight in named.items()}
    return SavedAdapter(files.path, files.config, weights, _value_head(files.path, weights, files.single))


def _turned(name: str, weight: mx.array) -> mx.array:
    """A LoRA matrix transposed, as peft stores it; anything else unchanged. Its own inverse."""
    return mx.contiguous(weight.T) if name.endswith(peft_format.TRANSPOSED) else weight


def write_peft(path: str | Path, saved: SavedAdapter, model: str) -> None:
    """Write a LoRA or DoRA as a peft folder, on the base that peft knows as `model`.

    Raises UserError for other adapters, and for layers that are not linear layers in peft.
    """
    kind = saved.config.fine_tune_type
    if kind not in ("lora", "dora"):
        raise UserError(f"{saved.path} is of type {kind}, which peft's format cannot represent; fuse it instead")
    if saved.value_head is not None:
        raise UserError(f"{saved.path} is a reward model, which peft's format cannot represent; fuse it instead")
    weights = {peft_format.peft_name(name): _turned(name, weight) for name, weight in saved.weights.items()}
    if any(weight.ndim > 2 for weight in weights.values()):
        raise UserError(
            f"{saved.path} adapts mixture-of-experts layers, which peft represents differently; fuse it instead"
        )
    with atomic_folder(path, peft_format.PEFT) as folder:
        mx.save_safetensors(str(folder / peft_format.WEIGHTS_FILE), weights, metadata={"format": "pt"})
        description = peft_format.peft_settings(kind, saved.config.lora_parameters, model, saved.weights)
        write_json(folder / CONFIG_FILE, description)


def _value_head(path: Path, weights: dict[str, mx.array], single: bool) -> ValueHead | None:
    if not single:
        return load_value_head(path)
    weight = weights.pop("value_head.weight", None)
    return None if weight is None else head_from(path, {"weight": weight})


def load_adapter(model: nn.Module, path: str | Path) -> SavedAdapter:
    """Attach a saved adapter to its base `model`: first the layers, then the weights, strictly.

    mlx's global random stream is left as it was. Raises a UserError that lists every missing or
    unknown tensor and every shape mismatch, and one for a value head of another width.
    """
    with kept_random_state():
        saved = read_adapter(path)
        attach_adapter(model, saved.config)
    set_adapter_weights(model, saved.weights, saved.path)
    if saved.value_head is not None:
        check_head_width(path, saved.value_head.weight.shape[1], hidden_size(model))
    return saved


def set_adapter_weights(model: nn.Module, weights: dict[str, mx.array], source: object = "the adapter") -> None:
    """Replace the trainable weights of `model`. Raises UserError, listing all differences, unless names and shapes
    are the same."""
    check_fit(adapter_weights(model), weights, source)
    model.update(tree_unflatten(list(weights.items())))


def fuse_adapter(model: nn.Module, de_quantize: bool = False) -> None:
    """Fuse every LoRA and DoRA layer into the weights it wraps, at the scale it was trained with."""
    fused = [(name, _fused(module, de_quantize)) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))


def _fused(module: nn.Module, de_quantize: bool) -> nn.Module:
    """The fused layer, in the precision of its base: mlx-lm's DoRA would turn bfloat16 into float32."""
    fused = module.fuse(dequantize=de_quantize)
    fused.set_dtype(precision(wrapped(module)))
    return fused


def wrapped(module: nn.Module) -> nn.Module:
    """The base's own layer in a LoRA or DoRA layer."""
    return module["linear"] if "linear" in module else module["embedding"]


def precision(layer: nn.Module) -> mx.Dtype:
    """What a layer computes in; of scales that are no floating-point numbers (mxfp4 and its like), mlx's bfloat16."""
    dtype = layer["scales" if "scales" in layer else "weight"].dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16
