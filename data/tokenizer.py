"""Opening a model's tokenizer without its weights.

python -m pytest tests/test_tokenizer.py
"""

from pathlib import Path
from typing import Any

from common.errors import opening
from common.locate import locate
from common.open_files import accept_few_files
from common.schemas import read_as
from data.batching import check_eos


def open_tokenizer(name: str) -> Any:
    """The tokenizer of the model `name`: an embedded one, a folder or a Hugging Face name.

    Where mlx-lm is installed it is mlx-lm's, so that chat templates render as they do in training, and transformers'
    elsewhere. Either way `eos_token_ids` is the set of all tokens that end a turn. Raises UserError if the model is
    not found or its tokenizer cannot be opened.
    """
    folder = locate(name)
    config = _configured(folder)
    with opening(f"the tokenizer of {name}"):
        tokenizer = _open(folder, config["eos_token_id"])
    check_eos(tokenizer, name, config)
    return tokenizer


def mlx_tokenizer(folder: Path, eos: int | list[int] | None) -> Any:
    """The tokenizer in `folder` as mlx-lm opens it. No code that comes with a model is run, nor asked about."""
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=eos)


def transformers_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder` as transformers opens it. No code that comes with a model is run, nor asked about."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _configured(folder: Path) -> dict[str, Any]:
    """config.json, with the EOS of generation_config.json, which takes precedence, as in mlx-lm."""
    config, generation = read_as(dict[str, Any], folder / "config.json"), folder / "generation_config.json"
    named = read_as(dict[str, Any], generation).get("eos_token_id") if generation.is_file() else None
    return {**config, "eos_token_id": named or config.get("eos_token_id")}


def _open(folder: Path, eos: int | list[int] | None) -> Any:
    accept_few_files()
    try:
        return mlx_tokenizer(folder, eos)
    except ImportError:  # no mlx-lm
        tokenizer = transformers_tokenizer(folder)
        ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        # Setting the attribute would call transformers' own setter, which takes a single token.
        vars(tokenizer)["eos_token_ids"] = ids
        return tokenizer
