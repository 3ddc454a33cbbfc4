"""Stage 6: the samples that the base model is trained on, by its pass rates.

    band     within a band of pass rates, ranked by p (1 - p): where a group's rewards differ most, so does its gradient
    lowest   the paper's rule (arXiv:2505.17063): the lowest pass rates; those never solved in or out, always solved out
    random   any; what the other two have to beat

Equal ranks are drawn by the seed, so that the first written have no advantage. (Not called select.py: that is a module
of the standard library.) Leaves out measuring pass rates (synth/pipeline/difficulty.py).

    python -m synth.pipeline.selection --in tried.jsonl --out selected.jsonl --count 500
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.cli import run
from common.errors import UserError
from common.parser import Parser
from synth.stages import Row, drop, kept, load_rows, summary, write_rows

RULES = ("band", "lowest", "random")


@dataclass(frozen=True)
class Selection:
    """count: samples wanted. band: lowest and highest pass rate, for "band". never_solved: in, for "lowest"."""

    count: int = 500
    rule: str = "band"
    band: tuple[float, float] = (0.05, 0.95)
    never_solved: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.rule not in RULES:
            raise UserError(f"--rule is {self.rule!r}; use one of {', '.join(RULES)}")
        if self.count < 1 or not 0 <= self.band[0] <= self.band[1] <= 1:
            raise UserError(f"--count {self.count} and --band {self.band}: at least 1; from 0 to 1, the lower first")


def select(rows: Sequence[Row], selection: Selection = Selection()) -> list[Row]:
    """All rows in their order, those that are not selected dropped with the reason.

    Raises UserError where a row was never tried, unless they are drawn at random.
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


def _rate(row: Row) -> str:
    return f"pass rate {row['pass_rate']:.2f}"


def _rule(selection: Selection) -> tuple[Callable[[Row], str], Callable[[Row], float]]:
    """Why a row cannot be selected (empty: it can), and how much it is worth."""
    low, high = selection.band

    def out_of_band(row: Row) -> str:
        return "" if low <= row["pass_rate"] <= high else "pass rate outside the band"

    def not_potential(row: Row) -> str:
        if row["pass_rate"] == 1:
            return "always solved"
        return "never solved" if row["pass_rate"] == 0 and not selection.never_solved else ""

    if selection.rule == "band":
        return out_of_band, lambda row: row["pass_rate"] * (1 - row["pass_rate"])
    if selection.rule == "lowest":
        return not_potential, lambda row: -row["pass_rate"]
    return lambda row: "", lambda row: 0.0


def _check_tried(rows: Sequence[Row]) -> None:
    for row in rows:
        if row["pass_rate"] is None:
            raise UserError(
                f"row {row['id']} has no pass rate; run synth.pipeline.difficulty first, or take --rule random"
            )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--in", required=True, metavar="FILE", help="rows with pass rates")
    parser.add_argument("--out", required=True, metavar="FILE", help="the rows, those not selected with the reason")
    parser.add_argument("--count", type=int, default=Selection.count, help="samples to select")
    parser.add_argument("--rule", choices=RULES, default=Selection.rule, help="see above")
    parser.add_argument("--band", type=float, nargs="+", default=list(Selection.band), help="lowest, highest pass rate")
    parser.add_argument("--no-never-solved", action="store_true", help="lowest: leave out what was never solved")
    parser.add_argument("--seed", type=int, default=0, help="of ties and of the random rule")
    args = parser.parse_args()
    if len(args.band) != 2:
        raise UserError(f"--band has {len(args.band)} values; give the lowest and the highest pass rate")
    band = (args.band[0], args.band[1])
    rows = select(
        kept(load_rows(getattr(args, "in"))),
        Selection(args.count, args.rule, band, not args.no_never_solved, args.seed),
    )
    write_rows(args.out, rows)
    print(f"{summary('select', rows)}\n{args.out}")


if __name__ == "__main__":
    run(main)
