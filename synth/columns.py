"""Rows in a data set's own columns, as {"input", "output"}: what a task's `columns:` says.

    columns: {input: question, output: answer}                           names of columns
    columns: {input: "Premise: {premise}\\nHypothesis: {hypothesis}", output: label}     or a text with names in braces
    columns: {input: question, options: choices, output: answer_idx}     options follow the input, "A. ..." line by line
    columns: {input: Question, options: [Right, Wrong 1, Wrong 2], output: Right}        ... drawn from several columns

A list of such mappings tries one after another: the first whose columns a row has. Options may be a list, a mapping of
letters, a list of {key, value}, or several columns, which are shuffled by the input, as the right one has its fixed
place there. With options the output becomes a letter: a letter, an index from 0, or the text of an option.
"""

import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

NAME = re.compile(r"\{([^{}]+)\}")
KEYS = ("input", "output", "options")


@dataclass(frozen=True)
class Columns:
    """One mapping. input, output: a column, or a text with columns in braces; options: a column, or several."""

    input: str
    output: str
    options: str | tuple[str, ...] = ()

    @property
    def needed(self) -> set[str]:
        """The columns that a row must have."""
        several = [self.options] * bool(self.options) if isinstance(self.options, str) else self.options
        return {name for text in (self.input, self.output) for name in NAME.findall(text) or [text]} | set(several)

    def example(self, row: Mapping[str, Any], place: str) -> dict[str, Any]:
        """The row's input and output, unchecked. Raises UserError for options that are none, or without the output."""
        text, output = _filled(self.input, row), _filled(self.output, row)
        if not self.options:
            return {"input": text, "output": output}
        if isinstance(self.options, str):
            options = _listed(row[self.options], place)
        else:
            options = [str(row[name]) for name in self.options]
            random.Random(str(text)).shuffle(options)
        letters = string.ascii_uppercase[: len(options)]
        lines = [f"{letter}. {option.strip()}" for letter, option in zip(letters, options, strict=True)]
        return {"input": "\n".join([str(text).rstrip(), *lines]), "output": _letter(output, options, letters, place)}


def columns_from(given: Any, place: str) -> tuple[Columns, ...]:
    """The mappings of a task's `columns:`. Raises UserError for anything else."""
    found = []
    for one in given if isinstance(given, list) else [given]:
        texts = isinstance(one, dict) and all(isinstance(one.get(key), str) for key in KEYS[:2])
        options = one.get("options", "") if isinstance(one, dict) else ""
        options = tuple(options) if isinstance(options, list) else options
        named = isinstance(options, str) or (isinstance(options, tuple) and len(options) <= len(string.ascii_uppercase))
        if not texts or set(one) - set(KEYS) or not named or not all(isinstance(name, str) for name in options):
            raise UserError(f"{place} has {one!r:.80} as columns; write `columns: {{input: question, output: answer}}`")
        found.append(Columns(one["input"], one["output"], options))
    return tuple(found)


def _filled(text: str, row: Mapping[str, Any]) -> Any:
    """A column's value, or a text with the values of the columns that it names."""
    return NAME.sub(lambda match: str(row[match[1]]), text) if NAME.search(text) else row[text]


def _listed(given: Any, place: str) -> list[str]:
    if isinstance(given, Mapping):  # {"A": "..."}, or {"label": [...], "text": [...]}
        given = given["text"] if isinstance(given.get("text"), Sequence) else [given[key] for key in sorted(given)]
    if not isinstance(given, Sequence) or isinstance(given, str) or not 2 <= len(given) <= len(string.ascii_uppercase):
        raise UserError(f"{place} has {given!r:.60} as options; they must be a list, or a mapping of letters")
    return [str(one["value"] if isinstance(one, Mapping) and "value" in one else one) for one in given]


def _letter(output: Any, options: Sequence[str], letters: str, place: str) -> str:
    """The letter of the right option: given as a letter, as an index from 0, or as its text."""
    text = str(output).strip()
    if text in options:
        return letters[list(options).index(text)]
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    if len(text) <= 2 and text.isdecimal() and int(text) < len(options):
        return letters[int(text)]
    raise UserError(f"{place} has the output {text!r:.60}, which is none of its {len(options)} options; check columns")
