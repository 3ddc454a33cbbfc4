"""Stage 4: how often the base model solves each sample.

Every sample is tried 8 times, and more often only if none or all of its tries were right.

Not here: what is done about samples that are too easy or too hard (see synth/pipeline/difficulty.py).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.parser import Parser, positive
from common.ranges import COUNT, NOT_NEGATIVE
from data.chat import has_template
from data.tokenizer import open_tokenizer
from synth.pipeline.many import open_model
from synth.pipeline.rollouts import Completer, Draw, draw
from synth.stages import StageRow
from synth.task import Task
from synth.teacher.cache import Cache

DEFAULT_MODEL = "tiny-digits"
ROWS_AT_ONCE = 2000  # whose rollouts are held


@dataclass(frozen=True)
class Tries:
    """Rollouts per sample: `first`, then doubled up to `most` while none or all are right."""

    first: int = 8
    most: int = 32

    def __post_init__(self):
        if not 1 <= self.first <= self.most:
            raise UserError(f"--rollouts is {self.first} and --max-rollouts {self.most}; 1 <= rollouts <= max")


@dataclass(frozen=True)
class BaseModelSettings:
    """The base model and how it is sampled. name: a folder or a Hugging Face name; adapter: a path, or None.

    max_tokens: of a completion; batch_size: completions in flight; chat: give prompts as a user's turns, if the model
    has a chat template.
    """

    name: str
    adapter: str | Path | None = None
    max_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64
    chat: bool = False

    def __post_init__(self):
        positive("max-completion-length", self.max_tokens)
        positive("sampling-batch-size", self.batch_size)
        positive("temperature", self.temperature, zero=True)

    @property
    def takes_turns(self) -> bool:
        """Whether prompts are given as a user's turns. Raises UserError if the model has no tokenizer."""
        return self.chat and has_template(open_tokenizer(self.name))

    def open(self) -> Completer:
        """The model, loaded. Raises UserError as BaseModel does."""
        return open_model(self)


def pass_rates(
    rows: Sequence[StageRow], task: Task, model: Completer, store: Cache, tries: Tries = Tries()
) -> list[StageRow]:
    """The rows with rollouts, solved and pass_rate; dropped ones unchanged. A score of at least 1 is solved."""
    solved = {n: 0 for n, row in enumerate(rows) if "dropped" not in row}
    done = dict.fromkeys(solved, 0)
    undecided, target = list(solved), tries.first
    while undecided:
        for start in range(0, len(undecided), ROWS_AT_ONCE):
            tried = undecided[start : start + ROWS_AT_ONCE]
            wanted = [(n, Draw(task.prompt(rows[n]["input"]), k)) for n in tried for k in range(done[n], target)]
            texts = draw([one for _, one in wanted], model, store)
            for (n, _), text in zip(wanted, texts, strict=True):
                done[n] += 1
                solved[n] += task.score(rows[n]["input"], text, rows[n]["output"]) >= 1
        target = min(2 * target, tries.most)
        undecided = [n for n in undecided if solved[n] in (0, done[n]) and done[n] < target]
    return [
        {**row, "rollouts": done[n], "solved": solved[n], "pass_rate": solved[n] / done[n]} if n in solved else row
        for n, row in enumerate(rows)
    ]


def add_base_model_flags(parser: Parser) -> None:
    """The base model and how it is sampled."""
    default = BaseModelSettings(DEFAULT_MODEL)
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--base-model",
        "--base-model-path",
        help=f"a folder or a Hugging Face name (default: the task's base_model, else {DEFAULT_MODEL})",
    )
    group.add_argument("--base-adapter", help="an adapter for it: a folder, or an .npz or .safetensors file")
    group.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="have the model continue the prompt, where it would reply to it as a user's turn (tasks with a reward "
        "always do)",
    )
    group.add_argument("--max-completion-length", type=COUNT, default=default.max_tokens, help="tokens")
    group.add_argument(
        "--temperature", type=NOT_NEGATIVE, default=default.temperature, help="of the base model's sampling"
    )
    group.add_argument("--sampling-batch-size", type=COUNT, default=default.batch_size, help="completions in flight")


def add_tries_flags(group: argparse._ActionsContainer) -> None:
    """The flags of `Tries`."""
    group.add_argument("--rollouts", type=COUNT, default=Tries.first, help="completions per sample")
    group.add_argument(
        "--max-rollouts", type=COUNT, default=Tries.most, help="completions of a sample solved never or always"
    )


def tries_settings(args: argparse.Namespace) -> Tries:
    """The settings that `add_tries_flags` has read."""
    return Tries(args.rollouts, args.max_rollouts)


def turns(task: Task) -> bool:
    """Whether a chat model is asked in turns. A reward may score the prompt, too, so there it stays as it is."""
    return task.answer is not None


def base_model_settings(args: argparse.Namespace, task: Task) -> BaseModelSettings:
    """The settings that `add_base_model_flags` has read; the model is the user's, else the task's, else the default."""
    return BaseModelSettings(
        args.base_model or task.base_model or DEFAULT_MODEL,
        args.base_adapter,
        args.max_completion_length,
        args.temperature,
        args.seed,
        args.sampling_batch_size,
        chat=turns(task) and not args.ignore_chat_template,
    )
