"""Stage 6: the samples that the base model is trained on, chosen by its pass rates.

    band     within a band of pass rates, ranked by p (1 - p): where a group's rewards differ most, so does its gradient
    lowest   the paper's rule (arXiv:2505.17063): the lowest pass rates; never solved in or out, always solved out
    random   any; the baseline for the other two

Equal ranks are drawn by the seed, so that samples written first have no advantage.

    python -m synth.pipeline.selection --in tried.jsonl --out selected.jsonl --count 500

Not here: measuring pass rates (see synth/pipeline/pass_rates.py).
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import run
from common.errors import UserError
from common.parser import Parser
from common.ranges import COUNT, SEED, SHARE
from synth.stages import StageRow, drop, kept, load_rows, summary, write_rows

RULES = ("band", "lowest", "random")


@dataclass(frozen=True)
class Selection:
    """count: samples wanted. band: lowest and highest pass rate, for "band". never_solved: included, for "lowest".

    Raises UserError for invalid values.
    """

    count: int = 500
    rule: str = "band"
    band: tuple[float, float] = (0.05, 0.95)
    never_solved: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.rule not in RULES:
            raise UserError(f"--rule is {self.rule!r}; use one of {', '.join(RULES)}")
        if self.count < 1 or not 0 <= self.band[0] <= self.band[1] <= 1:
            raise UserError(f"--count {self.count} and --band {self.band}: at least 1; 0 to 1, the lower first")


def select(rows: Sequence[StageRow], selection: Selection = Selection()) -> list[StageRow]:
    """All rows in order; those not selected are dropped with the reason.

    Raises UserError for a row that was never tried, unless rows are drawn at random.
    """
    reason_of, worth = _rule(selection)
    if selection.rule != "random":
        _check_tried(kept(rows))
    reasons = {row["id"]: reason_of(row) for row in kept(rows)}
    rows = [drop(row, reasons[row["id"]], _rate(row)) if reasons.get(row["id"]) else row for row in rows]
    order = sorted(kept(rows), key=lambda row: row["id"])
    random.Random(selection.seed).shuffle(order)
    order.sort(key=worth, reverse=True)
    chosen = {row["id"] for row in order[: selection.count]}
    reason = "not drawn" if selection.rule == "random" else f"ranked below the first {selection.count}"
    return [row if "dropped" in row or row["id"] in chosen else drop(row, reason) for row in rows]


def selected_or_lowest(rows: Sequence[StageRow], selection: Selection = Selection()) -> list[StageRow]:
    """As `select`; where that leaves none, the lowest pass rates are taken instead, with a printed warning.

    Raises UserError, which says what was measured, if there is nothing to learn from by either rule.
    """
    chosen = select(rows, selection)
    if kept(chosen) or not kept(rows):
        return chosen
    measured = _measured(kept(rows))
    lowest = select(rows, replace(selection, rule="lowest"))
    if not kept(lowest):
        never = not selection.never_solved and any(row["pass_rate"] == 0 for row in kept(rows))
        remedy = "leave out --no-never-solved" if never else "give a harder task, a weaker base model or --rule random"
        raise UserError(f"{measured}: nothing is left to learn from; {remedy}")
    print(f"warning: {measured}; training on the lowest pass rates instead of --rule {selection.rule}", flush=True)
    return lowest


def _measured(rows: Sequence[StageRow]) -> str:
    """What the base model made of the samples, in words."""
    rates, tries = [row["pass_rate"] for row in rows], [row["rollouts"] for row in rows]
    shown = f"{min(tries)}" if min(tries) == max(tries) else f"{min(tries)} to {max(tries)}"
    return (
        f"of {len(rows)} samples the base model solved {rates.count(0)} never and {rates.count(1)} always, in {shown} "
        f"rollouts each (pass rates {min(rates):.2f} to {max(rates):.2f})"
    )


def _rate(row: StageRow) -> str:
    return f"pass rate {row['pass_rate']:.2f}"


def _rule(selection: Selection) -> tuple[Callable[[StageRow], str], Callable[[StageRow], float]]:
    """Why a row cannot be selected (empty: it can), and what it is ranked by."""
    low, high = selection.band

    def out_of_band(row: StageRow) -> str:
        return "" if low <= row["pass_rate"] <= high else "pass rate outside the band"

    def not_potential(row: StageRow) -> str:
        if row["pass_rate"] == 1:
            return "always solved"
        return "never solved" if row["pass_rate"] == 0 and not selection.never_solved else ""

    if selection.rule == "band":
        return out_of_band, lambda row: row["pass_rate"] * (1 - row["pass_rate"])
    if selection.rule == "lowest":
        return not_potential, lambda row: -row["pass_rate"]
    return lambda row: "", lambda row: 0.0


def _check_tried(rows: Sequence[StageRow]) -> None:
    for row in rows:
        if row["pass_rate"] is None:
            raise UserError(
                f"row {row['id']} has no pass rate; run synth.pipeline.difficulty first, or use --rule random"
            )


def band_of(given: Sequence[float]) -> tuple[float, float]:
    """--band as a pair. Raises UserError unless it has two values."""
    if len(given) != 2:
        raise UserError(f"--band has {len(given)} values; give the lowest and the highest pass rate")
    return given[0], given[1]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--in", required=True, metavar="FILE", help="rows with pass rates")
    parser.add_argument("--out", required=True, metavar="FILE", help="all rows, with the reason for those not selected")
    parser.add_argument("--count", type=COUNT, default=Selection.count, help="samples to select")
    parser.add_argument(
        "--rule",
        choices=RULES,
        default=Selection.rule,
        help="of selection: by a band of pass rates, the lowest ones, or at random",
    )
    parser.add_argument("--band", type=SHARE, nargs="+", default=list(Selection.band), help="lowest, highest pass rate")
    parser.add_argument("--no-never-solved", action="store_true", help="lowest: exclude samples that were never solved")
    parser.add_argument("--seed", type=SEED, default=0, help="of ties and of the random rule")
    args = parser.parse_args()
    selection = Selection(args.count, args.rule, band_of(args.band), not args.no_never_solved, args.seed)
    rows = selected_or_lowest(kept(load_rows(getattr(args, "in"))), selection)
    write_rows(args.out, rows)
    print(f"{summary('selection', rows)}\n{args.out}")


if __name__ == "__main__":
    run(main)
