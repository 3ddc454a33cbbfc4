"""The few rows on which a fused model is compared with its adapter: its validation data, or texts of its own.

python -m pytest tests/test_fuse_kl.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from common.errors import UserError
from data.batching import Example, num_targets, truncate
from data.examples import LANGUAGE_ROWS, PREFERENCE_ROWS, language_examples, preference_examples
from data.records import feature_names, read_rows
from data.sources import find_split
from models.generation import sample
from models.random_state import kept_random_state

ROWS = 8
MAX_TOKENS = 256  # of a row of data
SAMPLED_TOKENS = 64


class MeasuringRows(NamedTuple):
    """examples: each with at least one trained token; source: where they are from, in words."""

    examples: list[Example]
    source: str


def measuring_rows(model: nn.Module, tokenizer: TokenizerWrapper, runs: Sequence[dict[str, Any]]) -> MeasuringRows:
    """Up to 8 rows of the validation data of the last of `runs`, evenly spaced; else 8 texts that `model` samples.

    model: with its adapter. runs: the adapter's provenance. Data is only read where it is on this machine.
    """
    flags = runs[-1]["flags"] if runs else {}
    data, base = flags.get("data"), flags.get("data_base")
    if data and base is not None and Path(data).exists():
        try:
            return _validation_rows(tokenizer, flags)
        except UserError:
            pass  # the data has changed since; the model's own texts serve as well
    return _sampled_rows(model, tokenizer)


def _validation_rows(tokenizer: TokenizerWrapper, flags: dict[str, Any]) -> MeasuringRows:
    source = find_split(flags["data"], flags["data_base"], "valid")
    of_pairs = flags.get("reward_model")
    kinds = PREFERENCE_ROWS if of_pairs else LANGUAGE_ROWS
    rows = read_rows(source, kinds, feature_names(argparse.Namespace(**flags)), chat=True)
    examples: list[Example] = []
    for index in dict.fromkeys(np.linspace(0, len(rows) - 1, ROWS).astype(int)):
        made = (
            preference_examples(tokenizer, rows[index])
            if of_pairs
            else language_examples(tokenizer, rows[index], mask_prompt=flags.get("mask_prompt", True))
        )
        examples += [truncate(made[0], MAX_TOKENS)]
    examples = [example for example in examples if num_targets(example) > 0]
    if not examples:
        raise UserError(f"no row of {source} has a trained token among its first {MAX_TOKENS}; use shorter ones")
    return MeasuringRows(examples, f"{len(examples)} rows of {source}")


def _sampled_rows(model: nn.Module, tokenizer: TokenizerWrapper) -> MeasuringRows:
    """Texts from the beginning, at temperature 1; the same each time."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    with kept_random_state():
        mx.random.seed(0)
        texts = sample(model, [[start]] * ROWS, tokenizer.eos_token_ids, SAMPLED_TOKENS)
    return MeasuringRows([Example([start, *text], 1) for text in texts], f"{ROWS} texts that it sampled")
