"""Fusing a model with its adapter, and writing it as a folder that mlx_lm and transformers open.

python -m pytest tests/test_fuse.py tests/test_transformer_lab.py
"""

import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx.utils import tree_map_with_path

from common.errors import UserError
from models.adapters import fuse_adapter
from models.loading import LoadedModel
from models.value_head import ValueHead, save_value_head

MARKER = "config.json"


def check_free(folder: str | Path, again: bool = False) -> None:
    """Raise UserError if a model cannot be written to `folder`. again: an existing one may be replaced."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, where a model folder would be written; choose another name")
    if not again and ((folder / MARKER).exists() or any(folder.glob("model*.safetensors"))):
        raise UserError(f"{folder} already contains a model or a run; name another folder")


def fuse(loaded: LoadedModel, de_quantize: bool = False) -> None:
    """Fuse the adapter of `loaded` into its weights, in place, in the precision that the base was saved in.

    de_quantize: turn a quantized base into an unquantized one.
    """
    fuse_adapter(loaded.model, de_quantize)

    def as_saved(name: str, weight: mx.array) -> mx.array:
        dtype = loaded.dtypes.get(name, weight.dtype)
        return weight.astype(dtype) if mx.issubdtype(dtype, mx.floating) else weight

    # Full fine-tuning trains in float32.
    loaded.model.update(tree_map_with_path(as_saved, loaded.model.parameters()))
    if de_quantize:
        mlx_lm.utils.dequantize_model(loaded.model)
        loaded.config.pop("quantization", None)
        loaded.config.pop("quantization_config", None)


def write_model(folder: Path, loaded: LoadedModel, head: ValueHead | None = None, tokenizer: Any = None) -> None:
    """Write model, tokenizer and value head into `folder`. tokenizer: instead of the model's own."""
    loaded.config.pop("value_head", None)  # of a reward model that was the base
    if head is not None:
        loaded.config["value_head"] = save_value_head(folder, head)
    tokenizer = tokenizer or loaded.tokenizer
    mlx_lm.utils.save(folder, loaded.path, loaded.model, tokenizer, loaded.config, donate_model=False)


def save_fused(loaded: LoadedModel, folder: str | Path) -> None:
    """Fuse the adapter of `loaded`, in place, and write the model beside what `folder` holds, config.json last."""
    folder = Path(folder)
    fuse(loaded)
    temporary = folder / f".model.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_model(temporary, loaded)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == MARKER):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
