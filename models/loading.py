"""Opening a model by name: the embedded one, a local folder, or a Hugging Face name.

Everything that opens a model goes through `load`. Leaves out adapters (models.adapters) and the value
head (models.value_head).
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from common.errors import UserError
from common.files import read_json
from models.folders import OPENING_ERRORS, model_folder, reason
from models.tiny import TINY_NAMES, tiny_model_path

# transformers warns about every model type it has no PyTorch class for; the weights here are mlx's.
logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass
class LoadedModel:
    """A model as mlx-lm opens it, in eval mode and unfrozen, with what saving it again needs."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path
    name: str


def resolve(name: str) -> Path:
    """The local folder of a model: built (tiny models), as it is (folders), or downloaded (hub names).

    Raises UserError where there is no such folder and no such model on the hub, or no network.
    """
    if name in TINY_NAMES:
        return tiny_model_path(name)
    return model_folder(name)


def load(name: str) -> LoadedModel:
    """Open the model `name` (see `resolve`). Raises UserError if it is missing or cannot be opened."""
    path = resolve(name)
    try:
        model, config = mlx_lm.utils.load_model(path)
        tokenizer = mlx_lm.utils.load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except OPENING_ERRORS as error:
        raise UserError(f"{name} cannot be opened by mlx-lm ({reason(error)}); check that it is whole") from None
    return LoadedModel(model, tokenizer, config, path, name)


def load_tokenizer(name: str) -> TokenizerWrapper:
    """The tokenizer of the model `name`, without its weights. Raises UserError as `load` does."""
    path = resolve(name)
    try:
        return mlx_lm.utils.load_tokenizer(path, eos_token_ids=read_json(path / "config.json").get("eos_token_id"))
    except OPENING_ERRORS as error:
        raise UserError(f"the tokenizer of {name} cannot be opened ({reason(error)}); check that it is whole") from None


def twin(model: nn.Module) -> nn.Module:
    """A second module tree over the same arrays: no weight is copied.

    Training replaces arrays in the first tree and leaves the second as it was, so this serves as the
    frozen reference policy, and lets a second adapter stand on the same base.
    """
    shared = {id(array): array for _, array in tree_flatten(model.parameters())}
    return copy.deepcopy(model, shared)
