"""Adapters in PyTorch: LoRA and DoRA by peft, soft prompts, full fine-tuning; in the file formats of models.adapters.

The twin of models.adapters: each reads the other's folders wherever transformers and mlx-lm name layers alike (Llama
and similar families). Names and layouts on disk are mlx-lm's; peft folders are read, too. Not here: fusing (see
fuse.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

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
from models.torch_arrays import read_arrays
from models.torch_soft_prompt import add_soft_prompt
from models.torch_value_head import ValueHead, head_from, hidden_size, load_value_head, save_value_head

# peft's names → mlx-lm's; the two store LoRA matrices transposed to each other.
PEFT_NAMES = {
    ".lora_A.default.weight": ".lora_a",
    ".lora_B.default.weight": ".lora_b",
    ".lora_magnitude_vector.default.weight": ".m",
}


def attach_adapter(model: nn.Module, config: AdapterConfig, seed: int = 0) -> None:
    """Freeze `model` and attach a fresh adapter, which alone is trainable, in float32.

    A fresh LoRA or DoRA changes neither the model's output nor its mode. "full" gives the model its own copy of the
    weights, so that a `twin` does not change with it. Raises UserError if no layer matches the keys.
    """
    torch.manual_seed(seed)
    model.requires_grad_(False)
    if config.fine_tune_type in ("lora", "dora"):
        _add_lora(model, config)
    elif config.fine_tune_type == "full":
        _own_weights(model)
    elif config.fine_tune_type == "soft_prompt":
        add_soft_prompt(model, config.num_prompt_tokens, seed)
    model.train(model.training)  # new layers are created in training mode; dropout must be off in an eval model


def _add_lora(model: nn.Module, config: AdapterConfig) -> None:
    if any(name.endswith(tuple(PEFT_NAMES)) for name, _ in model.named_parameters()):
        raise ValueError("the model already has a LoRA; a second one would be nested in it")
    config.check_lora()
    settings = config.lora_parameters
    names = list(_lora_layers(model, config))
    if not names:
        raise UserError(f"no layer matches the LoRA keys {settings.get('keys')}; see `model.layers`")
    lora = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["scale"] * settings["rank"],  # peft multiplies by alpha / rank
        lora_dropout=settings.get("dropout", 0.0),
        target_modules=names,
        use_dora=config.fine_tune_type == "dora",
    )
    inject_adapter_in_model(lora, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _lora_layers(model: Any, config: AdapterConfig) -> Iterator[str]:
    """Names of the layers that mlx-lm's `linear_to_lora_layers` would adapt: the linear layers of the last blocks, or
    those whose name within a block or within the model is among the keys."""
    keys = config.lora_parameters.get("keys")
    blocks = getattr(model.base_model, "layers", None)
    if blocks is None:
        raise UserError(f"{type(model).__name__} has no `layers` to attach a LoRA to; use --fine-tune-type full")
    start = len(blocks) - config.num_layers if 0 < config.num_layers < len(blocks) else 0
    of_blocks = {module: name for block in blocks[start:] for name, module in block.named_modules()}
    for name, module in model.named_modules():
        within_block = of_blocks.get(module)
        chosen = within_block is not None if keys is None else {name, within_block} & set(keys)
        if chosen and isinstance(module, nn.Linear):
            yield name
        elif chosen and keys is not None:
            raise UserError(
                f"the LoRA key {name} names a {type(module).__name__}; in PyTorch it must be a linear layer"
            )


def _own_weights(model: nn.Module) -> None:
    """Replace every weight by a trainable float32 copy, since in-place updates must not reach a twin's weights."""
    own = {id(old): nn.Parameter(old.detach().float().clone()) for old in model.parameters()}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            setattr(module, name, own[id(old)])  # keeps tied weights tied


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights under mlx-lm's names and in its layout: the content of an adapter file."""
    return {mlx_name(name): mlx_layout(name, weight) for name, weight in _trainable(model)}


def _trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, weight.data) for name, weight in model.named_parameters() if weight.requires_grad)


def mlx_name(name: str) -> str:
    """mlx-lm's name of a weight."""
    for ours, theirs in PEFT_NAMES.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def mlx_layout(name: str, weight: Tensor) -> Tensor:
    """A LoRA matrix transposed, anything else unchanged. Its own inverse."""
    return weight.T if ".lora_A." in name or ".lora_B." in name else weight


def save_adapter(path: str | Path, model: nn.Module, config: AdapterConfig, head: ValueHead | None = None) -> None:
    """Write the trainable weights of `model` with their configuration, atomically replacing what `path` held.

    path: a folder, or a file ending in .npz or .safetensors.
    """
    path = Path(path)
    description = dict(vars(config))
    weights = {name: weight.contiguous() for name, weight in adapter_weights(model).items()}
    if path.suffix not in SINGLE_FILE_SUFFIXES:
        with atomic_folder(path, ADAPTER) as folder:
            save_file(weights, folder / WEIGHTS_FILE)
            if head is not None:
                description["value_head"] = save_value_head(folder, head)
            write_json(folder / CONFIG_FILE, description)
        return
    if head is not None:
        weights = {**weights, "value_head.weight": head.weight.detach()}

    def write(temporary: Path) -> None:
        if path.suffix == ".npz":
            np.savez(temporary, **{name: weight.numpy(force=True) for name, weight in weights.items()})
        else:
            save_file(weights, temporary)

    write_single(path, description, write)


@dataclass
class SavedAdapter:
    """An adapter read from disk: its configuration, its weights by name, and its value head, if any."""

    path: Path
    config: AdapterConfig
    weights: dict[str, Tensor]
    value_head: ValueHead | None


def read_adapter(path: str | Path) -> SavedAdapter:
    """Read an adapter in any form. Raises UserError if a part is missing or malformed."""
    files = find_adapter(path)
    weights = read_arrays(files.weights, REMEDY)
    if files.peft:
        named = {peft_format.our_name(name): weight.float() for name, weight in weights.items()}
        turned = peft_format.TRANSPOSED
        weights = {name: weight.T if name.endswith(turned) else weight for name, weight in named.items()}
    if not files.single:
        return SavedAdapter(files.path, files.config, weights, load_value_head(files.path))
    head = weights.pop("value_head.weight", None)
    return SavedAdapter(files.path, files.config, weights, None if head is None else head_from(path, {"weight": head}))


def load_adapter(model: nn.Module, path: str | Path) -> SavedAdapter:
    """Attach a saved adapter to its base `model`: first the layers, then the weights, strictly.

    Raises a UserError that lists every missing or unknown tensor and every shape mismatch, and one for a value head of
    another width.
    """
    saved = read_adapter(path)
    attach_adapter(model, saved.config)
    set_adapter_weights(model, saved.weights, saved.path)
    if saved.value_head is not None:
        check_head_width(path, saved.value_head.weight.shape[1], hidden_size(model))
    return saved


def set_adapter_weights(model: nn.Module, weights: dict[str, Tensor], source: object = "the adapter") -> None:
    """Replace the trainable weights of `model`. weights: by mlx-lm's names. Raises UserError, listing all differences,
    unless names and shapes are the same."""
    check_fit(adapter_weights(model), weights, source)
    for name, weight in _trainable(model):
        weight.copy_(mlx_layout(name, weights[mlx_name(name)]))
