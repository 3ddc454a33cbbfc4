"""From a model's name to its folder, the same for MLX and PyTorch: a folder as it is, or a download from the hub."""

from collections.abc import Callable
from pathlib import Path

from data.errors import UserError
from data.files import read_json

from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

# What a damaged or unknown folder makes mlx-lm and transformers raise.
OPENING_ERRORS = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


def model_folder(name: str, download: Callable[[str], str | Path]) -> Path:
    """The folder `name`, or where `download` puts the hub's model of that name.

    Raises UserError where there is no such folder and no such model on the hub, or no network.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} holds no config.json, so it is no model folder; name one that fuse.py wrote")
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"{name} is no model folder; check --model, or leave it out for tiny-digits")
    try:
        return Path(download(name))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{name} is neither a folder here nor a model on the Hugging Face hub; check its spelling, "
            "or log in if it is private"
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name} is no folder here, and the Hugging Face hub did not give it ({reason(error)}); "
            "check the network, or use --model tiny-digits"
        ) from None


def is_classifier(folder: Path) -> bool:
    """Whether a model folder is a transformers AutoModelForSequenceClassification by its configuration."""
    architectures = read_json(folder / "config.json").get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def reason(error: Exception) -> str:
    """The first line of an error that may have many or none, with its kind, without which some say nothing."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
