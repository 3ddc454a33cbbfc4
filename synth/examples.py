"""Rows of a task's data: {"input", "output"} from YAML, a `.jsonl`, or a folder that `datasets` saved.

A row may also use "Input" and "Output", or "prompt" and "answer". Reading a folder needs pyarrow, which is imported
only then.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.records import located_rows
from data.sources import Split, contents, saved_splits

Example = dict[str, str]

KEYS = (("input", "output"), ("Input", "Output"), ("prompt", "answer"))
SPLITS = ("test", "validation", "train")  # of a folder with several, the first of these that exists


def read_examples(
    source: str | Path | list[Any], place: str, check: Callable[[str], bool] | None = None
) -> list[Example]:
    """{"input", "output"} of every row of `source`: a list of mappings, a `.jsonl`, or a folder of `save_to_disk`.

    place: how errors call an inline list; check: whether an output can be an answer of the task. Numbers become text.
    Raises UserError with file and line (or row) for the first invalid row, and if there are no rows.
    """
    if isinstance(source, list):
        rows: Iterator[tuple[str, Any]] = ((f"{place}, row {n}", row) for n, row in enumerate(source, 1))
    elif Path(source).is_dir():
        rows = _folder_rows(Path(source))
    else:
        rows = iter(located_rows(source, [()]))
    examples = [_example(row, where, check) for where, row in rows]
    if not examples:
        raise UserError(f"{place} holds no rows; a row has an input and an output")
    return examples


def _example(row: Any, place: str, check: Callable[[str], bool] | None) -> Example:
    keys = next((keys for keys in KEYS if isinstance(row, Mapping) and set(keys) <= set(row)), None)
    if keys is None:
        held = f"has the keys {sorted(map(str, row))}" if isinstance(row, Mapping) else f"is {row!r:.60}"
        raise UserError(f'{place} {held}; write {{"input": "...", "output": "..."}}')
    texts = [_text(row[key], key, place) for key in keys]
    if check is not None and not check(texts[1]):
        raise UserError(f"{place} has the output {texts[1]!r:.60}, which the task's answer type cannot read; fix it")
    return {"input": texts[0], "output": texts[1]}


def _text(content: Any, key: str, place: str) -> str:
    if isinstance(content, bool) or not isinstance(content, str | int | float) or not str(content).strip():
        raise UserError(f"{place} has {content!r:.60} as {key!r}; it must be text or a number; quote it")
    return str(content)


def _folder_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """(folder, row n) of a saved Dataset, or of one split of a saved DatasetDict."""
    if (folder / "dataset_dict.json").is_file():
        splits = saved_splits(folder)
        split = next((split for split in SPLITS if split in splits), None)
        if split is None:
            raise UserError(f"{folder} has the splits {list(splits)}; name one of its folders, {folder}/SPLIT")
        return contents(Split(str(folder), split, splits[split]))
    return contents(Split(str(folder), "train", saved_splits(folder)["train"]))
