"""Fusing a model with its adapter, and writing it as a folder that mlx_lm and transformers open.

python -m pytest tests/test_fuse.py tests/test_fused_model.py
"""

import os
from pathlib import Path
from typing import Any

import mlx_lm.utils

from common.errors import UserError
from common.files import temporary_beside
from models.export.fusing import fuse, fuse_measured
from models.export.measuring_rows import measuring_rows
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


def write_model(folder: Path, loaded: LoadedModel, head: ValueHead | None = None, tokenizer: Any = None) -> None:
    """Write model, tokenizer and value head into `folder`. tokenizer: instead of the model's own."""
    loaded.config.pop("value_head", None)  # of a reward model that was the base
    if head is not None:
        loaded.config["value_head"] = save_value_head(folder, head)
    tokenizer = tokenizer or loaded.tokenizer
    mlx_lm.utils.save(folder, loaded.path, loaded.model, tokenizer, loaded.config, donate_model=False)


def save_fused(loaded: LoadedModel, folder: str | Path) -> None:
    """Fuse the adapter of `loaded`, in place, and write the model beside what `folder` holds, config.json last.

    A quantized base gets more bits where it needs them (models.export.fusing), which is said.
    """
    folder = Path(folder)
    if "quantization" in loaded.config:
        report = fuse_measured(loaded, measuring_rows(loaded.model, loaded.tokenizer, []))
        print("\n".join(report.lines()))
    else:
        fuse(loaded)
    with temporary_beside(folder / "model") as temporary:
        temporary.mkdir()
        write_model(temporary, loaded)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == MARKER):
            os.replace(file, folder / file.name)
