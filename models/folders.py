"""From a model's name to its folder, for MLX and PyTorch alike: a local folder, or a download from the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from common.errors import UserError, reason
from common.files import expanded, restore_old
from common.schemas import read_as
from models.adapter_config import HEAD_FILE

# The files that mlx-lm downloads, so that one download serves both, plus the head of a reward model, and but for *.py:
# code that comes with a model is never run.
HUB_FILES = [
    *("*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl"),
    *("*.jinja", HEAD_FILE),
]

MOST_LAYERS = 10_000  # of a model; the deepest that are published have some 130


def model_folder(name: str) -> Path:
    """The folder `name`, or the hub's model of that name in the hub's cache, downloaded if missing.

    Raises UserError if there is neither such a folder nor such a model on the hub, or no network.
    """
    if (folder := _local_folder(name)) is not None:
        return folder
    downloaded = _download(name, lambda: snapshot_download(name, allow_patterns=HUB_FILES))
    if not (downloaded / "config.json").is_file():
        raise UserError(f"{name} on the Hugging Face hub contains no config.json, so it is not a model; name another")
    return downloaded


def folder_config(name: str) -> dict[str, Any]:
    """The config.json of the folder or of the hub's model `name`, of which nothing else is downloaded.

    Raises UserError as `model_folder` does.
    """
    if (folder := _local_folder(name)) is not None:
        return read_as(dict[str, Any], folder / "config.json")
    # Not hf_hub_download, which without a network tries again for half a minute.
    folder = _download(name, lambda: snapshot_download(name, allow_patterns="config.json"))
    return read_as(dict[str, Any], folder / "config.json")


def _local_folder(name: str) -> Path | None:
    """The folder `name`; None for a name of the hub. Raises UserError for a path without a model."""
    folder = expanded(name)
    restore_old(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} contains no config.json, so it is not a model folder; name one that fuse.py wrote")
        _check_layers(folder / "config.json")
        return folder
    if folder.exists() or _is_path(name):
        raise UserError(f"{name} is not a model folder; check --model, or omit it for tiny-digits")
    return None


def _check_layers(path: Path) -> None:
    """Raise UserError where a config.json says so many layers that the libraries would never be done building them.

    What else is wrong with the file is found where it is read.
    """
    try:
        layers = read_as(dict[str, Any], path).get("num_hidden_layers")
    except UserError:
        return
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(f"{path} says num_hidden_layers is {layers}, more than {MOST_LAYERS}; correct it")


def check_name(name: str) -> None:
    """Raise UserError where `name` is a path without a model. A name of the hub is not asked for."""
    path = expanded(name)
    if path.is_file():  # a GGUF file
        return
    if path.exists() or _is_path(name):
        model_folder(name)


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/")


def _download(name: str, fetch: Callable[[], str]) -> Path:
    """What `fetch` downloads of the hub's model `name`."""
    try:
        return Path(fetch())
    except GatedRepoError:
        raise UserError(
            f"{name} is gated on the Hugging Face hub; accept its terms on its page and log in by: hf auth login"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{name} is neither a folder here nor a model on the Hugging Face hub; check its spelling, "
            "or log in if it is private"
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        raise UserError(
            f"{name} is not a local folder, and the Hugging Face hub did not give it ({reason(error)}); "
            "check the network, or use --model tiny-digits"
        ) from None


def is_classifier(folder: Path) -> bool:
    """Whether a model folder's configuration is that of a transformers AutoModelForSequenceClassification."""
    architectures = read_as(dict[str, Any], folder / "config.json").get("architectures") or []
    return any(isinstance(name, str) and name.endswith("ForSequenceClassification") for name in architectures)
