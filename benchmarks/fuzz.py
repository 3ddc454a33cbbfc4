# ruff: noqa: E501
"""Fuzzing of every reader: whatever it is given, only a UserError comes out, and in less than a second.

    make setup-optional
    python benchmarks/fuzz.py --inputs 100000 --seed 0

Inputs are made by hypothesis, of pieces that mean something to the reader, with damage. Each reader gets an equal share.
Printed: inputs, the share refused, and the slowest one of each. Exit code 2 with the input where a reader breaks.
"""

import argparse
import json
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from common.cli import run
from common.errors import UserError
from common.parser import Parser, positive
from common.yaml_files import parse_yaml
from data.records import read_rows
from models.adapters import read_adapter
from rewards.answers import answer_type
from rewards.expressions import value
from synth.prompts import NewSample
from synth.task import load_task
from synth.teacher.address import checked_url
from synth.teacher.completions import Ask, read_completion
from synth.teacher.structured import read_json_answer
from training.checkpoint_folders import last_checkpoint, read_state
from training.metrics import read_metrics, resumed_config

SLOWEST = 1.0  # seconds
KINDS = (("prompt", "completion"), ("messages",), ("text", "reward"), ("chosen", "rejected"), ("prompt", "answer"))
PIECES = ["{", "}", "[", "]", ":", ",", '"', "'", "\\", "\\ud800", "\n", " ", "&a ", "*a", "<<: *a", "- ", "? ", "!!int ",
          "1e999", "-0", "9" * 40, "null", "true", "NaN", "prompt", "messages", "role", "user", "content", "reward",
          "instruction", "answer", "number", "input", "output", "\\boxed{", "\\frac{", "^", "(", ")", "<answer>", "####",
          "é", "\u2028", "\x00", "http://", "127.0.0.1", ":99999", "/v1", "@"]  # fmt: skip
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.sampled_from(PIECES) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(PIECES) | st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join) | VALUES.map(
    lambda value: json.dumps(value)
)


class Reader:
    """One reader, as f(text or value). refused: inputs that ended in a UserError; slowest: seconds of one input."""

    def __init__(self, made: Any, read: Callable[[Any], object]):
        self.made, self.read = made, read
        self.inputs = self.refused = 0
        self.slowest = 0.0

    def __call__(self, given: Any) -> None:
        started = time.perf_counter()
        self.inputs += 1
        try:
            self.read(given)
        except UserError as error:
            self.refused += bool(str(error).strip())
        spent = time.perf_counter() - started
        self.slowest = max(self.slowest, spent)
        assert spent < SLOWEST, f"{spent:.1f} s"


def in_file(folder: Path, name: str, read: Callable[[Path], object]) -> Callable[[Any], object]:
    """A reader of files, as one of texts or bytes."""

    def reading(content: str | bytes) -> object:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))
        return read(path)

    return reading


def safetensors(header: str, size: int, rest: bytes) -> bytes:
    """A safetensors file with any header; size: what it says of the header's length, beyond the truth."""
    text = header.encode(errors="replace")
    return struct.pack("<Q", max(len(text) + size, 0)) + text + rest


HEADERS = st.builds(
    lambda shape, kind, offsets: json.dumps({"a": {"dtype": kind, "shape": shape, "data_offsets": offsets}}),
    st.lists(st.integers(-1, 2**62), max_size=3), st.sampled_from(["F32", "BF16", "I64", "X", ""]),
    st.lists(st.integers(-1, 2**40), max_size=3),
)  # fmt: skip


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader by name."""
    bytes_or_text = TEXTS | st.binary(max_size=60)

    def responses(value: Any) -> object:
        choices = [{"message": {"content": value}, "finish_reason": "stop"}]
        return _completion({"choices": choices, "usage": {"prompt_tokens": value, "completion_tokens": value}})

    def rows(path: Path) -> None:
        for kind in KINDS:
            try:
                read_rows(path, [kind], chat=True)
            except UserError:
                continue

    def resumed(path: Path) -> None:
        resumed_config(path.parent)
        read_state(last_checkpoint(path.parent))

    tensors = st.builds(safetensors, TEXTS | HEADERS, st.sampled_from([0, 0, 0, 1, -1, 10**12]), st.binary(max_size=16))
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "num_layers": 1, "lora_parameters":
        {"rank": 1, "scale": 1.0, "dropout": 0.0}}), encoding="utf-8")  # fmt: skip
    run_folder = folder / "run"
    state = run_folder / "checkpoints" / "000001"
    state.mkdir(parents=True)
    (state / "state.json").write_text('{"step": 1}', encoding="utf-8")
    (run_folder / "config.json").write_text("{}", encoding="utf-8")
    named = {kind: answer_type(kind) for kind in ("number", "math", "exact", "json", "choice")}
    return {
        "rows": Reader(bytes_or_text, in_file(folder, "rows.jsonl", rows)),
        "YAML": Reader(TEXTS, lambda text: parse_yaml(text, "f.yaml")),
        "tasks": Reader(TEXTS.map(lambda text: f"instruction: x\n{text}"), in_file(folder, "task.yaml", load_task)),
        "adapter_config.json": Reader(bytes_or_text, in_file(folder, "a/adapter_config.json", lambda p: read_adapter(p.parent))),
        "safetensors": Reader(tensors, in_file(folder, "adapter/adapters.safetensors", lambda p: read_adapter(p.parent))),
        "answers": Reader(TEXTS, lambda text: [(kind.extract(text), kind.score(text, "1")) for kind in named.values()]),
        "expressions": Reader(TEXTS, value),
        "structured answers": Reader(TEXTS, lambda text: read_json_answer(text, NewSample)),
        "teacher's responses": Reader(VALUES, responses),
        "teacher's addresses": Reader(TEXTS, checked_url),
        "config.json on resume": Reader(bytes_or_text, in_file(folder, "run/config.json", resumed)),
        "state.json on resume": Reader(bytes_or_text, in_file(folder, "run/checkpoints/000001/state.json",
                                                              lambda p: read_state(p.parent))),
        "metrics.jsonl": Reader(bytes_or_text, in_file(folder, "run/metrics.jsonl", lambda p: read_metrics(p.parent))),
    }  # fmt: skip


def _completion(response: dict[str, Any]) -> object:
    from synth.teacher.pace import Fault  # what a response that is none becomes

    try:
        return read_completion(response, Ask([{"content": "q"}], NewSample), str)
    except Fault as fault:
        raise UserError(fault.reason) from None


def fuzz(reader: Reader, inputs: int, number: int) -> None:
    """Give a reader `inputs` inputs. Raises what it raises, but for UserError."""
    while reader.inputs < inputs:
        few = min(inputs - reader.inputs, 1000)  # of one seed: hypothesis slows down with what it has seen
        settled = settings(
            max_examples=few, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        seed(number * 1_000_003 + reader.inputs)(settled(given(reader.made)(lambda value: reader(value))))()


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs, of all readers together")
    parser.add_argument("--only", metavar="READER", help="one reader alone")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    args = parser.parse_args()
    positive("inputs", args.inputs)
    return args


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = readers(Path(folder))
        if args.only:
            if args.only not in found:
                raise UserError(f"--only {args.only!r} is no reader; use one of {', '.join(found)}")
            found = {args.only: found[args.only]}
        print("| reader | inputs | refused | slowest, s |\n|---|---|---|---|", flush=True)
        for name, reader in found.items():
            fuzz(reader, -(-args.inputs // len(found)), args.seed)
            print(f"| {name} | {reader.inputs:,} | {reader.refused / reader.inputs:.0%} | {reader.slowest:.3f} |", flush=True)


if __name__ == "__main__":
    run(main)
