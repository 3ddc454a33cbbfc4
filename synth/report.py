"""A run folder's `report.html`: what each stage kept and dropped, pass rates, votes, samples, costs, learning curve.

One file that needs no network: style, script and data stand in it. Every text in it may be a teacher's, so none is
taken for markup, and a Content-Security-Policy admits that one script only (synth/report.html, which also holds the
table of samples). Any part of a run may be missing; the report says so.
Leaves out everything that is not in the run folder: nothing is measured here.

    python -m synth.report RUN_FOLDER
"""

import base64
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import atomic_file, read_json
from synth.stages import Row, load_rows
from training import config
from training.cli import run
from training.metrics import read_metrics

STAGES = ("generate", "verify", "difficulty", "select")
RECORDS = ("config", "ledger", "evaluation")
TEMPLATE = Path(__file__).with_suffix(".html")
NUMBER, ROW, COLUMN = ' class="number"', ' scope="row"', ' scope="col"'  # attributes of a cell
NAMED = {"task": "Task", "base_model": "Base model", "teacher_model": "Teacher"}  # of the config, in the summary
DONE = {"generate": "readable", "verify": "verified", "difficulty": "kept with a pass rate", "select": "selected"}
LARGEST = 1e300
MOST_BINS = 16  # of pass rates, between which a histogram stays readable
Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 42  # margins around the plot
KINDS = ("open", "full")  # of a first and a second series: told apart without colour
AMOUNTS = ("calls", "cached", "retries", "prompt_tokens", "completion_tokens", "money")


@dataclass(frozen=True)
class Run:
    """What a run folder holds. stages: rows of the finished ones; records: those of RECORDS that are there.

    curves: training run → (step, mean score).
    """

    name: str
    stages: dict[str, list[Row]]
    records: dict[str, dict[str, Any]]
    curves: dict[str, Points]

    @property
    def missing(self) -> list[str]:
        """The files that are not there."""
        files = {f"{name}.jsonl": self.stages for name in STAGES} | {f"{name}.json": self.records for name in RECORDS}
        names = [file for file, found in files.items() if Path(file).stem not in found]
        return names if self.curves else [*names, "metrics.jsonl with mean_score"]


def write_report(folder: str | Path) -> Path:
    """Write FOLDER/report.html from what the folder holds now, in place of an older one.

    Raises UserError where it is no run folder, and for a file in it that cannot be read.
    """
    run_found = read_run(folder)
    path = Path(folder) / "report.html"
    # A lone surrogate is no character: written as a reference, browsers show it as U+FFFD.
    page = render(run_found).encode("utf-8", "xmlcharrefreplace")
    with atomic_file(path) as temporary:
        temporary.write_bytes(page)
    return path


def read_run(folder: str | Path) -> Run:
    """The run in a folder. Training runs are looked for in it and in the folders just below. Raises UserError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name the folder of a run of synth.run")
    stages = {name: _rows(folder / f"{name}.jsonl") for name in STAGES if (folder / f"{name}.jsonl").is_file()}
    records = {name: _record(folder / f"{name}.json") for name in RECORDS if (folder / f"{name}.json").is_file()}
    curves: dict[str, Points] = {}
    for path in [folder / "metrics.jsonl", *sorted(folder.glob("*/metrics.jsonl"))]:
        points = [(number(row.get("step")), number(row.get("mean_score"))) for row in read_metrics(path.parent)]
        scored = [(step, score) for step, score in points if step is not None and score is not None]
        if scored:
            curves[path.parent.name] = scored
    found = Run(folder.resolve().name, stages, records, curves)
    if not (stages or records or curves):
        raise UserError(f"{folder} holds no run (none of {', '.join(found.missing)}); name the folder of a run")
    return found


def _rows(path: Path) -> list[Row]:
    """A stage's rows. A stage that was given none has an empty file."""
    return load_rows(path) if path.stat().st_size else []


def _record(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not an object; restore it or write it anew")
    return content


def number(value: Any) -> float | None:
    """A number that a browser can hold, or None for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and -LARGEST < value < LARGEST else None


def own_rows(stages: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Each stage's rows without those that an earlier one dropped, which it only carries along."""
    gone: set[str] = set()
    own = {}
    for name, rows in stages.items():
        own[name] = [row for row in rows if row["id"] not in gone]
        gone |= {row["id"] for row in own[name] if "dropped" in row}
    return own


def samples(stages: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Every sample once, as the last stage left it, in the order of their making, with the fields of the table."""
    found = {row["id"]: (name, row) for name, rows in own_rows(stages).items() for row in rows}
    return [_sample(name, row) for name, row in found.values()]


def _sample(stage: str, row: Row) -> dict[str, Any]:
    votes = row["votes"] if isinstance(row["votes"], dict) else {}
    counted = [(str(answer), count) for answer, count in votes.items() if number(count) is not None]
    return {
        **{name: str(row[name]) for name in ("id", "input", "output", "origin")},
        **{name: _text(row.get(name)) for name in ("parent", "passage", "dropped", "detail", "outvoted")},
        **{name: number(row.get(name)) for name in ("margin", "rollouts", "solved", "cast")},
        "rate": number(row["pass_rate"]),
        "votes": sorted(counted, key=lambda vote: -vote[1]),
        "stage": stage,
    }


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def render(found: Run) -> str:
    """The page."""
    template = TEMPLATE.read_text(encoding="utf-8")
    style, script = (_hash(re.search(rf"<{tag}>(.*?)</{tag}>", template, re.S)) for tag in ("style", "script"))
    parts = {
        "policy": f"default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'",
        "title": escape(f"Synthetic data: {found.name}"),
        "body": "\n".join([_summary(found), _result(found), _stages(found), _spread(found)]),
        "rows": as_script(samples(found.stages)),
        "end": "\n".join([_ledger(found), _config(found)]),
    }
    # In one pass, so that nothing which was put in is looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _hash(element: re.Match[str] | None) -> str:
    assert element is not None, "the template has a style and a script"
    return f"'sha256-{base64.b64encode(hashlib.sha256(element[1].encode()).digest()).decode()}'"


def as_script(content: Any) -> str:
    """JSON that stays JSON within <script>: no character of it can end the element or begin a comment."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def amount(value: Any) -> str:
    """A number as a table shows it: a count whole, money with four decimals."""
    found = number(value)
    if found is None:
        return "–"
    return f"{found:,}" if isinstance(found, int) else f"{found:,.4f}"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1, total: bool = False, label: str = ""
) -> str:
    """A table of plain text. numbers_from: the first column of numbers; total: the last row is a sum.

    label: of a table that may be wider than the page; with it, it can be scrolled by keyboard.
    """

    def line(cells: Sequence[str], tag: str, scope: str) -> str:
        made = []
        for place, cell in enumerate(cells):
            open_tag = f"{tag}{scope}" if place else f"th{scope or ROW}"
            kind = NUMBER if place >= numbers_from else ""
            made.append(f"<{open_tag}{kind}>{escape(cell)}</{open_tag.split()[0]}>")
        return f"<tr>{''.join(made)}</tr>"

    lines = [line(row, "td", "") for row in rows]
    foot = f"<tfoot>{lines.pop()}</tfoot>" if total and lines else ""
    head_line = line(head, "th", COLUMN)
    region = f' role="region" tabindex="0" aria-label="{escape(label)}"' if label else ""
    content = f"<table><thead>{head_line}</thead><tbody>{''.join(lines)}</tbody>{foot}</table>"
    return f'<div class="scroll"{region}>{content}</div>'


def _absent(*told: str) -> str:
    """What a section cannot show."""
    return f'<p class="quiet">{escape(" ".join(told))}</p>' if told else ""


def _summary(found: Run) -> str:
    """One paragraph of what was done, and what is not there."""
    settings, own = found.records.get("config", {}), own_rows(found.stages)
    said = [f"{label}: {settings[key]}." for key, label in NAMED.items() if settings.get(key)]
    for name, rows in own.items():
        left = sum("dropped" not in row for row in rows)
        made = sum(row["origin"] != "generated" for row in rows) if name == "difficulty" else 0
        of_them = f", {made:,} of all written harder or easier" if made else ""
        said.append(f"{left:,} of {len(rows):,} samples {DONE[name]}{of_them}.")
    total = found.records.get("ledger", {}).get("total")
    if isinstance(total, dict):
        tokens = (number(total.get("prompt_tokens")) or 0) + (number(total.get("completion_tokens")) or 0)
        said.append(f"The teacher was called {amount(total.get('calls'))} times, for {amount(tokens)} tokens.")
    accuracy = {name: score for name, (score, *_) in _evaluated(found).items()}
    if len(accuracy) == 2:
        base, trained = accuracy.values()
        said.append(f"Accuracy on the evaluation set: {base:.3f} before training, {trained:.3f} after.")
    text = f"<p>{escape(' '.join(said))}</p>" if said else ""
    missing = f"Not in the run folder (yet): {', '.join(found.missing)}."
    return text + (f'<p class="missing">{escape(missing)}</p>' if found.missing else "")


def _evaluated(found: Run) -> dict[str, tuple[float, float, float, str]]:
    """Model → accuracy, low, high, n, of those whose evaluation is whole."""
    whole = {}
    for key, name in (("base", "base model"), ("trained", "trained model")):
        entry = found.records.get("evaluation", {}).get(key)
        entry = entry if isinstance(entry, dict) else {}
        values = [v for field in ("accuracy", "low", "high") if (v := number(entry.get(field))) is not None]
        if len(values) == 3:
            whole[name] = (values[0], values[1], values[2], amount(entry.get("n")))
    return whole


def _result(found: Run) -> str:
    """Base against trained, and the learning curve."""
    evaluated, figures = _evaluated(found), []
    if evaluated:
        rows = [(name, f"{a:.3f}", f"{low:.3f}–{high:.3f}", n) for name, (a, low, high, n) in evaluated.items()]
        figures.append(
            "<figure><figcaption>Accuracy on the evaluation set</figcaption>"
            + intervals("Accuracy with its interval", {name: values[:3] for name, values in evaluated.items()})
            + table(["model", "accuracy", "interval", "n"], rows)
            + "</figure>"
        )
    for name, points in found.curves.items():
        caption = f"Mean score by step: {name}"
        figures.append(f"<figure><figcaption>{escape(caption)}</figcaption>{curve(caption, points)}</figure>")
    told = [] if evaluated else ["The evaluation set has not been read."]
    told += [] if found.curves else ["There is no learning curve."]
    body = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    return "<h2>Result</h2>" + body + _absent(*told)


def _stages(found: Run) -> str:
    """What each stage kept, and what it dropped for which reason."""
    lines = []
    for name, rows in own_rows(found.stages).items():
        reasons = Counter(str(row["dropped"]) for row in rows if "dropped" in row)
        origins = Counter(str(row["origin"]) for row in rows if "dropped" not in row)
        kept = "kept" if len(origins) < 2 else f"kept: {', '.join(f'{n:,} {origin}' for origin, n in origins.items())}"
        entries = [(kept, origins.total(), "full")]
        entries += [(reason, count, "dropped") for reason, count in reasons.most_common()]
        for place, (label, count, kind) in enumerate(entries):
            head = f'<th scope="rowgroup" rowspan="{len(entries)}">{name}</th>' if not place else ""
            numbers = f"<td{NUMBER}>{count:,}</td><td{NUMBER}>{share(count, len(rows))}</td>"
            drawn = f'<td class="share">{bar(count, len(rows), kind)}</td>'
            lines.append(f"<tr>{head}<td>{escape(label)}</td>{numbers}{drawn}</tr>")
    told = [f"{name}: not finished, no {name}.jsonl." for name in STAGES if name not in found.stages]
    head = "".join(f"<th{COLUMN}>{name}</th>" for name in ("stage", "outcome"))
    head += "".join(f"<th{COLUMN}{NUMBER}>{name}</th>" for name in ("samples", "share"))
    body = f'<table class="wide"><thead><tr>{head}<td></td></tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return "<h2>Kept and dropped</h2>" + (f'<div class="scroll">{body}</div>' if lines else "") + _absent(*told)


def rate_bins(rows: Sequence[Row]) -> int:
    """How many steps the axis of pass rates has: those of the fewest rollouts, as 3/8 lies between tenths."""
    tried = [int(n) for row in rows if (n := number(row["rollouts"])) and n >= 1]
    return fewest if tried and (fewest := min(tried)) <= MOST_BINS else 10


def rate_counts(rows: Iterable[Row], bins: int) -> list[int]:
    """Samples by pass rate, to the nearest of 0, 1/bins, ..., 1; the ends hold only those never and always solved."""
    counts = [0] * (bins + 1)
    for row in rows:
        rate = number(row["pass_rate"])
        if rate is not None:
            nearest = math.floor(rate * bins + 0.5)
            counts[min(max(nearest, rate > 0), bins - (rate < 1))] += 1
    return counts


def margin_counts(rows: Iterable[Row]) -> list[int]:
    """Samples by margin, in tenths; 1 belongs to the last."""
    counts = [0] * 10
    for row in rows:
        margin = number(row["margin"])
        if margin is not None:
            counts[min(max(int(margin * 10 + 1e-9), 0), 9)] += 1
    return counts


def _spread(found: Run) -> str:
    """The histograms of pass rates and of margins."""
    tried = [row for row in found.stages.get("difficulty", []) if "dropped" not in row]
    voted: dict[str, Row] = {}  # as the stage that voted left them: what selection drops was kept by the vote
    for row in itertools.chain.from_iterable(own_rows(found.stages).values()):
        if number(row["margin"]) is not None:
            voted.setdefault(row["id"], row)
    figures, told = [], []
    if any(number(row["pass_rate"]) is not None for row in tried):
        bins = rate_bins(tried)
        series = {
            "before: as generated": rate_counts((row for row in tried if row["origin"] == "generated"), bins),
            "after: with harder and easier ones": rate_counts(tried, bins),
        }
        labels = [f"{n / bins:.3g}" for n in range(bins + 1)]
        figures.append(_histogram("Pass rates of the base model", "pass rate", labels, series))
    else:
        told.append("No sample has a pass rate.")
    if voted:
        series = {
            "dropped by the vote": margin_counts(row for row in voted.values() if "dropped" in row),
            "kept": margin_counts(row for row in voted.values() if "dropped" not in row),
        }
        labels = [f"{n / 10:.1f}" for n in range(10)]
        figures.append(_histogram("Vote margins", "margin, from", labels, series))
    else:
        told.append("No sample was voted on.")
    body = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    return "<h2>Pass rates and votes</h2>" + body + _absent(*told)


def _histogram(title: str, axis: str, labels: Sequence[str], series: Mapping[str, Sequence[int]]) -> str:
    rows = [[label, *(f"{counts[n]:,}" for counts in series.values())] for n, label in enumerate(labels)]
    numbers = f"<details><summary>As a table</summary>{table([axis, *series], rows)}</details>"
    return f"<figure><figcaption>{title}</figcaption>{bars(title, axis, labels, series)}{numbers}</figure>"


def _ledger(found: Run) -> str:
    """What the teacher was asked and what it cost, by stage."""
    ledger = {name: count for name, count in found.records.get("ledger", {}).items() if isinstance(count, dict)}
    if not ledger:
        return "<h2>Ledger</h2>" + _absent("There is no ledger.json: the teacher's calls are not known.")
    names = [*(name for name in ledger if name != "total"), *(["total"] if "total" in ledger else [])]
    rows = [[name or "other", *(amount(ledger[name].get(key)) for key in AMOUNTS)] for name in names]
    head = ["stage", *(key.replace("_", " ") for key in AMOUNTS)]
    return "<h2>Ledger</h2>" + table(head, rows, total="total" in ledger, label="Ledger")


def _config(found: Run) -> str:
    settings = found.records.get("config")
    if settings is None:
        return ""
    rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in settings.items()]
    flags = table(["flag", "value"], rows, numbers_from=2, label="Flags of the run")
    return f"<h2>Config</h2><details><summary>Flags of the run</summary>{flags}</details>"


# The charts, as inline SVG: colours are classes of the template, because its policy admits no style attribute.


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) that enclose low and high."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if _steps(low, high, factor * power) <= most)
    first = math.floor(low / step + 1e-9)
    return [round(n * step, 12) for n in range(first, first + max(_steps(low, high, step), 1) + 1)]


def _steps(low: float, high: float, step: float) -> int:
    return math.ceil(high / step - 1e-9) - math.floor(low / step + 1e-9)


def bar(count: float, whole: float, kind: str) -> str:
    """A bar that fills its cell by the share of count in whole; the figure stands beside it."""
    width = 100 * count / whole if whole else 0
    drawn = f'<rect width="{width:.2f}%" height="14" class="{kind}"/>'
    return f'<svg width="100%" height="14" aria-hidden="true">{drawn}</svg>'


def bars(title: str, axis: str, labels: Sequence[str], series: Mapping[str, Sequence[int]]) -> str:
    """Counts of two series side by side over the same labels, with a legend."""
    marks = ticks(0, max(1, *(max(counts) for counts in series.values())), 4)
    marks = [mark for mark in marks if mark == int(mark)]
    plot = _Plot((0.0, float(len(labels))), (0.0, marks[-1]))
    drawn = [plot.grid(marks)]
    wide = 0.8 / len(series)
    for place, (name, counts) in enumerate(series.items()):
        for n, count in enumerate(counts):
            if count:
                x, y = plot.x(n + 0.1 + place * wide), plot.y(count)
                size = f'width="{plot.x(wide) - plot.x(0) - 1.5:.1f}" height="{plot.y(0) - y:.1f}"'
                tip = escape(f"{name}: {count:,} at {labels[n]}")
                drawn.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{KINDS[place]}"><title>{tip}</title></rect>')
    every = -(-len(labels) // 11)
    drawn += [plot.below(n + 0.5, label) for n, label in enumerate(labels) if not n % every]
    keys = "".join(
        f'<li><svg width="12" height="12" aria-hidden="true"><rect x="1" y="1" width="10" height="10" class="{kind}"/>'
        f"</svg>{escape(name)} ({sum(counts):,})</li>"
        for (name, counts), kind in zip(series.items(), KINDS, strict=False)
    )
    return f'<ul class="legend">{keys}</ul>' + plot.svg(title, axis, drawn)


def curve(title: str, points: Points, axis: str = "step") -> str:
    """A line through the points (one point: a dot)."""
    xs, ys = zip(*points, strict=True)
    marks, steps = ticks(min(ys), max(ys)), ticks(min(xs), max(xs))
    plot = _Plot((min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1), (marks[0], marks[-1]))
    drawn = [plot.grid(marks), *(plot.below(x, f"{x:g}") for x in steps if min(xs) <= x <= max(xs))]
    if len(points) > 1:
        line = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)
        drawn.append(f'<polyline points="{line}" class="curve"/>')
    for x, y in points if len(points) <= 40 else ():
        drawn.append(
            f'<circle cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="2.5" class="full">'
            f"<title>{y:.4g} at {escape(axis)} {x:g}</title></circle>"
        )
    ends = f"{title}, from {ys[0]:.3g} to {ys[-1]:.3g}"
    return plot.svg(ends, axis, drawn)


def intervals(title: str, values: Mapping[str, tuple[float, float, float]]) -> str:
    """Value, low and high of each name as a dot with a line, on an axis from 0 to 1."""
    height = 34 * len(values) + BOTTOM - 12
    plot = _Plot((0.0, 1.0), (0.0, 1.0), left=112, right=16, height=height)
    drawn = [
        f'<line x1="{plot.x(tick):.1f}" x2="{plot.x(tick):.1f}" y1="4" y2="{height - BOTTOM + 16}" class="grid"/>'
        f'<text x="{plot.x(tick):.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>'
        for tick in (0, 0.25, 0.5, 0.75, 1)
    ]
    for place, (name, (value, low, high)) in enumerate(values.items()):
        y = 20 + 34 * place
        ends = f"M{plot.x(low):.1f} {y}H{plot.x(high):.1f}" + "".join(
            f"M{plot.x(x):.1f} {y - 6}v12" for x in (low, high)
        )
        tip = escape(f"{name}: {value:.3f}, from {low:.3f} to {high:.3f}")
        drawn.append(
            f'<text x="0" y="{y + 4}">{escape(name)}</text><path d="{ends}" class="interval"/>'
            f'<circle cx="{plot.x(value):.1f}" cy="{y}" r="5" class="{KINDS[place % 2]}"><title>{tip}</title></circle>'
        )
    return _svg(title, drawn, height)


def _svg(title: str, drawn: Sequence[str], height: int) -> str:
    named = escape(title, quote=True)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{named}">{"".join(drawn)}</svg>'


class _Plot:
    """Where a value lies in the picture."""

    def __init__(
        self,
        xs: tuple[float, float],
        ys: tuple[float, float],
        left: int = LEFT,
        right: int = RIGHT,
        height: int = HEIGHT,
    ):
        self.xs, self.ys, self.left, self.right, self.height = xs, ys, left, right, height

    def x(self, value: float) -> float:
        low, high = self.xs
        return self.left + (value - low) / (high - low) * (WIDTH - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.ys
        return TOP + (high - value) / (high - low) * (self.height - TOP - BOTTOM)

    def grid(self, marks: Sequence[float]) -> str:
        """Lines at the marks of the upright axis, with their numbers; the lowest is the axis."""
        ends = f'x1="{self.left}" x2="{WIDTH - self.right}"'
        drawn = []
        for place, mark in enumerate(marks):
            y, kind = self.y(mark), "grid" if place else "axis"
            drawn.append(f'<line {ends} y1="{y:.1f}" y2="{y:.1f}" class="{kind}"/>')
            drawn.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
        return "".join(drawn)

    def below(self, value: float, label: str) -> str:
        y = self.height - BOTTOM + 16
        return f'<text x="{self.x(value):.1f}" y="{y}" text-anchor="middle">{escape(label)}</text>'

    def svg(self, title: str, axis: str, drawn: Sequence[str]) -> str:
        middle = (self.left + WIDTH - self.right) / 2
        name = f'<text x="{middle}" y="{self.height - 6}" text-anchor="middle">{escape(axis)}</text>'
        return _svg(title, [*drawn, name], self.height)


def main() -> None:
    parser = config.Parser(__doc__, yaml_file=False)
    parser.add_argument("run_folder", help="where synth.run has written its stages")
    print(write_report(parser.parse_args().run_folder))


if __name__ == "__main__":
    run(main)
