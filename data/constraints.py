"""Constraints on a reply that a program can check, as those of IFEval (arXiv:2311.07911): length, case, words, form.

The only scoring function of the constraint task: the data generator holds its replies to it, and `--answer constraints`
scores by it. Written as JSON, as in a row's "answer":

    Constraints.from_json('{"sentences": 1, "max_words": 12}').score("A river is a stream of fresh water.")  ->  1.0
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from common.json_text import parse_json

LEAST_WORDS = 3  # of any reply that scores; saying nothing is lower case, short and without forbidden words
# In time linear in the text, as a model may write anything.
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_BULLET = re.compile(r"^[^\S\n]*[-*•]\s+\S", re.MULTILINE)


@dataclass(frozen=True)
class Constraints:
    """What a reply has to satisfy; None and empty: whatever it likes. Raises ValueError where nothing is asked."""

    sentences: int | None = None  # exactly
    max_words: int | None = None
    min_words: int | None = None
    case: str | None = None  # "lower" or "upper": of every letter
    include: tuple[str, ...] = ()  # words, whole, in any case
    exclude: tuple[str, ...] = ()
    bullets: int | None = None  # lines that begin with "-", "*" or "•", exactly
    json_keys: tuple[str, ...] = ()  # the reply is a JSON object with these keys and no others
    ending: str | None = None  # the last words, as written

    def __post_init__(self) -> None:
        if not self.asked():
            raise ValueError("no constraint is given")
        if self.case not in (None, "lower", "upper"):
            raise ValueError(f"case is {self.case!r}, not lower or upper")

    def asked(self) -> list[str]:
        """The names of the constraints that are given."""
        return [field.name for field in fields(self) if getattr(self, field.name) not in (None, ())]

    def met(self, reply: str) -> dict[str, bool]:
        """Name → whether the reply satisfies it, of every constraint that is given."""
        text = reply.strip()
        words = [word for word in text.split() if re.search(r"\w", word)]
        checks = {
            "sentences": lambda: len(_SENTENCE_END.findall(text)) == self.sentences and text[-1:] in ".!?",
            "max_words": lambda: len(words) <= (self.max_words or 0),
            "min_words": lambda: len(words) >= (self.min_words or 0),
            "case": lambda: text == (text.lower() if self.case == "lower" else text.upper()),
            "include": lambda: all(_has(text, word) for word in self.include),
            "exclude": lambda: not any(_has(text, word) for word in self.exclude),
            "bullets": lambda: len(_BULLET.findall(text)) == self.bullets,
            "json_keys": lambda: _keys(text) == set(self.json_keys),
            "ending": lambda: text.endswith(self.ending or ""),
        }
        enough = len(words) >= LEAST_WORDS
        return {name: enough and checks[name]() for name in self.asked()}

    def score(self, reply: str) -> float:
        """The share of the constraints that the reply satisfies, 0..1."""
        met = self.met(reply)
        return sum(met.values()) / len(met)

    def to_json(self) -> str:
        """As in a row's "answer"."""
        return json.dumps({name: value for name, value in asdict(self).items() if name in self.asked()})

    @classmethod
    def from_json(cls, text: str) -> "Constraints":
        """From what `to_json` wrote. Raises ValueError for anything else."""
        given = parse_json(text)
        if not isinstance(given, dict):
            raise ValueError("not a JSON object")
        known = {field.name: field.type for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"{name!r} is no constraint; known are {', '.join(known)}")
            _check_type(name, value, str(known[name]))
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


def _check_type(name: str, value: Any, wanted: str) -> None:
    if "tuple" in wanted:
        fits = isinstance(value, list) and bool(value) and all(isinstance(word, str) and word for word in value)
    elif "int" in wanted:
        fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
    else:
        fits = isinstance(value, str) and bool(value)
    if not fits:
        kind = "a list of words" if "tuple" in wanted else "a positive integer" if "int" in wanted else "text"
        raise ValueError(f"{name} is {value!r:.60}, not {kind}")


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _keys(text: str) -> set[str] | None:
    """The keys of a JSON object, in a code fence or bare; None if the text is something else."""
    fenced = len(text) >= 6 and text.startswith("```") and text.endswith("```")
    try:
        found = parse_json(text[3:-3].removeprefix("json") if fenced else text)
    except ValueError:
        return None
    return set(found) if isinstance(found, dict) else None
