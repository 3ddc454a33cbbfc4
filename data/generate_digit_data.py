"""Write train, valid and test files of digit sequences, each row with its score under the digit rule.

    python data/generate_digit_data.py --increasing --multiple-of 2 --num-samples 150 --noise 0.0
    python data/generate_digit_data.py --increasing --multiple-of 2 --num-samples 500 --prefix reward_function_

Can be run from the root and from inside `data/`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # When this file is run as a script, Python searches its folder; the packages are one level up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import common  # noqa: F401  so that Ctrl-C while numpy is imported is one line

import numpy as np

from common.cli import run
from common.errors import UserError
from common.files import atomic_file
from common.parser import Parser
from common.ranges import COUNT, SEED, SHARE
from data.digits import DECREASING_STARTS, INCREASING_STARTS, MAX_STEP, DigitRule

NOISE_RANGE = (-100, 100)
SPLITS = ("train", "valid", "test")


class DigitRow(NamedTuple):
    """One line of a data file: the text and its score under the rule, 0..1."""

    text: str
    reward: float


def digit_sequence(
    rng: np.random.Generator, rule: DigitRule, length: int, noise: float, start: int | None = None
) -> list[int]:
    """A sequence that follows `rule`, in which every number after the first is replaced with probability `noise`.

    start: the first number, used as it is; by default a uniform multiple of `rule.multiple_of` in the range of starts.
    Steps are uniform over the multiples of `rule.multiple_of` in 1..MAX_STEP. A replaced number is a uniform integer
    in NOISE_RANGE; later numbers continue as if it had not been replaced. Raises ValueError if length is below 1 or no
    step is a multiple of `rule.multiple_of`.
    """
    if length < 1 or rule.multiple_of > MAX_STEP:
        raise ValueError(f"length is {length} (at least 1), multiple_of is {rule.multiple_of} (at most {MAX_STEP})")
    if start is None:
        low, high = INCREASING_STARTS if rule.increasing else DECREASING_STARTS
        start = rule.multiple_of * int(rng.integers(-(-low // rule.multiple_of), high // rule.multiple_of + 1))
    steps = rule.multiple_of * rng.integers(1, MAX_STEP // rule.multiple_of + 1, size=length - 1)
    clean = start + np.cumsum(steps if rule.increasing else -steps)
    # Always drawn, so that a given random stream yields the same clean sequence at every noise level.
    replaced = rng.random(length - 1) < noise
    random = rng.integers(NOISE_RANGE[0], NOISE_RANGE[1] + 1, size=length - 1)
    return [start, *np.where(replaced, random, clean).tolist()]


def digit_rows(
    rng: np.random.Generator, rule: DigitRule, count: int, lengths: tuple[int, int], noise: float
) -> Iterator[DigitRow]:
    """`count` rows; the count of numbers in a row is uniform in lengths[0]..lengths[1]."""
    for _ in range(count):
        length = int(rng.integers(lengths[0], lengths[1] + 1))
        text = " ".join(map(str, digit_sequence(rng, rule, length, noise)))
        yield DigitRow(text, rule.score(text))


def write_rows(path: Path, rows: list[DigitRow]) -> None:
    """Write one JSON object a line, atomically. Raises UserError if the folder cannot be written to."""
    with atomic_file(path) as temporary:
        lines = (json.dumps(row._asdict()) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--num-samples", type=COUNT, default=100, help="rows in each of the three files")
    parser.add_argument(
        "--min-length", type=COUNT, default=5, help="fewest numbers in a row (rows of fewer than 5 cannot score 1)"
    )
    parser.add_argument("--max-length", type=COUNT, default=15, help="most numbers in a row")
    parser.add_argument("--noise", type=SHARE, default=0.2, help="probability that a number is replaced, 0..1")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--increasing", action="store_true", help="increasing numbers (the default)")
    direction.add_argument("--decreasing", action="store_true", help="decreasing numbers")
    parser.add_argument("--multiple-of", type=COUNT, default=1, help="every number is a multiple of this, 1..50")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent, help="folder to write to")
    parser.add_argument("--prefix", default="", help="prefix of the file names, such as reward_function_")
    parser.add_argument("--seed", type=SEED, default=0, help="random seed")
    args = parser.parse_args()
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise UserError for the first flag that is out of its range."""
    if args.num_samples < 1:
        raise UserError(f"--num-samples is {args.num_samples}; it must be at least 1")
    if args.min_length < 1:
        raise UserError(f"--min-length is {args.min_length}; it must be at least 1")
    if args.max_length < args.min_length:
        raise UserError(
            f"--max-length {args.max_length} is below --min-length {args.min_length}; raise one or lower the other"
        )
    if not 0 <= args.noise <= 1:
        raise UserError(f"--noise is {args.noise}; it is a probability, from 0 to 1")
    if not 1 <= args.multiple_of <= MAX_STEP:
        raise UserError(
            f"--multiple-of is {args.multiple_of}; it must be from 1 to {MAX_STEP}, the longest step of a sequence"
        )
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must be at least 0")
    if Path(args.prefix).name != args.prefix:
        raise UserError(f"--prefix {args.prefix!r} contains a folder; give the folder as --output-dir")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise UserError(f"--output-dir {args.output_dir} is a file; name a folder")


def main() -> None:
    args = parse_args()
    rule = DigitRule(increasing=not args.decreasing, multiple_of=args.multiple_of)
    for stream, split in enumerate(SPLITS):
        rng = np.random.default_rng((args.seed, stream))
        rows = list(digit_rows(rng, rule, args.num_samples, (args.min_length, args.max_length), args.noise))
        path = args.output_dir / f"{args.prefix}{rule.name}_{split}.jsonl"
        write_rows(path, rows)
        mean = sum(row.reward for row in rows) / len(rows)
        perfect = sum(row.reward == 1.0 for row in rows) / len(rows)
        print(f"{path}: {len(rows)} rows, mean reward {mean:.3f}, perfect {perfect:.0%}")


if __name__ == "__main__":
    run(main)
