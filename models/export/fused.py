"""Leaving a trained model in a folder that stands alone, beside what else lies there.

python -m pytest tests/test_transformer_lab.py
"""

import os
import shutil
from pathlib import Path

import mlx_lm.utils

from common.errors import UserError
from models.adapters import fuse_adapter
from models.loading import LoadedModel

MARKER = "config.json"


def check_free(folder: str | Path, again: bool = False) -> None:
    """Raise UserError if a model cannot be put into `folder`. again: one that is there already is to be replaced."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but a model folder is to be written there; choose another name")
    if not again and ((folder / MARKER).exists() or any(folder.glob("model*.safetensors"))):
        raise UserError(f"{folder} holds a model or a run already; name another folder")


def save_fused(loaded: LoadedModel, folder: str | Path) -> None:
    """Fuse the adapter of `loaded`, in place, and put model and tokenizer into `folder`, its configuration last."""
    folder = Path(folder)
    fuse_adapter(loaded.model)
    temporary = folder / f".model.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        mlx_lm.utils.save(temporary, loaded.path, loaded.model, loaded.tokenizer, loaded.config, donate_model=False)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == MARKER):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
