# ruff: noqa: E501
"""Fuzzing of every reader: whatever it is given, only a UserError comes out, and in less than a second.

    make setup-optional
    python -m benchmarks.fuzz --inputs 1000000 --output fuzz.json
    python -m benchmarks.fuzz --inputs 1000000 --output fuzz.json --seconds 400      and again, to go on

Examples of each reader, and some by hypothesis (one input in 50), are damaged from a seed (benchmarks.mutations). Each
reader gets an equal share, in blocks; a block depends on its reader, its number and --seed alone. Printed: inputs, the
share refused, and the slowest one. Exit code 2 where a reader broke; the file of results then holds the inputs.
"""

import argparse
import json
import math
import os
import random
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from models import cpu

cpu.enable()  # before mlx is imported

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.mutations import PIECES, Mutator
from common.cli import run
from common.errors import UserError
from common.files import read_json, write_json
from common.parser import Parser
from common.ranges import COUNT, SEED
from common.schemas import conforming, read_as
from common.yaml_files import parse_yaml
from data.examples import LANGUAGE_ROWS, PREFERENCE_ROWS, PROMPT_ROWS
from data.records import read_rows
from data.sources import contents
from models.adapter_config import CONFIG_FILE, WEIGHTS_FILE
from models.adapters import read_adapter
from models.export.model_card import PROVENANCE_FILE, provenance_of, write_card
from models.value_head import load_value_head
from rewards.answer_reward import answer_options
from rewards.answers import answer_type
from rewards.expressions import value
from synth.evolution.files import load_policy, make_policy, save_policy
from synth.pipeline.evaluation import evaluate, evaluation_line
from synth.prompts import Keywords, NewSample, Score
from synth.sampler import Sampler
from synth.stages import load_rows, new_row
from synth.task import load_task
from synth.teacher.address import checked_url
from synth.teacher.completions import Ask, read_completion
from synth.teacher.limits import Count, Ledger
from synth.teacher.pace import Fault, retry_after
from synth.teacher.structured import read_json_answer
from synth.tuning.config import config_from, load_config
from synth.tuning.tuner import RLTuner
from training.checkpoint_folders import DAMAGED, last_checkpoint, read_state
from training.flags import resumed
from training.metrics import read_metrics, resumed_config
from training.ppo_flags import ppo_parser, ppo_settings
from training.ppo_loop import PPOState
from training.settings import PPOSettings
from training.sft_flags import sft_parser, sft_settings
from training.sft_loop import SFTState
from training.signs import Signs

ROOT = Path(__file__).resolve().parent.parent
SLOWEST = 1.0  # seconds
PATIENCE = 30.0  # seconds, after which an input is given up
BLOCK = 2000  # inputs of one seed
BY_HYPOTHESIS = 40  # of a block
KEPT = 5  # inputs that broke a reader, in the file of results
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.sampled_from(PIECES) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(PIECES) | st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join) | VALUES.map(json.dumps)


class Reader(NamedTuple):
    """One reader, as f(text, bytes or value), and what its inputs are made of."""

    read: Callable[[Any], object]
    examples: Sequence[Any]
    strategy: Any = TEXTS


@dataclass
class Found:
    """What a reader went through. refused: inputs that ended in a UserError; slowest: seconds of one input, in which
    this process had the CPU."""

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    broken: list[str] = field(default_factory=list)

    def give(self, reader: Reader, content: Any) -> None:
        """Give the reader one input."""
        self.inputs += 1
        spent, refused = self._timed(reader, content)
        if spent > SLOWEST / 2:  # perhaps it imported
            spent = min(spent, self._timed(reader, content)[0])
        self.slowest, self.refused = max(self.slowest, spent), self.refused + refused
        if spent > SLOWEST:
            self._broke(content, f"{spent:.1f} s")

    def _timed(self, reader: Reader, content: Any) -> tuple[float, bool]:
        started, refused = time.process_time(), False
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            reader.read(content)
        except UserError as error:
            refused = bool(str(error).strip())
        except Exception as error:  # noqa: BLE001  (what it looks for)
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._broke(content, f"{type(error).__name__}: {error!s:.200} ({Path(place.filename).name}:{place.lineno})")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return time.process_time() - started, refused

    def _broke(self, content: Any, why: str) -> None:
        if len(self.broken) < KEPT:
            self.broken.append(f"{why}: {content!r:.3000}")


class GivenUp(Exception):
    """An input took longer than PATIENCE."""


def give_up(number: int, frame: object) -> None:
    """What the timer calls."""
    raise GivenUp


def in_file(path: Path, read: Callable[[Path], object]) -> Callable[[Any], object]:
    """A reader of files, as one of texts or bytes. read: takes the file's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def reading(content: str | bytes) -> object:
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))
        return read(path.parent)

    return reading


def safetensors(arrays: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A .safetensors file of arrays by name: type, shape, content."""
    header, rest = {}, b""
    for name, (kind, shape, content) in arrays.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(rest), len(rest := rest + content)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def lines(*paths: str) -> list[str]:
    """The first few lines of files, each alone and all together."""
    texts = [(ROOT / path).read_text(encoding="utf-8").split("\n")[:3] for path in paths]
    return [*(line for text in texts for line in text if line), *map("\n".join, texts)]


LORA = {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
RUN = {"script": "sft.py", "flags": {"model": "a/b", "data": "data", "iters": 3}, "figures": {"loss": 0.5, "step": 3}}
ADAPTER = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": LORA, "model": "a/b", "provenance": [RUN]}
PEFT = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "lora_dropout": 0.0, "use_dora": False, "bias": "none",
        "base_model_name_or_path": "a/b", "target_modules": ["q_proj"], "layers_to_transform": [0]}  # fmt: skip
BEST = {"step": 2, "value": 0.5, "higher": True, "stale": 0}
PPO_STATE = {"step": 3, "kl_coef": 0.2, "lr_factor": 1.0, "seconds": 2.5, "best": BEST,
             "moments": {"count": 24, "mean": 0.5, "squares": 1.5}}  # fmt: skip
SFT_STATE = {"step": 3, "window": [1.0, 2.0], "interval": [0.0], "train_loss": 0.5, "warned": False, "skipped": 0,
             "best": {**BEST, "higher": False}}  # fmt: skip
ROWS = [
    {"text": "2 4 6"}, {"prompt": "a", "completion": "b"}, {"chosen": "a", "rejected": "b", "prompt": "c"},
    {"text": "2", "reward": 0.5}, {"prompt": "2 + 2", "answer": 4}, {"prompt": [{"role": "user", "content": "a"}], "answer": "A"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"type": "function"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]  # fmt: skip
ANSWERS = [
    "so 12 * 6 = 72.\n####72", "The answer is (B).", "<answer>1/2</answer>", "\\boxed{\\frac{1}{\\sqrt{2}}}", "A or B", "1,000.50 %",
    "x = \\left(3, -\\infty\\right] \\cup \\{1\\}", "2^{10}!", '```json\n{"a": [1]}\n```', "Answer: 3 or 4", "3 \\times 10^{-2}",
]  # fmt: skip
TYPES = [
    "number", "math", "exact", "json", "choice", '{"type": "label", "labels": ["yes", "no"]}', "constraints",
    '{"type": "regex", "pattern": "(a+)b"}',
]  # fmt: skip
ANSWER_TYPES = [answer_type(kind) for kind in ("number", "math", "exact", "json", "choice", "constraints")]
REPLIES = ['{"input": "1 + 1", "output": "2"}', 'Here: ```json\n{"input": "a", "output": 3,}\n```', '{"keywords": ["a", "b"]}',
           "{'score': 7}", "<think>no</think> {\"score\": 3}", "I am sorry, I cannot help with that."]  # fmt: skip
RESPONSE = {"choices": [{"message": {"content": '{"input": "a", "output": "b"}', "refusal": None}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "error": None}  # fmt: skip
MEAN = {"mean": 0.5, "low": 0.25, "high": 0.75}
EVALUATION = {"model": "a/b", "questions": 3, "base": MEAN, "trained": MEAN, "difference": MEAN, "mcnemar_p": 0.5}
URLS = ["http://127.0.0.1:8000/v1", "https://user:word@[::1]:1/v1?a=b#c", "http://a..b.example:99999/", "ftp://a"]
TUNER = "task: digits\nsft_iters: 6\nrl_tuning: {enable_rl_tuning: true, num_iterations: 3}\ntemplates: [plain]\nseed: 3\n"


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader by name. folder: empty, for their files."""
    tasks = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "synth/tasks").glob("*.yaml"))]
    tasks = [text.replace("../../data", str(ROOT / "data")) for text in tasks]
    numbers = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
    weights = safetensors({"model.layers.0.self_attn.q_proj.lora_a": ("F32", [4, 1], numbers),
                           "model.layers.0.self_attn.q_proj.lora_b": ("F32", [1, 4], numbers)})  # fmt: skip
    head = safetensors({"weight": ("F32", [1, 4], numbers)})
    header = weights[8 : -2 * len(numbers)].decode()
    for name in ("adapter", "tensors", "headers"):
        (folder / name).mkdir()
        (folder / name / WEIGHTS_FILE).write_bytes(weights)
        (folder / name / CONFIG_FILE).write_text(json.dumps(ADAPTER), encoding="utf-8")
    (folder / "adapter/adapter_model.safetensors").write_bytes(weights)
    resumes, configs = {}, {}
    scripts: dict[str, Any] = {"sft": (sft_parser(""), sft_settings, ["--train"]),
                               "ppo": (ppo_parser(""), ppo_settings, ["--ground-truth-reward"])}  # fmt: skip
    for name, (parser, settle, words) in scripts.items():
        (folder / name / "checkpoints/000001").mkdir(parents=True)
        resumes[name], configs[name] = resuming(parser, settle, words, folder / name)
    unused: Any = None
    tuner = tuner_in(folder / "tuner")
    saved_tuner = (folder / "tuner/tuner.json").read_text(encoding="utf-8")
    save_policy(folder / "policy", make_policy("ppo"))
    saved_policy = (folder / "policy/policy.json").read_text(encoding="utf-8")
    metrics = [{"step": n, "mean_score": 0.5, "kl": 0.1, "tokens_per_second": None, "lr": 1e-5} for n in range(31)]
    return {
        "rows": Reader(in_file(folder / "rows.jsonl", rows), [*map(json.dumps, ROWS), *lines(
            "data/increasing_mult_2_train.jsonl", "data/arithmetic_test.jsonl"), b'{"text": "\xff"}']),
        "YAML": Reader(lambda text: parse_yaml(text, "f.yaml"), [*tasks, TUNER, "a: &a [1]\nb: *a\nc: {<<: {d: 1}}"]),
        "tasks": Reader(in_file(folder / "task.yaml", lambda at: load_task(at / "task.yaml")), tasks),
        "tuner's settings": Reader(in_file(folder / "tuner.yaml", lambda at: load_config(at / "tuner.yaml")), [TUNER]),
        "adapter_config.json": Reader(in_file(folder / "adapter" / CONFIG_FILE, read_adapter),
                                      [json.dumps(ADAPTER), json.dumps(PEFT), b"{}"]),
        "safetensors": Reader(in_file(folder / "tensors" / WEIGHTS_FILE, read_adapter), [weights], st.binary(max_size=80)),
        "safetensors headers": Reader(lambda text: headed(folder / "headers", text, 2 * numbers), [header]),
        "value heads": Reader(in_file(folder / "head/value_head.safetensors", lambda at: load_value_head(at, 4)), [head],
                              st.binary(max_size=80)),
        "provenance.json": Reader(in_file(folder / "base" / PROVENANCE_FILE, lambda at: write_card(
            folder / "card", "name", "base", provenance_of(at, []), False)), [json.dumps([RUN]), json.dumps([RUN, RUN])]),
        "answers": Reader(answers, ANSWERS),
        "answer types": Reader(answer_options_of, TYPES),
        "expressions": Reader(value, ANSWERS),
        "structured answers": Reader(lambda text: [read_json_answer(text, s) for s in (NewSample, Keywords, Score)], REPLIES),
        "teacher's responses": Reader(completion, [RESPONSE], VALUES),
        "teacher's addresses": Reader(checked_url, URLS),
        "Retry-After": Reader(lambda text: retry_after({"retry-after": text}, 0.0),
                              ["120", "1.5", "Wed, 21 Oct 2026 07:28:00 GMT", "-1"]),
        "config.json on resume, SFT": Reader(resumes["sft"], [configs["sft"]]),
        "config.json on resume, PPO": Reader(resumes["ppo"], [configs["ppo"]]),
        "state.json on resume, SFT": Reader(in_file(folder / "sft/checkpoints/000001/state.json", state_as(SFTState)),
                                            [json.dumps(SFT_STATE)]),
        "state.json on resume, PPO": Reader(in_file(folder / "ppo/checkpoints/000001/state.json", state_as(PPOState)),
                                            [json.dumps(PPO_STATE)]),
        "tuner.json on resume": Reader(in_file(folder / "tuner/tuner.json", tuner.load), [saved_tuner]),
        "policy.json on resume": Reader(in_file(folder / "policy/policy.json", load_policy), [saved_policy]),
        "ledger.json on resume": Reader(in_file(folder / "ledger.json", lambda at: Ledger().restore(
            read_as(dict[str, Count], at / "ledger.json"))), [json.dumps({"answer": vars(Count()), "total": vars(Count(3))})]),
        "evaluation.json on resume": Reader(in_file(folder / "evaluation.json", lambda at: evaluation_line(
            evaluate(unused, unused, at, at, unused))), [json.dumps(EVALUATION)]),
        "rows of a stage": Reader(in_file(folder / "verify.jsonl", lambda at: load_rows(at / "verify.jsonl")),
                                  [json.dumps(new_row("1", "a", "b", "generated"))]),
        "a data set's description": Reader(in_file(folder / "arrow/state.json", lambda at: list(contents(at))),
                                           ['{"_data_files": [{"filename": "a.arrow"}]}']),
        "metrics.jsonl on resume": Reader(in_file(folder / "ppo/metrics.jsonl", lambda at: Signs(PPOSettings(), read_metrics(at))),
                                          ["\n".join(map(json.dumps, metrics)), json.dumps(metrics[0])]),
    }  # fmt: skip


def resuming(
    parser: Parser, settle: Callable[[argparse.Namespace], object], words: list[str], folder: Path
) -> tuple[Callable[[Any], object], str]:
    """What a script does with the config.json of a run that it is to resume, and an example of one."""
    args = parser.parse_args([*words, "--resume", str(folder)])
    read = in_file(folder / "config.json", lambda at: settle(resumed(parser, args, resumed_config(at))))
    return read, json.dumps({**vars(args), "resume": None})


def tuner_in(folder: Path) -> RLTuner:
    """A tuner that was saved in a folder after one iteration."""
    tuning = {"enable_rl_tuning": True, "baseline": 0.5}
    config = config_from({"rl_tuning": tuning}, "")
    generator: Any = SimpleNamespace(sampler=Sampler(config.space, config.settings, config.templates))
    tuner = RLTuner(config, lambda rows: {"accuracy": 1.0}, [], generator)
    tuner.history.append(tuner._baseline(1))
    tuner.agent.propose(tuner.history[0].outcome)
    tuner.save(folder)
    return tuner


def rows(folder: Path) -> None:
    """What each kind of training does with a file of rows. Raises UserError if none takes them."""
    refused = None
    for kinds in (LANGUAGE_ROWS, PREFERENCE_ROWS, PROMPT_ROWS):
        try:
            read_rows(folder / "rows.jsonl", kinds, chat=True)
            return
        except UserError as error:
            refused = error
    assert refused
    raise refused


def answers(text: str) -> None:
    """Every kind of answer in a completion, and its score."""
    for kind in ANSWER_TYPES:
        kind.extract(text)
        kind.score(text, "1" if kind.readable("1") else '{"max_words": 3}')


def answer_options_of(text: str) -> None:
    """An answer type by its text, and what it does with a completion."""
    options = answer_options(text)
    kind = answer_type(options.pop("type"), **options)
    if kind.readable("1"):
        kind.score("the answer is aaab", "1")


def state_as(kind: Any) -> Callable[[Path], object]:
    """A reader of a checkpoint's state, as a kind of run takes it."""
    return lambda folder: conforming(kind, read_state(last_checkpoint(folder.parent.parent)), folder, DAMAGED)


def completion(response: Any) -> None:
    """A teacher's response, with a schema and without."""
    if not isinstance(response, dict):
        response = {"choices": [{"message": {"content": response}}], "usage": response}
    for schema in (NewSample, None):
        try:
            read_completion(response, Ask([{"content": "q"}], schema), lambda text: text)
        except Fault as fault:
            raise UserError(fault.reason) from None


def headed(folder: Path, text: str, rest: bytes) -> None:
    """An adapter whose tensors have a header that is `text`."""
    header = text.encode(errors="replace")
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + rest)
    read_adapter(folder)


def fuzz_block(name: str, reader: Reader, number: int, found: Found) -> None:
    """Give a reader the inputs of one block."""
    rng = random.Random(f"{name} {number}")
    drawn: list[Any] = []
    settled = settings(
        max_examples=BY_HYPOTHESIS, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    seed(rng.randrange(2**31))(settled(given(reader.strategy)(lambda content: drawn.append(content))))()
    mutator = Mutator(rng, reader.examples, drawn)
    for content in drawn[:BY_HYPOTHESIS]:
        found.give(reader, content)
    for _ in range(BLOCK - len(drawn[:BY_HYPOTHESIS])):
        found.give(reader, mutator.next())


def table(results: dict[str, Found]) -> str:
    """Results by reader, as markdown."""
    lines = ["| reader | inputs | refused | slowest, s | broke |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {f.inputs:,} | {f.refused / f.inputs:.0%} | {f.slowest:.3f} | {len(f.broken)} |"
              for name, f in results.items() if f.inputs]  # fmt: skip
    total = sum(f.inputs for f in results.values())
    return "\n".join([*lines, f"| all | {total:,} | | {max(f.slowest for f in results.values()):.3f} | |"])


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--inputs", type=COUNT, default=40_000, help="inputs, of all readers together")
    parser.add_argument("--only", metavar="READER", help="one reader alone")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the inputs")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no block is begun")
    parser.add_argument("--output", metavar="FILE", help="JSON of the results, which a later call goes on with")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    path, until = Path(args.output) if args.output else None, time.monotonic() + args.seconds
    saved = read_json(path) if path and path.is_file() else {}
    signal.signal(signal.SIGALRM, give_up)
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        found = readers(Path(folder))
        if args.only and args.only not in found:
            raise UserError(f"--only {args.only!r} is no reader; use one of {', '.join(found)}")
        names = [args.only] if args.only else list(found)
        results = {name: Found(**saved.get(name, {})) for name in found}
        blocks = -(-args.inputs // (BLOCK * len(names)))
        for number in range(blocks):
            for name in names:
                if results[name].inputs <= number * BLOCK and time.monotonic() < until:
                    fuzz_block(f"{args.seed} {name}", found[name], number, results[name])
                    if path:
                        write_json(path, {name: asdict(one) for name, one in results.items()})
    print(table(results))
    if broken := [f"{name}: {line}" for name, one in results.items() for line in one.broken]:
        raise UserError(f"{len(broken)} inputs broke a reader, the first {broken[0]:.500}; see --output")


if __name__ == "__main__":
    run(main)
