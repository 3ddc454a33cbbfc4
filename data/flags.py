"""Flags for where rows are and how their keys are named."""

import argparse
from collections.abc import Iterable

from data.records import FEATURE_FLAGS


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where rows are, how their keys are named, and which tokens are trained."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default="data", help="folder of .jsonl files or of save_to_disk, or OWNER/NAME on the hub"
    )
    group.add_argument("--data-base", default="increasing_mult_2_", help="name of the .jsonl files before train.jsonl")
    group.add_argument("--mask-prompt", action=argparse.BooleanOptionalAction, default=True,
                       help="train only completions and the assistant's turns")  # fmt: skip
    add_feature_flags(group, (kind for kind in FEATURE_FLAGS if kind != "answer"))


def add_feature_flags(group: argparse._ActionsContainer, kinds: Iterable[str]) -> None:
    """How the data names its keys, for each of `kinds` (keys of FEATURE_FLAGS)."""
    for kind in kinds:
        group.add_argument(
            f"--{kind}-feature", metavar="KEY", help=f'name of the key "{FEATURE_FLAGS[kind]}" in the rows'
        )
