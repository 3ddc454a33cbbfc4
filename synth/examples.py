"""Rows of a task's data: {"input", "output"} from YAML, a `.jsonl`, a folder that `datasets` saved, or the hub.

A row may also use "Input" and "Output", or "prompt" and "answer", or a data set's own columns (synth/columns.py), or
a function of the user's makes rows of the rows. Reading a folder needs pyarrow, the hub needs datasets; both are
imported only then.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.records import located_rows
from data.sources import Split, contents, find_split, is_hub_name, saved_splits
from rewards.user_code import TIMEOUT, user_code
from synth.columns import Columns

Example = dict[str, str]

KEYS = (("input", "output"), ("Input", "Output"), ("prompt", "answer"))
# What rows are for → the splits of a data set that serve, in this order.
SPLITS = {
    "evaluation": ("test", "validation", "train"),
    "validation": ("validation", "valid", "val", "train"),
    "demos": ("train", "validation", "valid", "val"),
}
ON_HUB = {"evaluation": "test", "validation": "valid", "demos": "train"}


RowsFunction = Callable[[list[dict[str, Any]]], Iterable[Any]]


@dataclass(frozen=True)
class Reading:
    """How rows become examples. columns: of data sets; function: makes rows of rows, before anything else is read.

    check: whether an output can be an answer of the task.
    """

    columns: tuple[Columns, ...] = ()
    function: RowsFunction | None = None
    check: Callable[[str], bool] | None = None


def read_examples(
    source: str | Path | list[Any], place: str, reading: Reading = Reading(), split: str | None = None
) -> list[Example]:
    """{"input", "output"} of every row of a list, a `.jsonl`, a folder of `save_to_disk`, or OWNER/NAME on the hub.

    place: how errors call an inline list; split: of several (default: one to evaluate on). Numbers become text.
    Raises UserError with file and line (or row) for the first invalid row, and if there are no rows.
    """
    rows = _made(_rows_of(source, place, split), reading.function, place)
    examples = [_example(row, where, reading) for where, row in rows]
    if not examples:
        raise UserError(f"{place} holds no rows; a row has an input and an output")
    return examples


def splits_of(source: str | Path) -> list[str]:
    """The splits of a saved DatasetDict; none for anything else."""
    return list(saved_splits(Path(source))) if (Path(source) / "dataset_dict.json").is_file() else []


def _rows_of(source: str | Path | list[Any], place: str, split: str | None) -> Iterator[tuple[str, Any]]:
    if isinstance(source, list):
        return ((f"{place}, row {n}", row) for n, row in enumerate(source, 1))
    if Path(source).is_dir():
        return _folder_rows(Path(source), split)
    if not Path(source).exists() and is_hub_name(str(source)):
        return contents(find_split(str(source), "", split or "test"))
    return iter(located_rows(source, [()]))


def _made(rows: Iterator[tuple[str, Any]], function: RowsFunction | None, place: str) -> Iterator[tuple[str, Any]]:
    """The rows that the user's function makes of these; without one, these."""
    if function is None:
        return rows
    label = f"{place}: the rows function {getattr(function, '__name__', 'of the task')}"
    with user_code(label, TIMEOUT):
        found = list(function([dict(row) for _, row in rows]))
    return ((f"{label}, row {n}", row) for n, row in enumerate(found, 1))


def _example(row: Any, place: str, reading: Reading) -> Example:
    columns = next((one for one in reading.columns if isinstance(row, Mapping) and one.needed <= set(row)), None)
    if columns is not None:
        row = columns.example(row, place)
    keys = next((keys for keys in KEYS if isinstance(row, Mapping) and set(keys) <= set(row)), None)
    if keys is None:
        held = f"has the keys {sorted(map(str, row))}" if isinstance(row, Mapping) else f"is {row!r:.60}"
        native = "; ".join(", ".join(sorted(one.needed)) for one in reading.columns)
        known = f" (or the columns {native})" if native else ""
        remedy = 'write {"input": "...", "output": "..."}' + f"{known}, or map its columns in the task file: "
        raise UserError(f"{place} {held}; {remedy}`columns: {{input: ..., output: ...}}`")
    texts = [_text(row[key], key, place) for key in keys]
    if reading.check is not None and not reading.check(texts[1]):
        raise UserError(f"{place} has the output {texts[1]!r:.60}, which the task's answer type cannot read; fix it")
    return {"input": texts[0], "output": texts[1]}


def _text(content: Any, key: str, place: str) -> str:
    if isinstance(content, bool) or not isinstance(content, str | int | float) or not str(content).strip():
        raise UserError(f"{place} has {content!r:.60} as {key!r}; it must be text or a number; quote it")
    return str(content)


def chosen_split(splits: Sequence[str], use: str = "evaluation") -> str | None:
    """The split of several that serves: the first of SPLITS[use] that there is."""
    return next((split for split in SPLITS[use] if split in splits), None)


def _folder_rows(folder: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    """(folder, row n) of a saved Dataset, or of one split of a saved DatasetDict."""
    if not (folder / "dataset_dict.json").is_file():
        return contents(Split(str(folder), "train", saved_splits(folder)["train"]))
    splits = saved_splits(folder)
    name = split or chosen_split(list(splits))
    if name is None:
        raise UserError(f"{folder} has the splits {list(splits)}; name one of its folders, {folder}/SPLIT")
    return contents(Split(str(folder), name, splits[name]))
