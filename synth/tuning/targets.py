"""Target models: the function that trains on rows and returns metrics, the user's own or the built-in one.

    def target_model(rows) -> {"accuracy": 0.81}                  rows: [{"input": ..., "output": ...}, ...]
    def target_model(rows, validation_dataset) -> {...}           the same, with rows to evaluate on

The built-in one runs sft.py on the rows as a process, then lets the trained model complete the validation prompts.
"""

import ast
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import expanded
from common.parser import split_words
from common.schemas import read_key
from rewards.answer_reward import answer_from_flag
from rewards.function import load_function
from rewards.user_code import user_code
from synth.pipeline.evaluation import completions_of, scores_of
from synth.pipeline.pass_rates import BaseModelSettings, turns
from synth.pipeline.script import run_script
from synth.pipeline.train import sft_row
from synth.sampler import DataRow
from synth.stages import write_rows
from synth.task import Task
from synth.teacher.cache import Cache

Metrics = dict[str, float]
TargetModel = Callable[..., Mapping[str, Any]]
WHAT, NAME = "target model", "evaluate"
COMPLETION_TOKENS = 64
BATCH = 64  # completions at once


def load_target(spec: str) -> TargetModel:
    """The function that "file.py:function" names; of "file.py" alone `evaluate`, or the one function that it defines.

    Importing runs the file's code, with the user's permissions. Raises UserError if there is none, or several.
    """
    if not spec.endswith(".py"):
        return load_function(spec, WHAT)
    try:
        code = ast.parse(Path(expanded(spec)).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{WHAT} {spec} cannot be read ({error.strerror}); check the path") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{WHAT} {spec} is not Python ({' '.join(str(error).split())[:100]}); fix it") from None
    names = [part.name for part in code.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")]
    if NAME not in names and len(names) != 1:
        held = f"defines {', '.join(names)}" if names else "defines no function"
        raise UserError(f"{WHAT} {spec} {held}; name one, {spec}:FUNCTION, or call it {NAME}")
    return load_function(f"{spec}:{NAME if NAME in names else names[0]}", WHAT)


def takes_validation(function: TargetModel) -> bool:
    """Whether a target has a second positional parameter that is required, or whose name starts with "valid"."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have none
        return False
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    second = positional[1] if len(positional) > 1 else None
    return second is not None and (second.default is second.empty or second.name.startswith("valid"))


def call_target(function: TargetModel, rows: Sequence[DataRow], validation: Sequence[DataRow], metric: str) -> Metrics:
    """A target's metrics, as finite floats (metrics other than `metric` are omitted if not finite).

    Raises UserError if it fails, returns no metrics, or `metric` is missing or not finite; it never becomes 0.
    """
    label = str(getattr(function, "__name__", type(function).__name__))
    # Copies, so that the function cannot change our rows.
    given = [[dict(row) for row in some] for some in (rows, validation)]
    with user_code(f"{WHAT} {label}"):  # it may train for hours
        found = function(*given) if takes_validation(function) else function(given[0])
    if not isinstance(found, Mapping):
        raise UserError(f"{WHAT} {label} returned {found!r:.60}; return a dict of metrics such as {{{metric!r}: 0.8}}")
    metrics = {str(name): _number(value) for name, value in found.items()}
    if metric not in metrics:
        raise UserError(
            f"{WHAT} {label} returned the metrics {', '.join(metrics) or 'none'}, but reward_metric is {metric!r}; "
            "return it, or name another"
        )
    if not math.isfinite(metrics[metric]):
        raise UserError(
            f"{WHAT} {label} returned {found[metric]!r:.60} as {metric}, which is not a finite number; fix it"
        )
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _number(value: Any) -> float:
    """A metric as a float; NaN for text and anything else that is not a number."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def instruction_task(answer: str = "exact") -> Task:
    """A task whose inputs are instructions, for a target without another. answer: how responses are compared."""
    read = answer_from_flag(answer)
    return Task("instructions", "Follow the instruction.", template="{input}", answer=read, rows=as_samples)


def as_sample(row: DataRow) -> DataRow:
    """A row of a generator as {"input", "output"}: an instruction, with Alpaca's input if it has one, is the input."""
    if "instruction" not in row:
        return row
    parts = [str(row[key]).strip() for key in ("instruction", "input") if str(row.get(key) or "").strip()]
    return {"input": "\n\n".join(parts), "output": row.get("output", "")}


def as_samples(rows: Sequence[DataRow]) -> list[DataRow]:
    """The rows, instructions among them as samples."""
    return [as_sample(row) for row in rows]


class SftTarget:
    """The built-in target: sft.py from the base model on the rows, then the task's score on the validation rows.

    Rows are samples, or instructions with responses.

    Metrics: accuracy (the mean of the task's scores), also as mean_score; valid_loss, on the validation rows. Its work
    for a set of rows is kept in a folder named by their digest: an interrupted call resumes from its last checkpoint,
    and a finished one is not repeated. flags: further flags of sft.py, as one string; temperature: of the completions;
    go_on: the command that resumes; files: open files that the script inherits and keeps open, even if this process is
    killed. Raises UserError if the script fails, Stopped if it was stopped.
    """

    def __init__(
        self,
        task: Task,
        folder: str | Path,
        model: str = "tiny-digits",
        iters: int = 100,
        flags: str = "",
        temperature: float = 0.0,
        seed: int = 0,
        go_on: str = "",
        files: Sequence[int] = (),
    ):
        self.task, self.folder, self.model = task, Path(folder) / "target", model
        self.iters, self.flags, self.seed = iters, flags, seed
        self.base = BaseModelSettings(model, None, COMPLETION_TOKENS, temperature, seed, BATCH, turns(task))
        self.go_on, self.files = go_on, files

    def __call__(self, rows: Sequence[DataRow], validation: Sequence[DataRow]) -> Metrics:
        rows, validation = as_samples(rows), as_samples(validation)
        made_of = json.dumps([rows, validation, self.model, self.iters, self.flags, self.seed], sort_keys=True)
        folder = self.folder / hashlib.sha256(made_of.encode()).hexdigest()[:12]
        training = folder / "training"
        if not (training / "summary.json").is_file():
            self._train(folder, training, rows, validation)
        with Cache(folder / "completions.sqlite") as store:
            model = replace(self.base, adapter=folder / "adapter")
            scores = scores_of(self.task, validation, completions_of(model, self.task, validation, store))
        score = sum(scores) / len(scores)
        loss: float | None = read_key(float | None, training / "summary.json", "valid_loss")  # type: ignore[arg-type]
        return {"accuracy": score, "mean_score": score, "valid_loss": math.nan if loss is None else loss}

    def _train(self, folder: Path, training: Path, rows: Sequence[DataRow], validation: Sequence[DataRow]) -> None:
        words = ["sft.py", "--train", "--model", self.model, "--iters", self.iters, "--seed", self.seed]
        words += ["--data", folder, "--data-base", "", "--output-dir", training, "--save-file", folder / "adapter"]
        words += split_words("sft-flags", self.flags)
        if (training / "config.json").is_file():
            words = ["sft.py", "--resume", training]
        else:
            chat = self.base.takes_turns
            for split, some in (("train", rows), ("valid", validation)):
                write_rows(folder / f"{split}.jsonl", [sft_row(self.task, row, chat) for row in some])
        run_script([*map(str, words)], self.go_on, self.files)
