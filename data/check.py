"""Inspect data before training on it: rows, lengths, labels, duplicates, and every invalid line.

    python -m data.check --data data --data-base increasing_mult_2_
    python -m data.check --data my_rows.jsonl --model mlx-community/Qwen3-0.6B-4bit --max-length 512

Lengths are in tokens of --model's tokenizer; its weights are not loaded. The first rows are shown as the model will see
them, with the trained parts in ⟦ ⟧. A line is bad if the script that reads such rows would refuse it. Exit code 2 if
there is a bad line or a split without a row. Nothing is written.
"""

import argparse
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common.cli import run
from common.errors import UserError
from common.parser import Parser
from common.ranges import COUNT, NATURAL
from data.batching import Example, collate, encode_prompt, num_targets, truncate
from data.examples import (
    LANGUAGE_ROWS,
    PREFERENCE_ROWS,
    PROMPT_ROWS,
    language_examples,
    preference_examples,
    row_prompt,
)
from data.flags import add_data_flags, add_feature_flags
from data.records import Row, checked_rows, feature_names
from data.sources import SPLIT_NAMES, Source, base_in, find_split, whole
from data.tokenizer import open_tokenizer

KINDS = [*PREFERENCE_ROWS, ("messages", "answer"), *LANGUAGE_ROWS, *PROMPT_ROWS]
KEYS = {key for keys in KINDS for key in keys} - {"reward"}  # the keys by which two rows are compared
WHOLE = (
    "preference pairs",
    "texts with rewards",
    "prompts",
    "prompts with answers",
)  # kinds of rows in which nothing is masked
# Which kinds of rows each reader takes. Where --for names none, the first that takes most rows of a split is meant.
READERS = {
    "sft": ("texts", "prompts with completions", "conversations", "conversations with answers", "texts with rewards"),
    "reward-model": ("preference pairs", "texts with rewards"),
    "dpo": ("preference pairs",),
    "ppo": ("prompts", "prompts with answers", "conversations with answers"),
}
SCRIPTS = {
    "sft": "sft.py",
    "reward-model": "sft.py --reward-model",
    "dpo": "sft.py --dpo",
    "ppo": "ppo_training.py --prompts",
}
BINS = 8  # of a histogram
LABELS = 12  # up to this many labels are counted one by one, and this many duplicates listed
SHOWN = 1200  # characters of a row


@dataclass(frozen=True)
class Settings:
    """How rows are read. features: keys by other names; max_length: tokens; rows: the number to keep for printing."""

    features: dict[str, str]
    mask_prompt: bool = True
    max_length: int = 2048
    rows: int = 3
    reader: str | None = None  # one of READERS


@dataclass
class Report:
    """The contents of one split.

    reader: who would read it, one of READERS. kinds: kind → the places of its rows. lengths: tokens per row, of a
    pair's longer text; total: of all texts; targets: trained tokens per row, after truncation, where part is masked.
    """

    name: str
    source: Source
    reader: str = "sft"
    kinds: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    lengths: list[int] = field(default_factory=list)
    total: int = 0
    targets: list[int] = field(default_factory=list)
    untrained: int = 0
    rewards: list[float] = field(default_factory=list)
    answers: Counter = field(default_factory=Counter)
    places: dict[Any, list[str]] = field(default_factory=lambda: defaultdict(list))  # of every different row
    first: list[tuple[str, list[Example]]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_feature_flags(parser, ("answer",))
    parser.add_argument(
        "--model", default="tiny-digits", help="model whose tokenizer is used: a folder or Hugging Face name"
    )
    parser.add_argument(
        "--max-length", "--max-seq-length", type=COUNT, default=2048, help="tokens to which rows are truncated"
    )
    parser.add_argument("--rows", type=NATURAL, default=3, help="number of first rows of each split to show")
    parser.add_argument(
        "--for", dest="reader", choices=READERS, help="what reads the rows (default: what takes most of a split's)"
    )
    args = parser.parse_args()
    return args


def sources(data: str, base: str) -> list[tuple[str, Source]]:
    """The existing splits by name; for a single file, that file. Raises UserError if there is none."""
    if Path(data).is_file():
        return [(Path(data).name, whole(data))]
    found: list[tuple[str, Source]] = []
    missing: UserError | None = None
    for split in SPLIT_NAMES:
        try:
            found.append((split, find_split(data, base, split)))
        except UserError as error:
            missing = missing or error
    if not found and missing is not None:
        raise missing
    return found


def read(name: str, source: Source, tokenizer: Any, settings: Settings) -> Report:
    """Read every row of a split; invalid rows are listed as bad lines and otherwise ignored."""
    report = Report(name, source)
    for place, row in watched(checked_rows(source, KINDS, settings.features, chat=True), name):
        try:
            if isinstance(row, UserError):
                raise row
            kind, examples = encode(tokenizer, row, settings.mask_prompt)
        except UserError as error:
            text = str(error).removeprefix(place).lstrip(": ").partition("; write")[0]
            report.bad.append(f"{place}: {text}")
            continue
        report.kinds[kind].append(place)
        sizes = [len(example.tokens) for example in examples]
        report.lengths.append(max(sizes))
        report.total += sum(sizes)
        if kind not in WHOLE:
            report.targets.append(sum(num_targets(truncate(example, settings.max_length)) for example in examples))
            report.untrained += not report.targets[-1]
        if "reward" in row:
            report.rewards.append(row["reward"])
        if "answer" in row:
            report.answers[row["answer"]] += 1
        report.places[repr(sorted((key, row[key]) for key in KEYS & row.keys()))].append(place)
        if len(report.first) < settings.rows:
            report.first.append((place, examples))
    report.reader = settings.reader or reader_of(report.kinds)
    report.bad += refused(report)
    return report


def reader_of(kinds: Mapping[str, Sequence[str]]) -> str:
    """The first of READERS that takes most rows. kinds: kind → places."""
    return max(READERS, key=lambda reader: sum(len(kinds.get(kind, ())) for kind in READERS[reader]))


def refused(report: Report) -> list[str]:
    """The rows that the reader would refuse, and the split itself if it holds no row."""
    if not (report.kinds or report.bad):
        return [f"{report.source}: holds no row"]
    script = SCRIPTS[report.reader]
    others = {kind: places for kind, places in report.kinds.items() if kind not in READERS[report.reader]}
    return [f"{place}: is one of {kind}, which {script} refuses" for kind, all_ in others.items() for place in all_]


def encode(tokenizer: Any, row: Row, mask_prompt: bool) -> tuple[str, list[Example]]:
    """The kind of a row and its examples: as sft.py encodes it, or as PPO does for a prompt."""
    if "chosen" in row:
        return "preference pairs", preference_examples(tokenizer, row)
    if "reward" in row:
        return "texts with rewards", preference_examples(tokenizer, row)
    if "text" in row or "completion" in row:
        kind = "texts" if "text" in row else "prompts with completions"
        return kind, language_examples(tokenizer, row, mask_prompt=mask_prompt)
    if any(message["role"] == "assistant" for message in row.get("messages", [])):
        kind = "conversations with answers" if "answer" in row else "conversations"
        return kind, language_examples(tokenizer, row, mask_prompt=mask_prompt)
    tokens = encode_prompt(tokenizer, row_prompt(tokenizer, row))
    return "prompts with answers" if "answer" in row else "prompts", [Example(tokens, len(tokens))]


def watched(rows, name: str):
    """The rows, with a count on a terminal: how many there are is not known before."""
    from tqdm import tqdm

    return tqdm(rows, desc=name, unit=" rows", leave=False, disable=None, bar_format="{desc}: {n_fmt}{unit}, {elapsed}")


# --- what is printed ---


def show(report: Report, tokenizer: Any, max_length: int) -> None:
    """Print the report of one split, except for its bad lines."""
    count = len(report.lengths)
    print(bold(f"{report.name}: {report.source}"))
    counts = sorted(((len(places), kind) for kind, places in report.kinds.items()), key=lambda pair: -pair[0])
    kinds = ", ".join(f"{kind}: {number:,}" for number, kind in counts) or "no good row"
    print(f"  {kinds}" + (f", bad lines: {len(report.bad):,}" if report.bad else ""))
    if not count:
        return
    print(f"  checked for: {SCRIPTS[report.reader]}")
    cut = sum(length > max_length for length in report.lengths)
    lost = f"; with no trained token left: {report.untrained:,}" if report.untrained else ""
    print(f"  truncated, as longer than {max_length:,} tokens: {cut:,}{lost}")
    lengths = np.array(report.lengths)
    pairs = " (of a pair: its longer text)" if "preference pairs" in report.kinds else ""
    print(
        f"  tokens per row{pairs}: shortest {lengths.min():,}, median {np.median(lengths):,.0f}, "
        f"mean {lengths.mean():,.1f}, 95th percentile {np.percentile(lengths, 95):,.0f}, longest {lengths.max():,}"
    )
    trained = f", {sum(report.targets):,} of them trained" if any(report.targets) else ""
    print(f"  tokens in total: {report.total:,}{trained}")
    bars(binned(report.lengths))
    if report.rewards:
        few = len(set(report.rewards)) <= LABELS
        print(f"  rewards: mean {np.mean(report.rewards):.4g}, {len(set(report.rewards)):,} different")
        counted = Counter(report.rewards)
        bars([(f"{value:g}", counted[value]) for value in sorted(counted)] if few else binned(report.rewards))
    if report.answers:
        more = f", the {LABELS} most frequent" if len(report.answers) > LABELS else ""
        print(f"  answers: {len(report.answers):,} different{more}")
        bars([(" ".join(answer.split())[:24], number) for answer, number in report.answers.most_common(LABELS)])
    show_repeated("repeated rows", [places for places in report.places.values() if len(places) > 1])
    for place, examples in report.first:
        for example in examples:
            text = marked(tokenizer, truncate(example, max_length))
            print(f"  {place}, {len(example.tokens):,} tokens")
            print("\n".join(f"    {line}" for line in text.split("\n")))


def show_repeated(what: str, groups: Sequence[Sequence[str]]) -> None:
    """Print how often rows are repeated, and where first."""
    if not groups:
        return
    print(f"  {what}: {sum(len(places) - 1 for places in groups):,}")
    for places in groups[:LABELS]:
        more = f" and {len(places) - 2:,} more" if len(places) > 2 else ""
        print(f"    {places[1]} repeats {places[0]}{more}")
    if len(groups) > LABELS:
        print(f"    and {len(groups) - LABELS:,} other rows")


def across(reports: Sequence[Report]) -> list[list[str]]:
    """For every row that occurs in several splits: its first place in each."""
    seen: dict[Any, list[str]] = defaultdict(list)
    for report in reports:
        for content, places in report.places.items():
            seen[content].append(places[0])
    return [places for places in seen.values() if len(places) > 1]


def binned(values: Sequence[float]) -> list[tuple[str, int]]:
    """A histogram as (range, count), with integer bounds for integer values."""
    low, high = min(values), max(values)
    if all(isinstance(value, int) for value in values):
        width = max(-(-(high - low + 1) // BINS), 1)
        edges = list(range(int(low), int(high) + 1, int(width)))
        counted = Counter((int(value) - int(low)) // int(width) for value in values)
        return [(f"{edge:,}" + f" to {edge + width - 1:,}" * (width > 1), counted[i]) for i, edge in enumerate(edges)]
    counts, bounds = np.histogram(values, bins=BINS)
    return [(f"{bounds[i]:.3g} to {bounds[i + 1]:.3g}", int(count)) for i, count in enumerate(counts)]


def bars(rows: Sequence[tuple[str, int]]) -> None:
    """Print a bar per row, scaled to the width of the terminal."""
    label = max(len(name) for name, _ in rows)
    number = max(len(f"{count:,}") for _, count in rows)
    room = max(min(shutil.get_terminal_size().columns - label - number - 8, 60), 10)
    most = max(count for _, count in rows) or 1
    for name, count in rows:
        length = -(-count * room // most)
        print(f"    {name:>{label}}  {count:>{number},}  {'█' * length}".rstrip())


def marked(tokenizer: Any, example: Example) -> str:
    """The decoded text of an example, with the trained parts in ⟦ ⟧; truncated after SHOWN characters."""
    targets = [0, *collate([example], 0, multiple=1).targets[0]]
    before, shown, start = "", "", 0
    for target, group in groupby(targets):
        end = start + len(list(group))
        text = tokenizer.decode(example.tokens[:end])
        # The difference to the text before it: decoded by themselves, tokens might lose a leading space.
        piece = text[len(before) :] if text.startswith(before) else tokenizer.decode(example.tokens[start:end])
        before, start = text, end
        shown += green(f"⟦{piece}⟧") if target else piece
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]} … and {len(shown) - SHOWN:,} characters more"


def _styled(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def bold(text: str) -> str:
    """`text` in bold on a terminal."""
    return _styled("1", text)


def green(text: str) -> str:
    """`text` in green on a terminal."""
    return _styled("32", text)


def main() -> None:
    args = parse_args()
    splits = sources(args.data, base_in(args.data, args.data_base))
    tokenizer = open_tokenizer(args.model)
    settings = Settings(feature_names(args), args.mask_prompt, args.max_length, args.rows, args.reader)
    reports = []
    for name, source in splits:
        reports.append(read(name, source, tokenizer, settings))
        show(reports[-1], tokenizer, args.max_length)
        print()
    shared, bad = across(reports), [line for report in reports for line in report.bad]
    if shared:
        print(bold("across the splits"))
        show_repeated("rows in several splits", shared)
        print()
    if bad:
        print(bold("bad lines"))
        print("\n".join(f"  {line}" for line in bad))
        sys.exit(2)
    print(f"no bad line in {sum(len(report.lengths) for report in reports):,} rows")


if __name__ == "__main__":
    run(main)
