"""From a model's name to its folder, the same for MLX and PyTorch: a folder as it is, or a download from the hub."""

from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from common.errors import UserError, reason
from common.files import read_json
from models.adapter_config import HEAD_FILE

# What mlx-lm asks the hub for, so that one download serves both, and a reward model's head, which it leaves out.
HUB_FILES = [
    *("*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl"),
    *("*.jinja", HEAD_FILE),
]


def model_folder(name: str) -> Path:
    """The folder `name`, or the hub's model of that name in the hub's own cache, downloaded where it is missing.

    Raises UserError where there is no such folder and no such model on the hub, or no network.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} holds no config.json, so it is no model folder; name one that fuse.py wrote")
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"{name} is no model folder; check --model, or leave it out for tiny-digits")
    downloaded = _download(name)
    if not (downloaded / "config.json").is_file():
        raise UserError(f"{name} on the Hugging Face hub holds no config.json, so it is no model; name another")
    return downloaded


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
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
            f"{name} is no folder here, and the Hugging Face hub did not give it ({reason(error)}); "
            "check the network, or use --model tiny-digits"
        ) from None


def is_classifier(folder: Path) -> bool:
    """Whether a model folder is a transformers AutoModelForSequenceClassification by its configuration."""
    architectures = read_json(folder / "config.json").get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)
