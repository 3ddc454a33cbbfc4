"""The flags that say where rows are and what their keys are called."""

import argparse
from collections.abc import Iterable

from data.records import FEATURE_FLAGS


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where rows are, what their keys are called, and which tokens are trained. Also of data.check."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default="data", help="folder of .jsonl files or of save_to_disk, or OWNER/NAME on the hub"
    )
    group.add_argument("--data-base", default="increasing_mult_2_", help="name of the .jsonl files before train.jsonl")
    group.add_argument("--mask-prompt", action=argparse.BooleanOptionalAction, default=True,
                       help="train completions and the assistant's turns only")  # fmt: skip
    add_feature_flags(group, (kind for kind in FEATURE_FLAGS if kind != "answer"))


def add_feature_flags(group: argparse._ActionsContainer, kinds: Iterable[str]) -> None:
    """What the data calls its keys, for each of `kinds` (of FEATURE_FLAGS)."""
    for kind in kinds:
        group.add_argument(f"--{kind}-feature", metavar="KEY", help=f'what the rows call "{FEATURE_FLAGS[kind]}"')
