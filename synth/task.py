"""A task: what is asked, how answers are read or scored, and the data that belongs to it. Read from one YAML file.

    instruction: Add the two numbers.
    answer: {type: number}                  or instead a reward: {type: digits, multiple_of: 2}, file.py:function
    input_format, output_format, prompt, demos, domain, library, passages, evaluation, validation, name, base_model,
    near_duplicates: optional
    columns: {input: question, output: answer}   of demos, evaluation and validation, where they are called otherwise
    rows: file.py:function                       f(rows) -> rows, for what columns cannot say

Paths are relative to the YAML file. Reading is strict: an unknown key, a missing file or a row without an answer is
an error before the first call to a teacher. For examples see synth/tasks/.

    load_task("synth/tasks/arithmetic.yaml").prompt("12 + 7 =")  ->  "12 + 7 ="
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_file, expanded
from common.yaml_files import parse_yaml, read_yaml
from data.digits import DigitRule
from data.sources import is_hub_name
from rewards.answer_reward import answer_options
from rewards.answers import AnswerType, answer_type
from rewards.digits import digit_reward
from rewards.function import RewardFunction, load_function, load_reward_function
from synth.columns import Columns, columns_from
from synth.examples import ON_HUB, Example, Reading, RowsFunction, chosen_split, read_examples, splits_of
from synth.near_duplicates import THRESHOLD, checked_threshold

SHIPPED = Path(__file__).parent / "tasks"
PLACES = ("instruction", "input_format", "output_format", "input")  # what a prompt template may name in braces
_PLACE = re.compile("{(" + "|".join(PLACES) + ")}")
TEXT_KEYS = ("name", "instruction", "input_format", "output_format", "prompt", "domain", "base_model")
KNOWN_KEYS = (
    *(*TEXT_KEYS, "answer", "reward", "demos", "library", "passages", "evaluation", "validation"),
    *("near_duplicates", "columns", "rows"),
)
# Fields of a Task that cannot be written to a file, or are in what was read by them.
CODE = ("answer", "reward", "source", "columns", "rows", "taken")
DEMOS = 5  # taken from the training rows of a data set, for a task without any

Source = Callable[[int, int], list[Example]]


@dataclass(frozen=True)
class Task:
    """One task. Exactly one of `answer` and `reward` is set, except for reasoning-gym's tasks, which have both."""

    name: str
    instruction: str
    input_format: str = ""
    output_format: str = ""
    answer: AnswerType | None = None
    reward: RewardFunction | None = None  # f(prompts, completions) -> scores, if there is no single answer
    template: str = ""  # of the prompt, with {input} and other PLACES; empty: instruction, formats, input
    demos: list[Example] = field(default_factory=list)
    domain: str = ""
    library: list[Path] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)  # a library small enough for the task file
    evaluation: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)  # rows that choose the checkpoint, if there are any
    source: Source | None = None  # f(count, seed) -> rows made by rule, without a teacher
    near_duplicates: float = THRESHOLD  # ROUGE-L at which two inputs count as one; 1: same words only
    base_model: str = ""  # the model to train if the user names none
    scoring_flags: tuple[str, ...] = ()  # with which ppo_training.py scores as this task does
    columns: tuple[Columns, ...] = ()  # of data sets, beside "input" and "output"
    rows: RowsFunction | None = None  # makes rows of a data set's rows
    taken: tuple[str, ...] = ()  # which rows were taken from which file, a line each

    def prompt(self, text: str) -> str:
        """What the base model and the trained model see of an input, in pass rates, RL and evaluation alike."""
        if not self.template:
            parts = (self.instruction, self.input_format, text, self.output_format)
            return "\n\n".join(part.strip() for part in parts if part.strip())
        values = {**{place: getattr(self, place) for place in PLACES if place != "input"}, "input": text}
        # Not str.format: templates and inputs may hold LaTeX's braces. In one pass, so that inputs are left alone.
        return _PLACE.sub(lambda match: values[match[1]], self.template)

    def score(self, text: str, completion: str, truth: str) -> float:
        """The score of a completion of `prompt(text)`: by the reward if there is one, else 1.0 or 0.0 by `answer`."""
        if self.reward is not None:
            return self.reward([self.prompt(text)], [completion])[0]
        assert self.answer is not None, "a task has an answer or a reward"
        return self.answer.score(completion, truth)

    @property
    def reading(self) -> Reading:
        """How rows of this task are read."""
        return Reading(self.columns, self.rows, self.answer.readable if self.answer else None)

    def as_dict(self) -> dict[str, Any]:
        """The whole task as JSON; its code (a reward, a reader) only by the flags that name it."""
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in CODE}
        return {**said, "library": list(map(str, self.library)), "scoring_flags": list(self.scoring_flags)}

    def write_library(self, folder: str | Path) -> list[Path]:
        """The paths to search for passages: `library`, and `passages` written to FOLDER/task_passages.jsonl."""
        if not self.passages:
            return list(self.library)
        path = Path(folder) / "task_passages.jsonl"
        with atomic_file(path) as temporary:
            lines = (json.dumps({"text": passage}, ensure_ascii=False) for passage in self.passages)
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [*self.library, path]


def load_task(path: str | Path) -> Task:
    """The task of a YAML file. (Commands call synth.pipeline.tasks.open_task, which knows reasoning-gym's as well.)

    Raises UserError if the file, a key, a value, a path or a row is wrong.
    """
    content = read_yaml(path, "task")
    return _task({"name": Path(path).stem, **content}, str(path), Path(path).parent)


def task_from_flags(
    task_name: str | None = None,
    task_instruction: str | None = None,
    *,
    base: Task | None = None,
    answer: str | None = None,
    labels: Sequence[str] | None = None,
    input_format: str | None = None,
    output_format: str | None = None,
    demo_examples: str | Sequence[Any] | None = None,
    passage_paths: Sequence[str] | None = None,
    dataset_path: str | None = None,
    validation_path: str | None = None,
    domain: str | None = None,
) -> Task:
    """A task given by flags; what they omit is taken from `base`, or from the shipped task of that name (MedNLI, say).

    answer: an answer type's name, or with its options as a task file has it, "{type: choice, choices: [A, B]}"
    (default: label if labels are given, else exact). demo_examples: a `.jsonl`, a folder, or a list, also as text:
    "[{'input': '2 + 2', 'output': '4'}]". Paths are relative to the working directory.
    Raises UserError as `load_task` does, and if there is no instruction.
    """
    task_name = task_name or (base.name if base else "")
    if not task_name:
        raise UserError("no task is named; give --task FILE, or --task-name and --task-instruction")
    shipped = SHIPPED / f"{task_name.lower()}.yaml"
    if base is None and re.fullmatch(r"\w+", task_name) and shipped.is_file():
        base = load_task(shipped)
    if base is None and not task_instruction:
        raise UserError(f"task {task_name!r} has no instruction and is not shipped; give --task-instruction")
    kind = answer_options(answer) if answer else {"type": "label"} if labels else None
    kind = {**kind, "labels": list(labels)} if kind and labels else kind
    content: dict[str, Any] = {
        "instruction": task_instruction, "input_format": input_format, "output_format": output_format,
        "domain": domain, "library": list(passage_paths) if passage_paths else None,
        "evaluation": dataset_path, "validation": validation_path,
        "demos": _demos(demo_examples), "answer": kind,
    }  # fmt: skip
    content = {key: given for key, given in content.items() if given is not None}
    return _task({"name": task_name, **content}, f"the flags of task {task_name}", Path(), base)


def _demos(given: str | Sequence[Any] | None) -> Any:
    if not isinstance(given, str):
        return None if given is None else list(given)
    if not given.lstrip().startswith("["):
        return given
    return parse_yaml(given, "--demo-examples")


def _task(content: dict[str, Any], place: str, folder: Path, base: Task | None = None) -> Task:
    """The task of a mapping; what it omits is taken from `base`. folder: what its paths are relative to."""
    for key in content:
        if key not in KNOWN_KEYS:
            raise UserError(f"{place} has the unknown key {key!r}; known are {', '.join(KNOWN_KEYS)}")
    texts: dict[str, Any] = {
        ("template" if key == "prompt" else key): _text(content[key], key, place) for key in TEXT_KEYS if key in content
    }
    task = replace(base, **texts) if base else _named(texts, place)
    if "answer" in content and "reward" in content:
        raise UserError(f"{place} has both an answer and a reward; keep one")
    if "answer" in content:
        answer, flags = _answer(content["answer"], place, folder)
        task = replace(task, answer=answer, reward=None, scoring_flags=flags)
    if "reward" in content:
        reward, flags = _reward(content["reward"], place, folder)
        task = replace(task, answer=None, reward=reward, scoring_flags=flags)
    if task.answer is None and task.reward is None:
        if base is None and not place.startswith("the flags"):
            raise UserError(f"{place} lacks answer (or reward); write `answer: {{type: number}}`, say")
        task = replace(task, answer=answer_type("exact"), scoring_flags=("--answer", "exact"))
    if "near_duplicates" in content:
        task = replace(task, near_duplicates=_threshold(content["near_duplicates"], place))
    if task.template and "{input}" not in task.template:
        raise UserError(f"{place} has a prompt without {{input}}; write where the input goes")
    library = [_path(item, "library", place, folder) for item in _list(content, "library", place)]
    passages = [_text(item, "passages", place) for item in _list(content, "passages", place)]
    task = replace(task, library=library or task.library, passages=passages or task.passages)
    if "columns" in content:
        task = replace(task, columns=columns_from(content["columns"], place))
    if "rows" in content:
        spec = str((folder / expanded(_text(content["rows"], "rows", place))).resolve())
        task = replace(task, rows=load_function(spec, "rows function"))
    for key in ("demos", "evaluation", "validation"):
        if key in content:
            task = _with_rows(task, key, content[key], place, folder)
    return task


def _named(texts: dict[str, Any], place: str) -> Task:
    if not texts.get("instruction", "").strip():
        raise UserError(f"{place} lacks an instruction; write `instruction: ...`")
    return Task(**texts)


def _text(content: Any, key: str, place: str) -> str:
    if not isinstance(content, str):
        raise UserError(f"{place} has {content!r:.60} as {key}; it must be text")
    return content.strip() if key != "prompt" else content


def _list(content: dict[str, Any], key: str, place: str) -> list[Any]:
    given = content.get(key, [])
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list):
        raise UserError(f"{place} has {given!r:.60} as {key}; it must be a list")
    return given


def _path(given: Any, key: str, place: str, folder: Path) -> Path:
    if not isinstance(given, str):
        raise UserError(f"{place} has {given!r:.60} in {key}; it must be a path")
    path = folder / expanded(given)
    if not path.exists():
        raise UserError(f"{place} names {path} as {key}, which does not exist; check the path")
    return path


def _with_rows(task: Task, key: str, given: Any, place: str, folder: Path) -> Task:
    """The task with the rows of `key`. A data set to evaluate on gives its first training rows as demos, too."""
    hub = isinstance(given, str) and is_hub_name(given) and not (folder / given).exists()
    source = given if isinstance(given, list) or hub else _path(given, key, place, folder)
    splits = [] if isinstance(source, list) or hub else splits_of(source)
    split = ON_HUB[key] if hub else chosen_split(splits, key)
    rows = read_examples(source, f"{key} of {place}", reading=task.reading, split=split)
    given_rows: dict[str, Any] = {key: rows}
    if isinstance(source, list):
        return replace(task, **given_rows)
    task = replace(task, **given_rows, taken=(*task.taken, _taken(key, len(rows), source, split)))
    if key != "evaluation" or task.demos or "train" not in splits or split == "train":
        return task
    rows = read_examples(source, f"demos of {place}", reading=task.reading, split="train")
    line = f"{_taken('demos', min(DEMOS, len(rows)), source, 'train')}, the first of {len(rows)}"
    return replace(task, demos=rows[:DEMOS], taken=(*task.taken, line))


def _taken(key: str, count: int, source: str | Path, split: str | None) -> str:
    return f"{key}: {count} rows of {source}" + (f" ({split})" if split else "")


def _threshold(given: Any, place: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise UserError(f"{place} has {given!r:.60} as near_duplicates; it must be a number")
    return checked_threshold(float(given))


def _answer(given: Any, place: str, folder: Path) -> tuple[AnswerType, tuple[str, ...]]:
    """The answer type, and the flags with which ppo_training.py reads answers the same way."""
    options = {"type": given} if isinstance(given, str) else given
    if not isinstance(options, dict) or not isinstance(options.get("type"), str):
        raise UserError(f"{place} has {given!r:.60} as answer; write `answer: {{type: number}}`, say")
    options = {str(key): value for key, value in options.items()}
    for key in ("reader", "comparison"):
        if isinstance(options.get(key), str):
            options[key] = str((folder / expanded(options[key])).resolve())
    flags = ("--answer", json.dumps(options))
    try:
        return answer_type(options.pop("type"), **options), flags
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _reward(given: Any, place: str, folder: Path) -> tuple[RewardFunction, tuple[str, ...]]:
    """The reward, and the flags with which ppo_training.py gives the same."""
    if isinstance(given, str):
        spec = str((folder / expanded(given)).resolve())
        return load_reward_function(spec), ("--reward-function", spec)
    if not isinstance(given, dict) or given.get("type") != "digits":
        raise UserError(f"{place} has {given!r:.60} as reward; write file.py:function, or `{{type: digits}}`")
    options = {key: value for key, value in given.items() if key != "type"}
    multiple, increasing = options.pop("multiple_of", 2), options.pop("increasing", True)
    if options:
        raise UserError(
            f"{place} has the unknown reward option {next(iter(options))!r}; known are increasing, multiple_of"
        )
    if not isinstance(increasing, bool) or isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise UserError(f"{place} has {given!r:.80} as reward; increasing is true or false, multiple_of 1 or more")
    flags = ("--ground-truth-reward", "--multiple-of", str(multiple), *["--decreasing"] * (not increasing))
    return digit_reward(DigitRule(increasing, multiple)), flags
