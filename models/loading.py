"""Opening a model by name: an embedded one, a local folder, a GGUF file, or a Hugging Face name.

Everything that opens a model goes through `load`. Not here: adapters (see models.adapters) and value heads (see
models.value_head).
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from common.errors import opening
from data.batching import check_eos
from data.tokenizer import mlx_tokenizer
from models.arrays import check_finite, check_whole
from models.cpu import prepare_for, process
from models.folders import folder_config, model_folder
from models.four_bit import GROUP_SIZE, four_bit_folder
from models.gguf_folder import gguf_file, gguf_folder, is_gguf
from models.gguf_reader import read_gguf
from models.gpu import wire_memory
from models.random_state import kept_random_state
from models.smollm2 import DTYPES, FOUR_BIT, SIZES, SMOLLM2_NAMES, smollm2_file, smollm2_folder
from models.tiny import TINY_NAMES, tiny_config, tiny_model_path

# transformers warns about model types without a PyTorch class, which are not needed here.
logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass
class LoadedModel:
    """A model as opened by mlx-lm, in eval mode and unfrozen, with everything needed to save it again.

    dtypes: parameter name → precision in the folder.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path
    name: str
    dtypes: dict[str, mx.Dtype] = field(default_factory=dict)


def resolve(name: str) -> Path:
    """The local folder of a model: built (tiny models), as it is (folders), converted (GGUF files, smollm2-*), or
    downloaded (hub names).

    Raises UserError if there is neither such a folder nor such a model on the hub, or no network.
    """
    if name in TINY_NAMES:
        return tiny_model_path(name)
    dtype = made_precision(mx.default_device() == mx.Device(mx.gpu))
    if name == FOUR_BIT:
        return four_bit_folder(smollm2_file(), smollm2_folder(name, dtype))
    if name in SMOLLM2_NAMES:
        return smollm2_folder(name, dtype)
    if is_gguf(name):
        return gguf_folder(name, dtype)
    return model_folder(name)


def made_precision(on_gpu: bool) -> str:
    """The precision of a folder that is made here, where its name says none.

    bfloat16 is what models for a GPU come in; on Linux CPU its products take ten times as long as float32's.
    """
    return "bfloat16" if on_gpu else "float32"


def config_of(name: str, on_gpu: bool) -> dict[str, Any]:
    """What the config.json of the model `name` says, without its weights: nothing is built, converted or opened, and of
    a model on the hub only that file is downloaded.

    on_gpu: for which device a folder would be made here. Raises UserError as `resolve` does.
    """
    if name in TINY_NAMES:
        return tiny_config(name)
    dtype = made_precision(on_gpu)
    if name == FOUR_BIT:
        table = {"model.embed_tokens": {"group_size": GROUP_SIZE, "bits": 8}}  # as the file has it
        return {**SIZES, "dtype": dtype, "quantization": {"group_size": GROUP_SIZE, "bits": 4, **table}}
    if name in SMOLLM2_NAMES:
        return {**SIZES, "dtype": DTYPES.get(name, dtype)}
    if is_gguf(name):
        return {**read_gguf(gguf_file(name)).config, "dtype": dtype}
    return folder_config(name)


def is_made_here(name: str) -> bool:
    """Whether a name stands for a folder that `resolve` makes in the user's cache, which the hub does not know."""
    return name in (*TINY_NAMES, *SMOLLM2_NAMES) or is_gguf(name)


def load(name: str, divide: Callable[[nn.Module], None] | None = None) -> LoadedModel:
    """Open the model `name` (see `resolve`); mlx's global random stream is left as it was.

    On a GPU, memory stays resident from here on (models.gpu). divide: called with the model before its weights are
    read; only those are read that it leaves there, one at a time (models.sharding).

    Raises UserError if the model is missing or cannot be opened.
    """
    process.start_computing()
    path = resolve(name)
    wire_memory()
    with opening(name):
        for file in path.glob("model*.safetensors"):
            check_whole(file)
        with kept_random_state():  # mlx's layers draw initial weights
            model, config = mlx_lm.utils.load_model(path, lazy=divide is not None, trust_remote_code=False)
            if divide:
                divide(model)
        weights = {key: array for key, array in tree_flatten(model.parameters()) if array is not None}
        for array in weights.values():
            mx.eval(array)
        tokenizer = mlx_tokenizer(path, config.get("eos_token_id"))
    prepare_for(config.get("hidden_size") or 0)  # families that name it otherwise are computed as narrow ones
    check_eos(tokenizer, name, config)
    check_finite(name, weights, "check that it is complete")
    dtypes = {key: array.dtype for key, array in weights.items()}
    return LoadedModel(model, tokenizer, config, path, name, dtypes)


def twin(model: nn.Module) -> nn.Module:
    """A second module tree over the same arrays: no weight is copied.

    Training replaces arrays in the first tree and does not change the second, so the twin can serve as the frozen
    reference policy, or carry another adapter on the same base.
    """
    shared = {id(array): array for _, array in tree_flatten(model.parameters())}
    return copy.deepcopy(model, shared)
