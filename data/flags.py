"""Flags for where rows are and how their keys are named."""

import argparse
from collections.abc import Iterable

from data.records import FEATURE_FLAGS
from data.sources import OWN_BASE


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where rows are, how their keys are named, and which tokens are trained."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default="data", help="folder of .jsonl files or of save_to_disk, or OWNER/NAME on the hub"
    )
    group.add_argument(
        "--data-base",
        help=f"name of the .jsonl files before train.jsonl (default: {OWN_BASE} if there are such, else none)",
    )
    group.add_argument("--mask-prompt", action=argparse.BooleanOptionalAction, default=True,
                       help="train only completions and the assistant's turns")  # fmt: skip
    add_feature_flags(group, (kind for kind in FEATURE_FLAGS if kind != "answer"))


def add_feature_flags(group: argparse._ActionsContainer, kinds: Iterable[str]) -> None:
    """How the data names its keys, for each of `kinds` (keys of FEATURE_FLAGS)."""
    for kind in kinds:
        group.add_argument(
            f"--{kind}-feature", metavar="KEY", help=f'name of the key "{FEATURE_FLAGS[kind]}" in the rows'
        )
