"""How much sooner a PPO step is done by several machines: measured with one and two processes, then by a model of cost.

    python benchmarks/scaling.py                           measures for some 3 minutes; docs/many_macs.md has the result
    python benchmarks/scaling.py --from docs/scaling.json  writes the page's tables and its picture anew

Each process computes with one thread. The same step (the random Llama and the task of benchmarks/ppo_step.py) is taken
by one process, by one process with half of the rows, and by two that share the rows; they take turns, so that a busy
machine slows all alike. From the first two alone, the counted sums and bytes, and the cost of a sum, the model says how
long two take. mlx.launch is not used: its own loop keeps a core busy, and there are two.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.ppo_step import MODELS, SMALL_TASK, Worker, write_tokenizer
from common.cli import run
from common.files import atomic_file, write_json
from common.parser import Parser
from common.ranges import COUNT

KINDS = ("lora", "full")
MODEL = "hidden 256"
SUMS = (1, 2**18, 2**22)  # numbers of float32 that are summed to see what a sum costs
SIZES = (1, 2, 4, 8, 16, 32, 64)
PAGE, BEGIN, END = ROOT / "docs" / "many_macs.md", "<!-- scaling -->", "<!-- end of scaling -->"
PAYS = 1.3  # twice the machines are worth it where a step is done this many times sooner


class Cost(NamedTuple):
    """A phase of a step in seconds: `fixed` however few rows a machine has, and `of_rows` that all rows take it."""

    fixed: float
    of_rows: float

    def at(self, machines: int) -> float:
        """Seconds where so many machines share the rows."""
        return self.fixed + self.of_rows / machines


class Link(NamedTuple):
    """What joins machines: seconds until a message is there, and bytes a second."""

    latency: float
    bandwidth: float

    def sums(self, machines: int, count: float, size: float) -> float:
        """Seconds that `count` sums of `size` bytes together take on a ring, where each machine sends 2 (n - 1)
        messages for a sum, each of an nth of it."""
        steps = 2 * (machines - 1)
        return steps * (count * self.latency + size / machines / self.bandwidth)


class Step(NamedTuple):
    """A PPO step on one machine, and what it gives to sums over several: their number, and bytes."""

    rollout: Cost
    update: Cost
    sums: float
    size: float

    def seconds(self, machines: int, link: Link) -> float:
        """Of the whole step on several machines."""
        shared = link.sums(machines, self.sums, self.size) if machines > 1 else 0.0
        return self.rollout.at(machines) + self.update.at(machines) + shared

    def efficiency(self, machines: int, link: Link) -> float:
        """How many times sooner than on one, for each machine."""
        return self.seconds(1, link) / self.seconds(machines, link) / machines

    def most(self, link: Link) -> int:
        """From how many machines on twice as many do not pay."""
        pays = (n for n in SIZES[:-1] if self.seconds(n, link) / self.seconds(2 * n, link) < PAYS)
        return next(pays, SIZES[-1])

    def limit(self, machines: int, link: Link) -> str:
        """What of a step would still be there if rows cost nothing, and is most of it."""
        parts = {
            "sampling's passes": self.rollout.fixed,
            "updates' fixed cost": self.update.fixed,
            "sums": link.sums(machines, self.sums, self.size),
        }
        return max(parts, key=lambda name: parts[name])


# The network's share of what its name says is a guess on the safe side; latencies are those of a message of TCP, for
# Thunderbolt 5 of jaccl's memory to memory.
LINKS = {
    "1 Gbit/s": Link(200e-6, 0.11e9),
    "10 Gbit/s": Link(100e-6, 1.1e9),
    "40 Gbit/s": Link(50e-6, 4e9),
    "Thunderbolt 5": Link(20e-6, 7e9),
}


def on_paper(
    weights: float, size: float, trained: float, rows: int, prompt: int, new: int, epochs: int, mini_batches: int
) -> Step:
    """A step on a Mac of 500 GB/s that computes 12 Tflop/s, of which training reaches half: counted, not measured.

    weights, trained: numbers; size: bytes of all weights, which every pass of sampling reads, however few rows it has.
    """
    speed, flops = 500e9, 6e12
    tokens, length = rows * new, prompt + new
    rollout = Cost(new * size / speed, 2 * weights * (tokens + 2 * rows * length) / flops)
    moved = 3 * 4 * trained / speed  # Adam reads and writes weights and moments
    update = Cost(epochs * mini_batches * moved, epochs * 6 * weights * rows * length / flops)
    figures = 5 * 4 * tokens
    return Step(rollout, update, epochs * mini_batches + 6, epochs * mini_batches * 4 * trained + figures)


PAPER = {
    "LoRA of 10 million weights on 1 billion": on_paper(1e9, 2e9, 10e6, 64, 200, 256, 4, 4),
    "all weights of 1 billion": on_paper(1e9, 2e9, 1e9, 64, 200, 256, 4, 4),
}


# --- measured ---


def half(task: dict[str, Any]) -> dict[str, Any]:
    """The task with half of its rows, in as many mini batches."""
    return {**task, "prompts": task["prompts"][::2], "mini_batch_size": task["mini_batch_size"] // 2}


@contextmanager
def group(size: int, spec: dict[str, Any]) -> Iterator[Worker]:
    """`size` processes of one thread each, joined by the ring."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks/mlx_step.py"), json.dumps(spec)]
    with closing(Worker(f"{size} of ours", command, one_thread, size)) as worker:
        yield worker


def measure(kind: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Medians over `rounds` of what a step takes, alone, with half of the rows, and by two; and of sums by two."""
    write_tokenizer(tokenizer := folder / "tokenizer.json", MODELS[MODEL]["vocab_size"])
    spec = {"kind": kind, "tokenizer": str(tokenizer), "model": MODELS[MODEL]}
    with (
        group(1, {**spec, "task": SMALL_TASK}) as alone,
        group(1, {**spec, "task": half(SMALL_TASK)}) as of_half,
        group(2, {**spec, "task": SMALL_TASK}) as two,
    ):
        groups = {"alone": alone, "half": of_half, "two": two}
        for each in groups.values():
            each.step()  # the first is slower
        answers = [{name: each.step() for name, each in groups.items()} for _ in range(rounds)]
        sums = {str(count): two.ask(str(count))["seconds"] for count in SUMS}
    steps = {
        name: {key: statistics.median(answer[name][key] for answer in answers) for key in answers[0][name]}
        for name in groups
    }
    speedups = sorted(answer["alone"]["seconds"] / answer["two"]["seconds"] for answer in answers)
    return {**steps, "sums": sums, "speedups": speedups, "blas": alone.ready["blas"]}


def local_link(sums: dict[str, float]) -> Link:
    """The link within this machine: by the smallest sum and the largest, of two processes."""
    (small, first), *_, (large, last) = [(4 * int(count), seconds) for count, seconds in sums.items()]
    return Link(first / 2, (large - small) / (last - first))


def step_of(measured: dict[str, Any]) -> Step:
    """The step by what one process took with all rows and with half of them; sums and bytes are counted."""
    alone, of_half = measured["alone"], measured["half"]

    def cost(name: str) -> Cost:
        of_rows = 2 * (phase(alone, name) - phase(of_half, name))
        return Cost(phase(alone, name) - of_rows, of_rows)

    return Step(cost("rollout"), cost("update"), measured["two"]["sums"], measured["two"]["bytes"])


def phase(figures: dict[str, float], name: str) -> float:
    rollout = figures["rollout_seconds"]
    return rollout if name == "rollout" else figures["seconds"] - rollout


# --- shown ---


def measured_table(measured: dict[str, Any]) -> str:
    """What was measured, and what the model says of it, in Markdown."""
    lines = [
        "| trained | 1 process | 2 processes | by the model | off by | sooner | efficiency | in sums | sums | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, one in measured["kinds"].items():
        step, link, two = step_of(one), local_link(one["sums"]), one["two"]
        said, speedup = step.seconds(2, link), statistics.median(one["speedups"])
        lines.append(
            f"| {kind} | {one['alone']['seconds']:.2f} s | {two['seconds']:.2f} s | {said:.2f} s "
            f"| {said / two['seconds'] - 1:+.0%} | {speedup:.2f} times | {speedup / 2:.0%} "
            f"| {two['waited'] / two['seconds']:.0%} | {two['sums']:.0f} | {two['bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def paper_table() -> str:
    """What the model says of steps that were counted, in Markdown."""
    lines = [
        "| on paper | link | 2 | 4 | 8 | 64 machines | what limits at 8 | twice as many no longer pay from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, step in PAPER.items():
        for link_name, link in LINKS.items():
            shares = " | ".join(f"{step.efficiency(n, link):.0%}" for n in (2, 4, 8, 64))
            most = step.most(link)
            end = f"{most}" if most < SIZES[-1] else "more than 64"
            lines.append(f"| {name} | {link_name} | {shares} | {step.limit(8, link)} | {end} |")
    return "\n".join(lines)


def put_into(page: Path, tables: Sequence[str]) -> None:
    """Put the tables between the page's marks, in place of what is there."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    inner = "\n\n".join(tables)
    with atomic_file(page) as temporary:
        temporary.write_text(f"{before}{mark}\n{inner}\n{end}{after}", encoding="utf-8")


def draw(path: Path) -> None:
    """The efficiency of each step on paper by the number of machines, a line for each link."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(1, len(PAPER), figsize=(8.4, 3.0), sharey=True)
    for axis, (name, step) in zip(axes, PAPER.items(), strict=True):
        for link_name, link in LINKS.items():
            axis.plot(SIZES, [step.efficiency(n, link) for n in SIZES], marker=".", label=link_name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, map(str, SIZES))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("machines")
    axes[0].set_ylim(0, 1.03)
    axes[0].set_ylabel("efficiency")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=COUNT, default=7, help="steps of each group that are measured")
    parser.add_argument("--from", metavar="FILE", help="show what an earlier run wrote there")
    parser.add_argument("--out", metavar="FILE", default="docs/scaling.json", help="what was measured")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    source, out = getattr(args, "from"), Path(args.out)
    if source:
        measured = json.loads(Path(source).read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            kinds = {kind: measure(kind, args.rounds, Path(folder)) for kind in KINDS}
        measured = {"rounds": args.rounds, "kinds": kinds}
        write_json(out, measured)
    draw(PAGE.with_name("scaling.png"))
    tables = [measured_table(measured), paper_table()]
    put_into(PAGE, tables)
    print("\n\n".join(tables))


if __name__ == "__main__":
    run(main)
