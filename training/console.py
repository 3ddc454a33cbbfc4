"""What a run shows in a terminal: a table of a few figures, aligned, under a header that repeats.

All figures are in metrics.jsonl, by the names that are keys of COLUMNS here; plots take their titles from the same.
"""

import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple


class Column(NamedTuple):
    """How a metric is shown. form: for format(); narrower figures than the title are as wide as it."""

    title: str
    form: str


# Metric → its column. A metric that is not here is shown under its own name.
COLUMNS = {
    "mean_score": Column("score", ".3f"),
    "true_score": Column("true score", ".3f"),
    "perfect_share": Column("perfect", ".1%"),
    "kl": Column("KL", ".3f"),
    "completion_length": Column("length", ".1f"),
    "eos_share": Column("EOS", ".0%"),
    "seconds": Column("seconds", ",.1f"),
    "kl_coef": Column("KL coefficient", ".4g"),
    "clip_fraction": Column("clipped ratios", ".1%"),
    "train_loss": Column("loss", ".4f"),
    "valid_loss": Column("valid loss", ".4f"),
    "train_accuracy": Column("accuracy", ".1%"),
    "valid_accuracy": Column("valid accuracy", ".1%"),
    "train_chosen_reward": Column("implicit rewards", ".3f"),
    "train_reward_margin": Column("margin", ".3f"),
    "tokens_per_second": Column("tokens/s", ",.0f"),
    "peak_memory_gb": Column("peak GB", ".3f"),
    "planned_memory_gb": Column("planned GB", ".3f"),
}
SPEED = ("tokens_per_second", "peak_memory_gb")  # behind the bar where there is one, else in the table
OPTIONAL = ("true_score",)  # a column only where the run has it
PPO_COLUMNS = ("mean_score", "true_score", "kl", "completion_length", "eos_share", "seconds")
SFT_COLUMNS = ("train_loss", "valid_loss", "train_accuracy", "valid_accuracy")
DPO_COLUMNS = (*SFT_COLUMNS, "train_reward_margin")
MOST = 6  # columns, where none are named
NARROWEST = 7  # characters of a column
HEADER_EVERY = 20  # rows, on a terminal
NO_TERMINAL = (100, 24)  # columns and lines of a file or pipe: room for a DPO run's seven figures


def figure(value: float) -> str:
    """A number with four significant digits and no exponent."""
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{Decimal(f'{value:.4g}'):f}"


def shown(name: str, value: float | None) -> str:
    """A figure as its column has it, with fewer decimals where it would be much wider than others."""
    if value is None:
        return ""
    text = format(value, COLUMNS[name].form) if name in COLUMNS and math.isfinite(value) else figure(value)
    return text if len(text) <= NARROWEST + 2 else figure(value)


def title(name: str) -> str:
    """What a metric is called in tables and pictures."""
    return COLUMNS[name].title if name in COLUMNS else name.replace("_", " ")


class Table:
    """The rows of a run. columns: metrics in their order; none: the first few of the first row."""

    def __init__(self, columns: Sequence[str] = (), verbose: bool = False):
        self.columns, self.verbose, self.rows = list(columns), verbose, 0
        self.names: list[str] = []

    def lines(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """A row as lines to print: the header where it is due, the row and, if verbose, all other figures."""
        first = not self.rows
        if first:
            self.names = self._fitting(figures)
        repeat = sys.stdout.isatty() and self.rows % HEADER_EVERY == 0
        self.rows += 1
        cells = [(title(name), shown(name, figures.get(name))) for name in self.names]
        widths = [max(len(head), NARROWEST) for head, _ in cells]
        lines = []
        if first or repeat:
            lines.append(_line("step", [head for head, _ in cells], widths))
        lines.append(_line(str(step), [cell for _, cell in cells], widths))
        return lines + (self._others(figures) if self.verbose else [])

    def _fitting(self, figures: Mapping[str, float]) -> list[str]:
        """The metrics that become columns: as many as a line has room for."""
        wanted = [name for name in self.columns if name not in OPTIONAL or name in figures]
        wanted = wanted or [name for name in figures if name not in SPEED][:MOST]
        room, names = shutil.get_terminal_size(NO_TERMINAL).columns - len("  step"), []
        for name in wanted:
            room -= max(len(title(name)), NARROWEST) + 2
            if room >= 0:
                names.append(name)
        return names

    def _others(self, figures: Mapping[str, float]) -> list[str]:
        said = [f"{name} {figure(value)}" for name, value in figures.items() if name not in self.names]
        wide = max(shutil.get_terminal_size(NO_TERMINAL).columns, 40)
        indent = " " * 8
        # A figure is never parted from its name.
        text = "  ".join(one.replace(" ", "\N{NO-BREAK SPACE}") for one in said)
        lines = textwrap.wrap(text, wide, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _line(first: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join([f"{first:>6}", *(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))]).rstrip()


def speed(figures: Mapping[str, float]) -> str:
    """Tokens a second and peak memory, as they stand behind a bar; "" where neither is known."""
    said = []
    if "tokens_per_second" in figures:
        said.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    if "peak_memory_gb" in figures:
        planned = f" (planned: {figures['planned_memory_gb']:.3f})" if "planned_memory_gb" in figures else ""
        said.append(f"{figures['peak_memory_gb']:.3f} GB{planned}")
    return ", ".join(said)
