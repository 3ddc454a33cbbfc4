"""Adapters on disk, for MLX and PyTorch alike: their configuration, their files, and whether they fit a model.

A peft folder is described like one of ours (models.peft_format). Imports neither framework, so that each reads what the
other wrote. Not here: the weights (see models.adapters and models.torch_adapters).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from safetensors import safe_open

from common.errors import UserError
from common.files import Kind, atomic_file, check_file, check_replaceable, expanded, reading, restore_old, write_json
from common.schemas import Schema, conforming, read_as
from models import peft_format

WEIGHT_TYPES = ("lora", "dora", "full")  # what --fine-tune-type offers
FINE_TUNE_TYPES = (*WEIGHT_TYPES, "soft_prompt", "none")
CONFIG_FILE = "adapter_config.json"
SINGLE_FILE_SUFFIXES = (".npz", ".safetensors")
HEAD_FILE = "value_head.safetensors"
WEIGHTS_FILE = "adapters.safetensors"
CHECKSUM = "weights_sha256"  # of a single file, in its .json
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


REMEDY = "train it again"
Rank = Annotated[int, Field(ge=1, le=2**16)]


class SavedLora(Schema):
    """lora_parameters in an adapter_config.json."""

    rank: Rank
    scale: float
    dropout: Annotated[float, Field(ge=0, lt=1)]
    keys: list[str] | None = None


class SavedRun(Schema):
    """An entry of provenance (training.metrics.provenance)."""

    script: str
    flags: dict[str, Any]
    figures: dict[str, int | float | None]  # a count stays one


class SavedConfig(Schema):
    """adapter_config.json, by mlx-lm or by us: the fields of AdapterConfig, and others."""

    fine_tune_type: Literal[FINE_TUNE_TYPES] = "lora"  # type: ignore[valid-type]
    num_layers: Annotated[int, Field(ge=-1, le=2**16)] = 16
    lora_parameters: SavedLora | None = None
    num_prompt_tokens: Rank = 32
    model: str = ""
    provenance: list[SavedRun] = Field(default_factory=list)


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


def write_single(path: Path, description: dict[str, Any], write: Callable[[Path], object]) -> None:
    """Write an adapter's single file by `write`, and its .json with that file's checksum, so that a kill between the
    two is noticed."""
    check_adapter_path(path)
    # Both are written before either is renamed.
    with atomic_file(path) as temporary, atomic_file(path.with_suffix(".json")) as described:
        write(temporary)
        write_json(described, {**description, CHECKSUM: checksum_of(temporary)})


def checksum_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_adapter(path: str | Path) -> AdapterFiles:
    """The files of an adapter: an mlx-lm folder, a peft folder, or a single file.

    Raises UserError if one is missing or malformed.
    """
    path = expanded(path)
    restore_old(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; name an adapter folder, or an .npz or .safetensors file")
    single = path.suffix in SINGLE_FILE_SUFFIXES
    described = path.with_suffix(".json") if single else path / CONFIG_FILE
    description = read_as(dict[str, Any], described, REMEDY)
    peft = peft_format.is_peft(description)
    weights = path if single else path / (peft_format.WEIGHTS_FILE if peft else WEIGHTS_FILE)
    if not weights.is_file():
        raise UserError(f"{weights} does not exist, so {path} is an incomplete adapter; train it again")
    if peft:
        return AdapterFiles(path, _read_peft(description, described, weights), weights, single=False, peft=True)
    if single and description.get(CHECKSUM, checksum := checksum_of(weights)) != checksum:
        raise UserError(
            f"{path} cannot be read: its checksum is not the one in {described} (it is damaged, or a kill came between "
            "writing the two); resume the run that wrote it, or train it again"
        )
    return AdapterFiles(path, _read_config(description, described), weights, single)


def _read_config(description: dict[str, Any], path: Path) -> AdapterConfig:
    saved = conforming(SavedConfig, description, path, REMEDY).model_dump(exclude_none=True)
    return AdapterConfig(**{key: saved[key] for key in AdapterConfig.__dataclass_fields__ if key in saved})


def _read_peft(description: dict[str, Any], path: Path, weights: Path) -> AdapterConfig:
    with reading(weights, "save it again"), safe_open(weights, framework="numpy") as file:
        names = list(file.keys())
    return AdapterConfig(**peft_format.our_settings(description, names, path))


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


def check_head(path: object, weights: Mapping[str, Any]) -> None:
    """Raise UserError unless these are the tensors of a value head: one, "weight", of shape (1, H)."""
    if list(weights) != ["weight"]:
        raise UserError(f"{path} holds {sorted(weights)}, not one tensor 'weight'; train the reward model again")
    shape = tuple(weights["weight"].shape)
    if len(shape) != 2 or shape[0] != 1:
        raise UserError(f"{path} has a value head of shape {shape}, which must be (1, H); train the reward model again")


def refuse_arrays(source: object, names: Iterable[str], what: str, remedy: str) -> None:
    """Raise UserError if there are such names: `source` has `what` in them."""
    if found := sorted(names):
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(f"{source} has {what} in {found[0]}{others}; {remedy}")
