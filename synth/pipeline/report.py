"""A run folder's `report.html`: what each stage kept and dropped, pass rates, votes, samples, costs, learning curve.

One file that needs no network: it contains its style, script and data. Any text in it may come from a teacher, so none
is treated as markup, and a Content-Security-Policy allows only its one script (synth/pipeline/report.html, which also
has the table of samples). Any part of a run may be missing; the report says so. It only shows what is in the run
folder; nothing is measured here.

    python -m synth.pipeline.report RUN_FOLDER
"""

import base64
import hashlib
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import cpu

if __name__ == "__main__":
    cpu.enable()  # before mlx is imported

from common.cli import run
from common.errors import UserError
from common.files import atomic_file
from common.parser import Parser
from common.schemas import read_as
from synth.pipeline.charts import Points, bar, bars, curve, intervals
from synth.pipeline.samples import STAGES
from synth.stages import StageRow, load_rows
from training.metrics import read_metrics

# Stage → what is said of the rows it kept.
DONE = {stage.name: stage.outcome for stage in STAGES if stage.outcome} | {"selection": "selected"}
RECORDS = ("config", "ledger", "checkpoints", "evaluation")
HELD_OUT = "held_out.jsonl"
TEMPLATE = Path(__file__).with_suffix(".html")
NUMBER, ROW, COLUMN = ' class="number"', ' scope="row"', ' scope="col"'  # attributes of a cell
NAMED = {"task": "Task", "base_model": "Base model", "teacher_model": "Teacher"}  # of the config, in the summary
LARGEST = 1e300
MOST_BINS = 16  # of pass rates, for a readable histogram
AMOUNTS = ("calls", "cached", "retries", "prompt_tokens", "completion_tokens", "money")


@dataclass(frozen=True)
class Run:
    """A run folder's content. stages: rows of the finished ones; records: those of RECORDS that exist.

    held_out: ids of the samples that chose the checkpoint; curves: training run → (step, mean score).
    """

    name: str
    stages: dict[str, list[StageRow]]
    records: dict[str, dict[str, Any]]
    held_out: set[str]
    curves: dict[str, Points]

    @property
    def missing(self) -> list[str]:
        """The files that do not exist."""
        files = {f"{name}.jsonl": self.stages for name in DONE} | {f"{name}.json": self.records for name in RECORDS}
        names = [file for file, found in files.items() if Path(file).stem not in found]
        return names if self.curves else [*names, "metrics.jsonl with mean_score"]


def write_report(folder: str | Path) -> Path:
    """Write FOLDER/report.html from the folder's current content, replacing an older one.

    Raises UserError if it is not a run folder, or a file in it cannot be read.
    """
    run_found = read_run(folder)
    path = Path(folder) / "report.html"
    # Lone surrogates cannot be encoded: written as references, browsers show them as U+FFFD.
    page = render(run_found).encode("utf-8", "xmlcharrefreplace")
    with atomic_file(path) as temporary:
        temporary.write_bytes(page)
    return path


def read_run(folder: str | Path) -> Run:
    """The run in a folder. Raises UserError.

    Training runs are searched for in it, in its subfolders, and in its --work-model-paths.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the run folder of synth.run")
    stages = {name: _rows(folder / f"{name}.jsonl") for name in DONE if (folder / f"{name}.jsonl").is_file()}
    records = {name: _record(folder / f"{name}.json") for name in RECORDS if (folder / f"{name}.json").is_file()}
    held_out = _rows(folder / HELD_OUT) if (folder / HELD_OUT).is_file() else []
    outside = _text(records.get("config", {}).get("work_model_paths"))
    trainings = [folder, *sorted(path.parent for path in folder.glob("*/metrics.jsonl"))]
    trainings += [Path(outside)] if outside and Path(outside) not in trainings else []
    curves: dict[str, Points] = {path.name: points for path in trainings if (points := _points(read_metrics(path)))}
    found = Run(folder.resolve().name, stages, records, {row["id"] for row in held_out}, curves)
    if not (stages or records or curves):
        raise UserError(f"{folder} holds no run (none of {', '.join(found.missing)}); name the folder of a run")
    return found


def _points(rows: Any) -> list[tuple[float, float]]:
    """(step, mean score) of the rows that have both."""
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    points = [(number(row.get("step")), number(row.get("mean_score"))) for row in rows]
    return [(step, score) for step, score in points if step is not None and score is not None]


def _rows(path: Path) -> list[StageRow]:
    """A stage's rows. A stage without rows has an empty file."""
    return load_rows(path) if path.stat().st_size else []


def _record(path: Path) -> dict[str, Any]:
    return read_as(dict[str, Any], path)


def number(value: Any) -> float | None:
    """A number that JavaScript can represent, or None for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and -LARGEST < value < LARGEST else None


def own_rows(stages: Mapping[str, Sequence[StageRow]]) -> dict[str, list[StageRow]]:
    """Each stage's rows without those that an earlier stage dropped and it only passed on."""
    gone: set[str] = set()
    own = {}
    for name, rows in stages.items():
        own[name] = [row for row in rows if row["id"] not in gone]
        gone |= {row["id"] for row in own[name] if "dropped" in row}
    return own


def samples(stages: Mapping[str, Sequence[StageRow]], held_out: Container[str] = ()) -> list[dict[str, Any]]:
    """Every sample once, as its last stage left it, in order of creation, with the fields of the table."""
    found = {row["id"]: (name, row) for name, rows in own_rows(stages).items() for row in rows}
    return [_sample(row, _outcome(name, row, held_out)) for name, row in found.values()]


def _outcome(stage: str, row: StageRow, held_out: Container[str]) -> str:
    """What happened to a sample, in words. stage: the last that had it."""
    if "dropped" in row:
        return f"{stage}: {row['dropped']}"
    return "selected" if stage == "selection" else "held out" if row["id"] in held_out else f"kept by {stage}"


def _sample(row: StageRow, outcome: str) -> dict[str, Any]:
    votes = row["votes"] if isinstance(row["votes"], dict) else {}
    counted = [(str(answer), count) for answer, count in votes.items() if number(count) is not None]
    return {
        **{name: str(row[name]) for name in ("id", "input", "output", "origin")},
        **{name: _text(row.get(name)) for name in ("parent", "passage", "detail", "outvoted")},
        **{name: number(row.get(name)) for name in ("margin", "rollouts", "solved", "cast")},
        "rate": number(row["pass_rate"]),
        "votes": sorted(counted, key=lambda vote: -vote[1]),
        "outcome": outcome,
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
        "body": "\n".join([_verdict(found), _summary(found), _result(found), _stages(found), _spread(found)]),
        "rows": as_script(samples(found.stages, found.held_out)),
        "end": "\n".join([_ledger(found), _config(found)]),
    }
    # In one pass, so that inserted text is not searched for placeholders.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _hash(element: re.Match[str] | None) -> str:
    assert element is not None, "the template has a style and a script"
    return f"'sha256-{base64.b64encode(hashlib.sha256(element[1].encode()).digest()).decode()}'"


def as_script(content: Any) -> str:
    """JSON that is safe within <script>: no character of it can end the element or start a comment."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def amount(value: Any) -> str:
    """A number as a table shows it: counts as integers, money with four decimals."""
    found = number(value)
    if found is None:
        return "–"
    return f"{found:,}" if isinstance(found, int) else f"{found:,.4f}"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1, total: bool = False, label: str = ""
) -> str:
    """A table of plain text. numbers_from: the first column of numbers; total: the last row is a sum.

    label: of a table that may be wider than the page, which makes it scrollable by keyboard.
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
    """A remark: what a section cannot show, or what its words mean."""
    return f'<p class="quiet">{escape(" ".join(told))}</p>' if told else ""


def verdict(evaluated: Mapping[str, tuple[float, float, float]], questions: Any) -> str:
    """Whether training helped, by how much, and whether that is certain. evaluated: as `_evaluated` returns it."""
    if not {"base", "trained", "difference"} <= evaluated.keys():
        return "No verdict: no evaluation set was read before and after training."
    before, after = evaluated["base"][0], evaluated["trained"][0]
    change, low, high = evaluated["difference"]
    kind = "helped" if low > 0 else "did harm" if high < 0 else ""
    moved = f"the mean score went from {before:.3f} to {after:.3f} ({change:+.3f})"
    interval = f"the 95 % interval of the change, {low:+.3f} to {high:+.3f} on {amount(questions)} questions,"
    if kind:
        return f"Training {kind}: {moved}; {interval} leaves out 0, so chance alone does not explain it."
    return f"It is not certain that training changed anything: {moved}; {interval} includes 0."


def _verdict(found: Run) -> str:
    questions = found.records.get("evaluation", {}).get("questions")
    return f"<p><strong>{escape(verdict(_evaluated(found), questions))}</strong></p>"


def _summary(found: Run) -> str:
    """One paragraph on what was done, and what is missing."""
    settings, own = found.records.get("config", {}), own_rows(found.stages)
    said = [f"{label}: {settings[key]}." for key, label in NAMED.items() if settings.get(key)]
    said += ["Teacher: the offline one."] if settings.get("teacher_url", "") is None else []
    for name, rows in own.items():
        left = sum("dropped" not in row for row in rows)
        made = sum(row["origin"] != "generated" for row in rows) if name == "difficulty" else 0
        of_them = f", {made:,} of all written harder or easier" if made else ""
        said.append(f"{left:,} of {len(rows):,} samples {DONE[name]}{of_them}.")
    total = found.records.get("ledger", {}).get("total")
    if isinstance(total, dict):
        tokens = (number(total.get("prompt_tokens")) or 0) + (number(total.get("completion_tokens")) or 0)
        said.append(f"The teacher was called {amount(total.get('calls'))} times, for {amount(tokens)} tokens.")
    means = {name: values[0] for name, values in _evaluated(found).items()}
    if {"base", "trained"} <= means.keys():
        said.append(
            f"Mean score on the evaluation set: {means['base']:.3f} before training, {means['trained']:.3f} after."
        )
    text = f"<p>{escape(' '.join(said))}</p>" if said else ""
    missing = f"Not in the run folder (yet): {', '.join(found.missing)}."
    return text + (f'<p class="missing">{escape(missing)}</p>' if found.missing else "")


def _evaluated(found: Run) -> dict[str, tuple[float, float, float]]:
    """Mean, low, high of the base model, the trained one and their difference, for those that have all three."""
    record, whole = found.records.get("evaluation", {}), {}
    for key in ("base", "trained", "difference"):
        entry = record[key] if isinstance(record.get(key), dict) else {}
        mean, low, high = (number(entry.get(field)) for field in ("mean", "low", "high"))
        if mean is not None and low is not None and high is not None:
            whole[key] = (mean, low, high)
    return whole


def _result(found: Run) -> str:
    """Base against trained, the checkpoints, and the learning curve."""
    evaluated, figures = _evaluated(found), []
    if evaluated:
        asked = (
            f"Mean score on the {amount(found.records['evaluation'].get('questions'))} questions of the evaluation set"
        )
        rows = [(name, f"{mean:.3f}", f"{low:.3f} to {high:.3f}") for name, (mean, low, high) in evaluated.items()]
        models = {f"{name} model": evaluated[name] for name in ("base", "trained") if name in evaluated}
        figures.append(
            f"<figure><figcaption>{asked}</figcaption>{intervals('Mean score with its interval', models)}"
            + table(["model", "mean score", "95 % interval"], rows)
            + _absent(
                "95 % interval: intervals made in this way hold the mean over all questions of this kind in 95 of 100 "
                "cases. The difference is taken question by question. Both are about the choice of questions, not "
                "about other seeds of training."
            )
            + "</figure>"
        )
    checkpoints = found.records.get("checkpoints", {})
    if points := _points(checkpoints.get("checkpoints")):
        asked = f"Mean score on {amount(checkpoints.get('held_out'))} held-out samples by step"
        figures.append(_curve(f"{asked}: step {amount(checkpoints.get('chosen'))} was chosen", points))
    figures += [_curve(f"Mean score by step: {name}", points) for name, points in found.curves.items()]
    told = [] if evaluated else ["There is no evaluation."]
    told += [] if figures[bool(evaluated) :] else ["There is no learning curve."]
    body = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    return "<h2>Result</h2>" + body + _absent(*told)


def _curve(caption: str, points: Points) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{curve(caption, points)}</figure>"


def _stages(found: Run) -> str:
    """What each stage kept, and what it dropped and why."""
    lines = []
    for name, rows in own_rows(found.stages).items():
        reasons = Counter(str(row["dropped"]) for row in rows if "dropped" in row)
        origins = Counter(str(row["origin"]) for row in rows if "dropped" not in row)
        kept = "kept" if len(origins) < 2 else f"kept: {', '.join(f'{n:,} {origin}' for origin, n in origins.items())}"
        entries = [(kept, origins.total(), "full")]
        entries += [(reason, count, "dropped") for reason, count in reasons.most_common()]
        if name == "difficulty" and found.held_out:
            entries.insert(1, ("of these held out, to choose the checkpoint", len(found.held_out), "full"))
        for place, (label, count, kind) in enumerate(entries):
            head = f'<th scope="rowgroup" rowspan="{len(entries)}">{name}</th>' if not place else ""
            numbers = f"<td{NUMBER}>{count:,}</td><td{NUMBER}>{share(count, len(rows))}</td>"
            drawn = f'<td class="share">{bar(count, len(rows), kind)}</td>'
            lines.append(f"<tr>{head}<td>{escape(label)}</td>{numbers}{drawn}</tr>")
    told = [f"{name}: not finished, no {name}.jsonl." for name in DONE if name not in found.stages]
    head = "".join(f"<th{COLUMN}>{name}</th>" for name in ("stage", "outcome"))
    head += "".join(f"<th{COLUMN}{NUMBER}>{name}</th>" for name in ("samples", "share"))
    body = f'<table class="wide"><thead><tr>{head}<td></td></tr></thead><tbody>{"".join(lines)}</tbody></table>'
    words = (
        "Each stage reads what the one before kept: generate writes samples, verify has the teacher answer them anew "
        "and keeps those on whose answer the votes agree, difficulty measures pass rates of the base model and has "
        "harder and easier ones written, selection takes those to learn from. Held-out ones choose the checkpoint. "
        "Origins: generated samples are the teacher's first; of one that the base model solves it writes a harder one, "
        "of one that it does not an easier one."
    )
    drawn = f'{_absent(words)}<div class="scroll">{body}</div>' if lines else ""
    return "<h2>Kept and dropped</h2>" + drawn + _absent(*told)


def rate_bins(rows: Sequence[StageRow]) -> int:
    """Number of bins for pass rates: the smallest number of rollouts, as 3/8 lies between tenths."""
    tried = [int(n) for row in rows if (n := number(row["rollouts"])) and n >= 1]
    return fewest if tried and (fewest := min(tried)) <= MOST_BINS else 10


def rate_counts(rows: Iterable[StageRow], bins: int) -> list[int]:
    """Samples by pass rate, to the nearest of 0, 1/bins, ..., 1; the end bins: never and always solved."""
    counts = [0] * (bins + 1)
    for row in rows:
        rate = number(row["pass_rate"])
        if rate is not None:
            nearest = math.floor(rate * bins + 0.5)
            counts[min(max(nearest, rate > 0), bins - (rate < 1))] += 1
    return counts


def margin_counts(rows: Iterable[StageRow]) -> list[int]:
    """Samples by margin, in tenths; 1 belongs to the last bin."""
    counts = [0] * 10
    for row in rows:
        margin = number(row["margin"])
        if margin is not None:
            counts[min(max(int(margin * 10 + 1e-9), 0), 9)] += 1
    return counts


def _spread(found: Run) -> str:
    """The histograms of pass rates and of margins."""
    tried = [row for row in found.stages.get("difficulty", []) if "dropped" not in row]
    voted: dict[str, StageRow] = {}  # as the stage that voted left them: what selection drops was kept by the vote
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
    words = (
        "Pass rate: the share of the base model's tries at a sample that it solves. Vote margin: the share of the "
        "teacher's answers that are the most frequent one, less that of the next."
    )
    return "<h2>Pass rates and votes</h2>" + _absent(words) * bool(figures) + body + _absent(*told)


def _histogram(title: str, axis: str, labels: Sequence[str], series: Mapping[str, Sequence[int]]) -> str:
    rows = [[label, *(f"{counts[n]:,}" for counts in series.values())] for n, label in enumerate(labels)]
    numbers = f"<details><summary>As a table</summary>{table([axis, *series], rows)}</details>"
    return f"<figure><figcaption>{title}</figcaption>{bars(title, axis, labels, series)}{numbers}</figure>"


def _ledger(found: Run) -> str:
    """The teacher's calls and their cost, by stage."""
    ledger = {name: count for name, count in found.records.get("ledger", {}).items() if isinstance(count, dict)}
    if not ledger:
        return "<h2>Ledger</h2>" + _absent("There is no ledger.json: the teacher's calls are not known.")
    names = [*(name for name in ledger if name != "total"), *(["total"] if "total" in ledger else [])]
    rows = [[name or "other", *(amount(ledger[name].get(key)) for key in AMOUNTS)] for name in names]
    head = ["stage", *(key.replace("_", " ") for key in AMOUNTS)]
    words = (
        "What the teacher was asked by each stage. Calls: requests sent, retries included. Cached: answers taken from "
        "the cache instead, for which no call was made. Retries: requests sent again after one that failed. Prompt and "
        "completion tokens: those read and those written, as the endpoint counts them. Money: by the prices given, "
        "--price-in and --price-out, in their currency; 0 where none were."
    )
    return "<h2>Ledger</h2>" + _absent(words) + table(head, rows, total="total" in ledger, label="Ledger")


def _config(found: Run) -> str:
    settings = found.records.get("config")
    if settings is None:
        return ""
    rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in settings.items()]
    flags = table(["flag", "value"], rows, numbers_from=2, label="Flags of the run")
    return f"<h2>Config</h2><details><summary>Flags of the run</summary>{flags}</details>"


def main() -> None:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("run_folder", help="of synth.run")
    print(write_report(parser.parse_args().run_folder))


if __name__ == "__main__":
    run(main)
