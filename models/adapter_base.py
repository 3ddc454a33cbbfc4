"""Which base model an adapter goes on: the one that it was trained on, unless another is named.

    args.model = base_of(args.model, args.resume_file, resolve)

Whether another base's shapes fit is checked where the adapter is attached (models.adapters, models.torch_adapters).
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common.errors import UserError
from common.files import expanded
from models.adapter_config import find_adapter

DEFAULT_MODEL = "tiny-digits"
MODEL_HELP = "tiny-digits, a folder, or a Hugging Face name (default: the adapter's base, or else tiny-digits)"


def base_of(
    model: str | None, adapter: str | None, resolve: Callable[[str], Path], say: Callable[[str], object] = print
) -> str:
    """The model to open. model: the value of --model, None where it was not given; adapter: an adapter's path, if any.

    resolve: from a name to its folder, of the framework. say: told of another base than the recorded one.
    Raises UserError where no base is named anywhere, and where the recorded one is a folder that is not here.
    """
    if not adapter:
        return model or DEFAULT_MODEL
    recorded = find_adapter(adapter).config.model
    if model is None:
        if not recorded:
            raise UserError(f"{adapter} does not say which base model it was trained on; name it by --model")
        if recorded.startswith((".", "/", "~")) and not expanded(recorded).exists():
            raise UserError(f"{adapter} was trained on {recorded}, which is not here; name its base by --model")
        return recorded
    if recorded and not _same(model, recorded, resolve):
        say(f"{adapter} was trained on {recorded}; --model puts it on {model}, if its shapes fit")
    return model


def _same(one: str, other: str, resolve: Callable[[str], Path]) -> bool:
    return one == other or None is not _folder(one, resolve) == _folder(other, resolve)


def _folder(name: str, resolve: Callable[[str], Path]) -> Path | None:
    """The folder of a model that is here, or is made here; None for a name of the hub, which is not asked."""
    path = expanded(name)
    if path.exists():
        return path.resolve()
    with suppress(UserError):
        return resolve(name).resolve() if "/" not in name else None
    return None
