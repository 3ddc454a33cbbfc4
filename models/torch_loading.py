"""Opening a model by name in PyTorch: an embedded one, a local folder, a GGUF file, or a Hugging Face name.

The twin of models.loading, over transformers. Never imports mlx: a tiny model is found or built by a process of its
own. Not here: adapters (see models.torch_adapters) and value heads (see models.torch_value_head).
"""

import copy
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from common.errors import UserError, opening
from common.locate import locate
from data.batching import check_eos
from models.folders import model_folder
from models.gguf_folder import gguf_folder, is_gguf
from models.smollm2 import FOUR_BIT, NAME, SMOLLM2_NAMES, smollm2_folder
from models.torch_arrays import check_finite

logging.set_verbosity_error()  # what it warns of, such as missing weights, is checked here
logging.disable_progress_bar()


@dataclass
class LoadedModel:
    """A model as opened by transformers, in eval mode and frozen."""

    model: nn.Module
    tokenizer: Any
    name: str

    @property
    def own_eos(self) -> Any:
        """The token, or list of tokens, by which the model's configuration ends a completion; None if it names none."""
        return getattr(getattr(self.model, "generation_config", None) or self.model.config, "eos_token_id", None)

    @property
    def eos_token_ids(self) -> set[int]:
        """All tokens that end a completion: the tokenizer's and those of the model's configuration."""
        named = self.own_eos
        ids = set(named if isinstance(named, list) else [named]) | {self.tokenizer.eos_token_id}
        return ids - {None}


def choose_device(name: str) -> torch.device:
    """The device named by `--device`; auto: CUDA, else MPS, else CPU. Raises UserError if it is not available."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    if not there[name]:
        raise UserError(f"--device is {name}, which is not available here; use cpu, or omit it")
    return torch.device(name)


def memory_meter(device: torch.device) -> Callable[[], float]:
    """A function that returns the most bytes taken at once since now: on CUDA those of tensors, else of the process.

    What torch has on MPS belongs to the process as well, but has no counter of its own for the most.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return lambda: float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def describe_device(device: torch.device) -> str:
    """A device as a run's first line names it."""
    if device.type == "cuda":
        return f"the GPU ({torch.cuda.get_device_name(device)})"
    return {"cpu": "the CPU", "mps": "the GPU (MPS)"}.get(device.type, str(device))


def resolve(name: str) -> Path:
    """The local folder of a model: found or built (tiny models), as it is (folders), converted (GGUF files, smollm2-*),
    or downloaded (hub names).

    Raises UserError if there is neither such a folder nor such a model on the hub, or no network.
    """
    if name.startswith("tiny-") and not Path(name).exists():
        return locate(name)
    dtype = "bfloat16" if torch.cuda.is_available() or torch.backends.mps.is_available() else "float32"
    if name == FOUR_BIT:
        raise UserError(f"{FOUR_BIT} is for MLX, whose 4 bits PyTorch cannot read; use {NAME}")
    if name in SMOLLM2_NAMES:
        return smollm2_folder(name, dtype)
    if is_gguf(name):
        return gguf_folder(name, dtype)
    return model_folder(name)


def weight_dtype(device: torch.device) -> Any:
    """What frozen weights are held in: on a GPU as they were saved, on CPU, which is slow at less, float32.

    Adapters, value heads and log probabilities are float32 everywhere.
    """
    return torch.float32 if device.type == "cpu" else "auto"


def load(name: str, device: torch.device, tokenizer: str | None = None, classifier: bool = False) -> LoadedModel:
    """Open the model `name` (see `resolve`) on `device`, and the tokenizer of the same or another name.

    classifier: open a model with one score instead of a vocabulary. Weights are float32; on a GPU they keep their saved
    precision. Raises UserError if the model is missing or cannot be opened.
    """
    path = resolve(name)
    tokenizer_path = resolve(tokenizer) if tokenizer else path
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    dtype = weight_dtype(device)
    with opening(name):
        model, report = auto.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    with opening(f"the tokenizer of {tokenizer or name}"):
        opened = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=False)
    _check_whole(name, report)
    check_finite(name, dict(model.named_parameters()), "check that it is complete")
    rows, loaded = model.get_input_embeddings().weight.shape[0], LoadedModel(model, opened, name)
    check_eos(opened, tokenizer or name, {"eos_token_id": loaded.own_eos, "vocab_size": rows})
    if tokenizer and len(opened) > rows:
        raise UserError(f"--tokenizer {tokenizer} has {len(opened)} tokens, {name} only {rows}; use the model's own")
    model.to(device).eval().requires_grad_(False)
    return loaded


def _check_whole(name: str, report: dict[str, Any]) -> None:
    """Raise UserError if the folder lacks weights, which transformers would initialise at random."""
    absent = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if absent:
        raise UserError(
            f"{name} lacks {len(absent)} of the model's tensors, or has them in another shape "
            f"({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}); check that it is complete"
        )


def twin(model: nn.Module) -> nn.Module:
    """A second module tree over the same frozen weights; trainable weights are copied.

    It can serve as the reference policy, or carry another adapter on the same base.
    """
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(frozen, model.buffers())}
    return copy.deepcopy(model, shared).requires_grad_(False)
