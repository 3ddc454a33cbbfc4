"""LoRA and DoRA adapters in peft's format, for MLX and PyTorch alike: names and settings.

    python fuse.py --adapter-file adapters --export-peft ./peft_adapters/        to peft
    python fuse.py --adapter-file ./peft_adapters/ --export-adapter ./adapters/  to mlx-lm's folder

A peft folder can also be used as an adapter directly (`models.adapter_config.find_adapter`). The two formats store the
matrices transposed to each other; peft multiplies by alpha / r (with rslora by alpha / sqrt r), mlx-lm by `scale`.
"""

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field

from common.errors import UserError
from common.files import Kind
from common.schemas import Schema, conforming

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight", ".m": ".lora_magnitude_vector"}
TRANSPOSED = (".lora_a", ".lora_b")
BLOCK = re.compile(r"^(?P<layers>.*\blayers)\.(?P<index>\d+)\.(?P<within>.+)$")
# peft settings that change what an adapter computes and have no counterpart in mlx-lm.
FOREIGN = ("alpha_pattern", "rank_pattern", "modules_to_save", "layer_replication", "lora_bias", "fan_in_fan_out",
           "target_parameters", "trainable_token_indices", "megatron_config", "alora_invocation_tokens")  # fmt: skip
BASE_CHANGING = ("pissa", "olora", "corda", "loftq")  # initialisations that change the base as well
# What `peft_settings` writes; peft's own files hold more.
SETTINGS = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
            "layers_to_transform", "use_dora", "bias", "inference_mode"}  # fmt: skip
PEFT = Kind("adapter_config.json", ("adapter_config.json", WEIGHTS_FILE), lambda content: set(content) == SETTINGS)


class Saved(Schema):
    """peft's adapter_config.json, as far as it is used; `our_settings` refuses what is in FOREIGN."""

    peft_type: str
    r: Annotated[int, Field(ge=1, le=2**16)]
    lora_alpha: float
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    base_model_name_or_path: str | None = None


def is_peft(description: Any) -> bool:
    """Whether an adapter_config.json was written by peft."""
    return isinstance(description, dict) and "peft_type" in description


def module_names(tensors: Iterable[str]) -> list[str]:
    """The modules adapted by tensors under our or peft's names, each once, sorted."""
    ours = (our_name(name) for name in tensors)
    return sorted({name.removesuffix(end) for name in ours for end in SUFFIXES if name.endswith(end)})


def our_name(name: str) -> str:
    """mlx-lm's name of a peft tensor; other names unchanged."""
    for ours, theirs in SUFFIXES.items():
        if name.startswith(PREFIX) and name.endswith(theirs):
            return name.removeprefix(PREFIX).removesuffix(theirs) + ours
    return name


def peft_name(name: str) -> str:
    """peft's name of a tensor. Raises UserError if there is none."""
    for ours, theirs in SUFFIXES.items():
        if name.endswith(ours):
            return PREFIX + name.removesuffix(ours) + theirs
    raise UserError(
        f"{name} is not a LoRA of a linear layer, which peft's format cannot represent; fuse the adapter instead"
    )


def our_settings(description: dict[str, Any], tensors: Iterable[str], source: object) -> dict[str, Any]:
    """The fields of AdapterConfig for a peft folder: every adapted module by its full name.

    tensors: the names in its file. Raises UserError for what mlx-lm does not support.
    """
    kind = description["peft_type"]
    if kind != "LORA":
        raise UserError(f"{source} is a peft adapter of type {kind!s:.60}; only LORA (DoRA included) is read")
    saved = conforming(Saved, description, source, "save it again")
    foreign = [name for name in FOREIGN if description.get(name)]
    foreign += ["bias"] if saved.bias != "none" else []
    start = description.get("init_lora_weights")
    foreign += ["init_lora_weights"] if isinstance(start, str) and start.startswith(BASE_CHANGING) else []
    if foreign:
        shown = ", ".join(f"{name} {description[name]!r}" for name in foreign)
        raise UserError(f"{source} sets {shown}, which mlx-lm's adapters do not have; merge it with peft instead")
    lora = {
        "rank": saved.r,
        "scale": saved.lora_alpha / (math.sqrt(saved.r) if saved.use_rslora else saved.r),
        "dropout": saved.lora_dropout,
        "keys": module_names(tensors),
    }
    return {
        "fine_tune_type": "dora" if saved.use_dora else "lora",
        "num_layers": -1,
        "lora_parameters": lora,
        "model": saved.base_model_name_or_path or "",
    }


def peft_settings(fine_tune_type: str, lora: dict[str, Any], model: str, tensors: Iterable[str]) -> dict[str, Any]:
    """peft's adapter_config.json for a LoRA or DoRA with these `tensors`, on the base `model`."""
    modules = module_names(tensors)
    found = [BLOCK.match(name) for name in modules]
    blocks: dict[int, set[str]] = {}
    for match in found:
        if match:
            blocks.setdefault(int(match["index"]), set()).add(match["within"])
    targets: dict[str, Any] = {"target_modules": modules, "layers_to_transform": None}
    if all(found) and len({frozenset(within) for within in blocks.values()}) == 1:
        targets = {"target_modules": sorted(next(iter(blocks.values()))), "layers_to_transform": sorted(blocks)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": lora["rank"],
        "lora_alpha": lora["scale"] * lora["rank"],
        "lora_dropout": lora.get("dropout", 0.0),
        **targets,
        "use_dora": fine_tune_type == "dora",
        "bias": "none",
        "inference_mode": True,
    }
