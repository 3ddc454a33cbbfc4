"""Adapters on disk, for MLX and PyTorch alike: their configuration, their files, and whether they fit a model.

A peft folder is described like one of ours (models.peft_format). Imports neither framework, so that each reads what the
other wrote. Not here: the weights (see models.adapters and models.torch_adapters).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.files import Kind, check_file, check_replaceable, expanded, read_json
from models import peft_format

WEIGHT_TYPES = ("lora", "dora", "full")  # what --fine-tune-type offers
FINE_TUNE_TYPES = (*WEIGHT_TYPES, "soft_prompt", "none")
CONFIG_FILE = "adapter_config.json"
SINGLE_FILE_SUFFIXES = (".npz", ".safetensors")
HEAD_FILE = "value_head.safetensors"
WEIGHTS_FILE = "adapters.safetensors"
# mlx-lm's and peft's own adapters have a configuration of that name, too.
ADAPTER = Kind(CONFIG_FILE, (CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE), lambda content: "provenance" in content)


@dataclass
class AdapterConfig:
    """All that is needed to attach an adapter to its base; saved as `adapter_config.json` (mlx-lm's names)."""

    fine_tune_type: str = "lora"
    num_layers: int = 16
    lora_parameters: dict[str, Any] = field(default_factory=lambda: {"rank": 8, "scale": 10.0, "dropout": 0.0})
    num_prompt_tokens: int = 32
    model: str = ""
    provenance: list[dict[str, Any]] = field(default_factory=list)  # the runs that produced it (training.metrics)

    def __post_init__(self):
        if self.fine_tune_type not in FINE_TUNE_TYPES:
            known = ", ".join(FINE_TUNE_TYPES)
            raise UserError(f"fine_tune_type {self.fine_tune_type!r} is unknown; use one of {known}")

    def check_lora(self) -> None:
        """Raise UserError for a LoRA or DoRA without layers or without rank."""
        if self.num_layers == 0 or self.num_layers < -1:
            given = self.num_layers
            raise UserError(f"--lora-layers is {given}; give the number of last layers to adapt, or -1 for all")
        if self.lora_parameters["rank"] < 1:
            raise UserError(f"LoRA rank is {self.lora_parameters['rank']}; it must be at least 1")


class AdapterFiles(NamedTuple):
    """The files of an adapter. single: one file holds the weights and, if there is one, the value head.

    peft: the tensors have peft's names and layout.
    """

    path: Path
    config: AdapterConfig
    weights: Path
    single: bool
    peft: bool = False


def check_adapter_path(path: str | Path) -> None:
    """Raise UserError unless an adapter can be written to `path`, in place of one of ours or of nothing.

    path: a folder, or a file ending in .npz or .safetensors.
    """
    path = expanded(path)
    if path.suffix not in SINGLE_FILE_SUFFIXES:
        check_replaceable(path, ADAPTER)
        return
    description = path.with_suffix(".json")
    check_file(path)
    check_file(description)
    if (path.exists() or description.exists()) and not ADAPTER._replace(marker=description.name).is_at(path.parent):
        found = path if path.exists() else description
        raise UserError(f"{found} is not of an adapter of ours (by {description.name}); choose another name")


def find_adapter(path: str | Path) -> AdapterFiles:
    """The files of an adapter: an mlx-lm folder, a peft folder, or a single file.

    Raises UserError if one is missing or malformed.
    """
    path = expanded(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; name an adapter folder, or an .npz or .safetensors file")
    single = path.suffix in SINGLE_FILE_SUFFIXES
    description = read_json(path.with_suffix(".json") if single else path / CONFIG_FILE)
    peft = peft_format.is_peft(description)
    weights = path if single else path / (peft_format.WEIGHTS_FILE if peft else WEIGHTS_FILE)
    if not weights.is_file():
        raise UserError(f"{weights} does not exist, so {path} is an incomplete adapter; train it again")
    if peft:
        return AdapterFiles(path, _read_peft(description, weights), weights, single=False, peft=True)
    return AdapterFiles(path, _read_config(description, path), weights, single)


def _read_config(description: Any, path: Path) -> AdapterConfig:
    if not isinstance(description, dict):
        raise UserError(f"{path} has JSON that is not a description of an adapter; train it again")
    known = {key: description[key] for key in AdapterConfig.__dataclass_fields__ if key in description}
    config = AdapterConfig(**known)
    lora = config.lora_parameters
    if not isinstance(lora, dict) or not {"rank", "scale", "dropout"} <= lora.keys():
        raise UserError(f"{path} has the lora_parameters {lora!r}; they must contain rank, scale and dropout")
    return config


def _read_peft(description: dict[str, Any], weights: Path) -> AdapterConfig:
    try:
        with safe_open(weights, framework="numpy") as file:
            names = list(file.keys())
        return AdapterConfig(**peft_format.our_settings(description, names, weights.parent))
    except (KeyError, SafetensorError) as error:
        raise UserError(f"{weights.parent} is an incomplete peft adapter ({error}); save it again") from None


def check_fit(expected: Mapping[str, Any], given: Mapping[str, Any], source: object) -> None:
    """Raise UserError, listing every tensor that differs, unless `given` has the names and shapes of `expected`."""
    faults = [f"{name} is missing" for name in expected.keys() - given.keys()]
    faults += [f"{name} is unknown" for name in given.keys() - expected.keys()]
    faults += [
        f"{name} is {tuple(given[name].shape)}, the model has {tuple(expected[name].shape)}"
        for name in expected.keys() & given.keys()
        if tuple(given[name].shape) != tuple(expected[name].shape)
    ]
    if faults:
        raise UserError(
            f"{source} does not fit this model ({len(faults)} tensors): {'; '.join(sorted(faults))}; "
            "use the base model that it was trained on"
        )


def check_head_width(source: object, width: int, expected: int) -> None:
    """Raise UserError if a value head is not as wide as the model's hidden states."""
    if width != expected:
        raise UserError(
            f"{source} has a value head of width {width}, the model has {expected}; "
            "use the base model that it was trained on"
        )
