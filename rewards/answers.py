"""Answer types: one reader each, shared by the vote, the pass rate, the reward and the evaluation.

A reader sees the completion, never its prompt, so that an `<answer>` example in the prompt is not taken for an answer.
If several answers are given, the last one counts. Places are searched in this order:

    1. <answer>...</answer>             unclosed or empty: unreadable
    2. \\boxed{...}                      unclosed or empty: unreadable
    3. #### ...                         the rest of the line, as in GSM8K; Markdown headings are skipped
    4. The answer is ..., Answer: ...   if an answer follows immediately
    5. otherwise the last standalone letter, label or number, by type; for exact the whole completion

Two answers in one place ("3 or 4", "A, B") count as none. regex, json and custom find their answers themselves. Nothing
that a model wrote is evaluated by Python or executed.

    answer_type("number").extract("so 12 * 6 = 72.\\n####72")  ->  "72"
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from common.errors import UserError
from data.constraints import Constraints
from rewards.expressions import MAX_CHARACTERS as MAX_EXPRESSION
from rewards.expressions import canonical, rational, tidy, value
from rewards.function import load_function
from rewards.markers import bare, collapsed, hash_spans, inline_maths, last_boxed, last_tag, phrase_spans
from rewards.user_code import TIMEOUT, user_code

AMBIGUOUS = ""  # several answers in one place, or a marker without any: the search ends, unreadable
MAX_CHARACTERS = 50_000  # only the end of longer completions is read
_JOIN = r"(?:\s*(?:[,;/&|]|or\b|and\b|to\b)\s*|\s+)"


class AnswerType:
    """How answers of one type are read and compared."""

    name: ClassVar[str] = ""

    def extract(self, completion: str) -> str | None:
        """The canonical text of the last answer given, or None if none can be read. "0" is an answer."""
        text = _shortened(completion)
        found = self._marked(text)
        if found is None:
            found = self._lenient(text)
        return None if found == AMBIGUOUS else found

    def normalise(self, answer: str) -> str:
        """The canonical text of an answer, the key of the vote. Unreadable text is kept, with its spaces collapsed."""
        found = self.extract(answer)
        return collapsed(answer) if found is None else found

    def equal(self, a: str, b: str) -> bool:
        """Whether two answers are equal."""
        return self.normalise(a) == self.normalise(b)

    def readable(self, answer: str) -> bool:
        """Whether `answer`, from a data set, can serve as ground truth."""
        return self.extract(answer) is not None

    def score(self, completion: str, truth: str) -> float:
        """1.0 if the completion's answer equals the truth, else 0.0; an unreadable completion scores 0."""
        found = self.extract(completion)
        return 1.0 if found is not None and self.equal(found, truth) else 0.0

    def _marked(self, text: str) -> str | None:
        """The answer in the last marker: AMBIGUOUS if it cannot be read, None if there is no marker."""
        tag = last_tag(text)
        if tag is None:
            return self._marked_in_text(text)
        found = self._marked_in_text(tag)
        return found if found is not None else self._given(tag)

    def _marked_in_text(self, text: str) -> str | None:
        boxed = last_boxed(text)
        if boxed is not None:
            return self._given(boxed)
        spans = (*hash_spans(text), *phrase_spans(text))
        return next((found for found in map(self._read, spans) if found is not None), None)

    def _given(self, span: str) -> str:
        """The answer in a place that should contain an answer and nothing else."""
        return (self._read(span) or AMBIGUOUS) if span.strip() else AMBIGUOUS

    def _read(self, span: str) -> str | None:
        """The answer at the start of `span`: AMBIGUOUS if several are joined there, None if there is none."""
        raise NotImplementedError

    def _lenient(self, text: str) -> str | None:
        """The answer of a text without a marker, or None."""
        raise NotImplementedError


def _shortened(completion: str) -> str:
    """The end of a completion, with runs of white space collapsed, on which the patterns below would be slow."""
    text = re.sub(r"[^\S\n]+", " ", completion[-MAX_CHARACTERS:])
    return re.sub(r"(?: ?\n)+ ?", "\n", text)


@dataclass(frozen=True)
class Choice(AnswerType):
    """One letter (or digit) of `choices`; case does not matter if it is marked, in brackets, or stands alone."""

    choices: tuple[str, ...] = ("A", "B", "C", "D")
    name: ClassVar[str] = "choice"

    def _read(self, span: str) -> str | None:
        letters, span = "".join(self.choices), bare(span)
        start = re.match(rf"(?:(?:option|choice)\s+)?\(?\s*([{letters}])(?![\w'’])(?:\s?\))?", span, re.IGNORECASE)
        if start is None:
            return None
        rest = span[start.end() :]
        if self._another(start[1].upper(), rest):
            return AMBIGUOUS
        # "a matter of taste" begins with an article, "A because" with a choice.
        is_word = start[1].islower() and re.match(r"\s\w", rest) and not start[0].endswith(")")
        return None if is_word else start[1].upper()

    def _lenient(self, text: str) -> str | None:
        letters, line = "".join(self.choices), text.strip()
        # A single line that begins like an answer, "C. Because A is wrong", is that answer.
        if "\n" not in line and re.match(rf"\W*[{letters}](?:[.):,]|\W*$)", line, re.IGNORECASE):
            return self._read(line)
        text = self._without_options(line)
        # A capital before a lower-case word may be an article, and is skipped.
        standalone = rf"(?<![\w'’])(?:\(([{letters}{letters.lower()}])\)|([{letters}])(?![\w'’])(?!\s[a-z]))"
        found = [match[1] or match[2] for match in re.finditer(standalone, text)]
        return found[-1].upper() if found else None

    def _another(self, first: str, rest: str) -> bool:
        """Whether another choice follows at once: joined ("A or B"), with a stop of its own ("A. B. Because"; no
        initial, as in "A. D. H. Lawrence"), or among letters alone ("A.C.C").
        """
        letters = "".join(self.choices)
        if re.match(rf"{_JOIN}(?:[{letters}](?![\w'’])|\([{letters.lower()}]\))", rest):
            return True
        second = re.match(rf"[.):]\s?([{letters}])[.):](?!\s?(?:[a-z]|[A-Z]\.))", rest)
        alone = re.findall(r"\w", rest) if re.fullmatch(rf"(?:\W+[{letters}])+\W*", rest) else []
        return {*alone, second[1] if second else first} != {first}

    def _without_options(self, text: str) -> str:
        """The text without the options that it repeats, a line each from the first on; the last one may be cut."""
        lines = text.split("\n")
        for first in range(len(lines)):
            repeated = 0
            for line, choice in zip(lines[first:], self.choices, strict=False):
                if not re.match(rf"\W*{choice}(?:[.):]|\W*$)", line):
                    break
                repeated += 1
            if repeated > 1:
                return "\n".join(lines[:first] + lines[first + repeated :])
        return text


@dataclass(frozen=True)
class Label(AnswerType):
    """One of `labels`, as whole words; case and space, hyphen or underscore do not matter. Spelled as in `labels`."""

    labels: tuple[str, ...]
    name: ClassVar[str] = "label"

    def _found(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, label) of every label that is not negated; longer labels take precedence."""
        spelled = {_label_key(label): label for label in self.labels}
        keys = sorted(spelled, key=len, reverse=True)
        words = "|".join(r"[\s_-]+".join(map(re.escape, key.split())) for key in keys)
        matches = re.finditer(rf"(?<![\w-])(?<!\bnot )(?:{words})(?![\w])", text, re.IGNORECASE)
        return [(match.start(), match.end(), spelled[_label_key(match[0])]) for match in matches]

    def _read(self, span: str) -> str | None:
        span = bare(span)
        found = self._found(span)
        if not found:
            return None
        joined = len(found) > 1 and re.fullmatch(_JOIN, span[found[0][1] : found[1][0]])
        if found[0][0] == 0 and not (joined and found[0][2] != found[1][2]):
            return found[0][2]
        return found[0][2] if len({label for _, _, label in found}) == 1 else AMBIGUOUS

    def _lenient(self, text: str) -> str | None:
        found = self._found(text)
        return found[-1][2] if found else None


def _label_key(label: str) -> str:
    """What spellings of a label share; a hyphen before its first digit is the number's sign."""
    sign = "-" if re.match(r"-[0-9]", label.strip()) else ""
    return sign + " ".join(re.findall(r"[^\s_-]+", label)).lower()


_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(rf"(?<![\w.)])-?(?:[0-9]{{1,3}} [0-9]+/[0-9]+|{_DIGITS}(?: ?/ ?[0-9]+|[eE][+-]?[0-9]+)?)(?!_)")
_PLAINER = [  # LaTeX and signs → forms that _NUMBER matches
    (re.compile(r"\\[dtc]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r" \1/\2"),
    (re.compile(r"\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*\{?\s*(-?[0-9]+)\s*\}?"), r"e\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=[0-9])\\[,!](?=[0-9]{3})"), ""),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"-\s?\\?[$€£¥]\s?|-\s(?=[0-9]+/)"), "-"),
    (re.compile(r"\\?[$€£¥]"), " "),
]


@dataclass(frozen=True)
class Number(AnswerType):
    """A rational number: 72, -1,234, $72, 0.25, 3/4, 1 1/2, 3 × 10^8; a following unit or percent sign is ignored.

    Only numbers count: 12 + 7 and 144/12, which are not worked out, are not answers.
    """

    name: ClassVar[str] = "number"

    def _read(self, span: str) -> str | None:
        span = _plainer(bare(span))
        equation = re.match(r"[^=]*=", span)
        while equation and not re.search(r"(?<!\\)[A-Za-z]{2}", equation[0]):  # x = 5, 48 + 24 = 72
            span = span[equation.end() :]
            equation = re.match(r"[^=]*=", span)
        span = span.strip(" (*_")
        start = _NUMBER.match(span)
        if start is None:
            return None
        unfinished = re.match(
            rf"{_JOIN}-?\.?[0-9]|\s*[-+*/^×·÷]\s*[(0-9]|\s*\\(?:times|cdot|div)|:[0-9]", span[start.end() :]
        )
        return AMBIGUOUS if unfinished else _number_text(start[0])

    def _given(self, span: str) -> str:
        found = self._read(span) if span.strip() else AMBIGUOUS
        if found is None:  # "Paul has 72 apples": words first, but only one number
            numbers = {_number_text(match[0]) for match in _NUMBER.finditer(_plainer(span))}
            found = numbers.pop() if len(numbers) == 1 else AMBIGUOUS
        return found

    def _lenient(self, text: str) -> str | None:
        found = _NUMBER.findall(_plainer(text))
        return _number_text(found[-1]) if found else None


def _plainer(text: str) -> str:
    for pattern, replacement in _PLAINER:
        text = pattern.sub(replacement, text)
    return text.strip()


def _number_text(text: str) -> str:
    """The number as an integer, a decimal of up to 20 places, or a reduced fraction; otherwise AMBIGUOUS."""
    found = rational(re.sub(r"\s*/\s*", "/", text))
    if found is None or ("/" in text and found.denominator == 1):
        return AMBIGUOUS
    for places in range(21):
        scaled = found * 10**places
        if scaled.denominator == 1:
            digits = str(abs(scaled.numerator)).zfill(places + 1)
            whole = digits[: len(digits) - places] + ("." + digits[len(digits) - places :] if places else "")
            return ("-" if found < 0 else "") + whole
    return str(Fraction(found))


@dataclass(frozen=True)
class Math(AnswerType):
    """An expression, tuple, set, interval or word in LaTeX or plain text, compared by value or else by normalised text.

    An expression equals its value (1 + 1 is 2), so if the question is an expression, use number instead.
    """

    name: ClassVar[str] = "math"

    def normalise(self, answer: str) -> str:
        found = self.extract(answer)
        return _maths_text(answer) if found is None else found

    def readable(self, answer: str) -> bool:
        return bool(self.normalise(answer))

    def _read(self, span: str) -> str | None:
        enclosed = re.match(r"[\s*_]*(?:\$\$?([^$]+)\$|\\\((.+?)\\\))", span)
        if enclosed:
            return _maths_text(enclosed[1] or enclosed[2])
        sentence = re.split(r"[.!?;](?=\s|$)", bare(span))[0]
        return _maths_text(sentence) if _is_maths(sentence) else None

    def _given(self, span: str) -> str:
        if _is_maths(span):
            return _maths_text(span)
        inside = [maths for maths in inline_maths(span) if _is_maths(maths)]
        return _maths_text(inside[0] if inside else span)

    def _lenient(self, text: str) -> str | None:
        if _is_maths(text):
            return _maths_text(text)
        for span in inline_maths(text):
            if _is_maths(span):
                return _maths_text(span)
        found = _NUMBER.findall(_plainer(text))
        return _maths_text(found[-1]) if found else None


def _is_maths(text: str) -> bool:
    """Whether `text` is a line of mathematics, optionally with a unit, and not prose."""
    if not re.search(r"[A-Za-z0-9∞π]", text) or "\n" in text.strip() or len(text) > MAX_EXPRESSION:
        return False
    return value(text) is not None or not re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", _without_words(text))


def _without_words(text: str) -> str:
    return re.sub(r"\\(?:text|textbf|mathrm|mbox|begin|end)\s*\{[^{}]*\}", "", text)


def _maths_text(text: str) -> str:
    """The canonical text of a mathematical answer; equal answers have equal texts."""
    text = tidy(text)
    if len(text) > MAX_EXPRESSION:
        return collapsed(text)
    name, equals, rest = text.replace("\\in ", "=").partition("=")
    if (
        equals
        and "=" not in rest
        and (re.fullmatch(r"\s*\\?[A-Za-z]\w*(?:\(\w\))?\s*", name) or rational(name) is not None)
    ):
        text = rest.strip()  # x = 5, f(x) = 2x, 48 + 24 = 72
    found = value(text)
    if found is not None:
        return canonical(found)
    opening, closing, inside = _brackets(text)
    parts = _at_commas(inside)
    if len(parts) > 1:
        texts = [_maths_text(part) for part in parts]
        ordered = texts if opening in ("(", "[") else sorted(texts)  # sets and bare lists have no order
        return f"{opening}{', '.join(ordered)}{closing}"
    plain = collapsed(bare(text).rstrip("."))
    if re.fullmatch(r"[A-Za-z][A-Za-z '-]*", plain):
        return plain.lower()
    # A space between letters or digits is significant: "1 2" is not 12.
    return re.sub(r" (?![0-9A-Za-z])|(?<![0-9A-Za-z]) ", "", re.sub(r"\\[dtc]frac", r"\\frac", plain))


def _brackets(text: str) -> tuple[str, str, str]:
    """(opening, closing, inside) of a text in one pair of brackets; the first two are empty without brackets."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}" and len(_at_commas(text)) == 1:
        return text[0], text[-1], text[1:-1]
    return "", "", text


def _at_commas(text: str) -> list[str]:
    """`text` split at the commas outside brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts if all(part.strip() for part in parts) else [text]


@dataclass(frozen=True)
class Exact(AnswerType):
    """Text, compared without emphasis, outer quotes, extra white space and a final full stop."""

    ignore_case: bool = False
    name: ClassVar[str] = "exact"

    def _read(self, span: str) -> str:
        text = bare(collapsed(bare(span)).removesuffix("."))
        return text.casefold() if self.ignore_case else text

    def _lenient(self, text: str) -> str:
        return self._read(text)


@dataclass(frozen=True)
class Regex(AnswerType):
    """The last match of `pattern`, or of its first group if there is one. Beware of patterns that backtrack."""

    pattern: str
    ignore_case: bool = False
    name: ClassVar[str] = "regex"

    def extract(self, completion: str) -> str | None:
        matches = list(re.finditer(self.pattern, completion[-MAX_CHARACTERS:], re.IGNORECASE * self.ignore_case))
        return self.normalise(matches[-1][min(matches[-1].re.groups, 1)] or "") or None if matches else None

    def normalise(self, answer: str) -> str:
        return collapsed(answer).casefold() if self.ignore_case else collapsed(answer)

    def readable(self, answer: str) -> bool:
        return bool(answer.strip())


@dataclass(frozen=True)
class Json(AnswerType):
    """The last JSON object or array (in a tag, a fence, or prose), or one `field` of an object; keys in any order."""

    field: str | None = None
    name: ClassVar[str] = "json"

    def extract(self, completion: str) -> str | None:
        tag = last_tag(completion[-MAX_CHARACTERS:])
        found = _last_json(completion[-MAX_CHARACTERS:] if tag is None else tag)
        if self.field is None:
            return None if found is None else _json_text(found)
        content = found.get(self.field) if isinstance(found, dict) else None
        # In a field, 72 and "72" are the same answer.
        return (
            None
            if content is None
            else (collapsed(content) or None)
            if isinstance(content, str)
            else _json_text(content)
        )

    def readable(self, answer: str) -> bool:
        return self.extract(answer) is not None or (self.field is not None and bool(answer.strip()))


def _last_json(text: str) -> Any:
    """The last complete object or array, or None."""
    decoder, found, place = json.JSONDecoder(parse_constant=_no_constant), None, 0
    for start in list(re.finditer(r"[{\[]", text))[-1000:]:
        if start.start() < place:
            continue
        try:
            found, place = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json_text(content: Any) -> str:
    whole = _whole_numbers(content)
    return json.dumps(whole, sort_keys=True, ensure_ascii=False, separators=(", ", ": "))


def _whole_numbers(content: Any) -> Any:
    """`content` with 1.0 replaced by 1, so that equal numbers have equal texts."""
    if isinstance(content, dict):
        return {key: _whole_numbers(item) for key, item in content.items()}
    if isinstance(content, list):
        return [_whole_numbers(item) for item in content]
    return int(content) if isinstance(content, float) and content.is_integer() else content


@dataclass(frozen=True)
class Custom(AnswerType):
    """A user's own reader, f(completion) -> str or None, and comparison, f(a, b) -> bool (by default of the texts)."""

    reader: Callable[[str], str | None]
    comparison: Callable[[str, str], bool] | None = None
    name: ClassVar[str] = "custom"

    def extract(self, completion: str) -> str | None:
        found = _called("reader", self.reader, completion)
        if found is not None and not isinstance(found, str):
            raise UserError(
                f"the answer's reader returned {found!r:.80}; return a string, or None if there is no answer"
            )
        return found

    def normalise(self, answer: str) -> str:
        return collapsed(answer)

    def equal(self, a: str, b: str) -> bool:
        if self.comparison is None:
            return super().equal(a, b)
        return bool(_called("comparison", self.comparison, a, b))

    def readable(self, answer: str) -> bool:
        return bool(answer.strip())


@dataclass(frozen=True)
class Constrained(AnswerType):
    """A reply held to constraints (data/constraints.py), which are the row's "answer", as JSON; any number of replies
    can be right."""

    name: ClassVar[str] = "constraints"

    def extract(self, completion: str) -> str | None:
        return completion.strip() or None

    def normalise(self, answer: str) -> str:
        return collapsed(answer)

    def readable(self, answer: str) -> bool:
        try:
            return bool(Constraints.from_json(answer))
        except (ValueError, RecursionError):
            return False

    def score(self, completion: str, truth: str) -> float:
        """The share of the constraints that the completion satisfies, 0..1."""
        return Constraints.from_json(truth).score(completion)


def _called(role: str, function: Callable[..., Any], *texts: str) -> Any:
    with user_code(f"the answer's {role}, given {collapsed(texts[0])!r:.80},", TIMEOUT):
        return function(*texts)


def answer_type(name: str, /, **options: Any) -> AnswerType:
    """The answer type `name` with its options, as in a task file.

    choice (choices), label (labels), number, math, exact (ignore_case), regex (pattern, ignore_case), json (field),
    custom (reader, comparison: "file.py:function"), constraints. Raises UserError for an invalid name, option or value.
    """
    if name not in _BUILDERS:
        raise UserError(f"answer type {name!r} is unknown; use one of {', '.join(_BUILDERS)}")
    build, known, required = _BUILDERS[name]
    for option in options:
        if option not in known:
            raise UserError(
                f"answer type {name} has the unknown option {option!r}; known are {', '.join(known) or 'none'}"
            )
    if required and required not in options:
        raise UserError(f"answer type {name} lacks {required!r}; give it")
    return build(**options)


def _choice(choices: Any = ("A", "B", "C", "D")) -> Choice:
    letters = _texts("choices", choices)
    if any(re.fullmatch(r"[A-Z0-9]", letter.upper()) is None for letter in letters):
        raise UserError(f"choices are {list(letters)!r:.80}; each is one letter or digit, such as [A, B, C, D]")
    return Choice(_distinct("choices", [letter.upper() for letter in letters]))


def _label(labels: Any) -> Label:
    keys = [_label_key(label) for label in _texts("labels", labels)]
    if "" in keys:
        raise UserError(f"labels has {labels[keys.index('')]!r:.80}; a label needs more than hyphens")
    _distinct("labels", keys)
    return Label(tuple(labels))


def _texts(option: str, values: Any) -> list[str]:
    if not isinstance(values, list | tuple) or len(values) < 2:
        raise UserError(f"{option} is {values!r:.80}; give a list of two or more")
    for item in values:
        if not isinstance(item, str) or not item.strip():
            raise UserError(f'{option} holds {item!r:.80}, which is not text; quote it: "yes", "0"')
    return list(values)


def _distinct(option: str, values: Iterable[str]) -> tuple[str, ...]:
    values = tuple(values)
    if len(set(values)) < len(values):
        raise UserError(f"{option} are {list(values)!r:.80}, two of them alike; make them distinct")
    return values


def _exact(ignore_case: Any = False) -> Exact:
    return Exact(_flag(ignore_case))


def _regex(pattern: Any, ignore_case: Any = False) -> Regex:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UserError(f"pattern {pattern!r:.80} is not a regular expression ({error}); fix it") from None
    return Regex(pattern, _flag(ignore_case))


def _flag(given: Any) -> bool:
    if not isinstance(given, bool):
        raise UserError(f"ignore_case is {given!r:.80}; write true or false")
    return given


def _json(field: Any = None) -> Json:
    if field is not None and not isinstance(field, str):
        raise UserError(f"field is {field!r:.80}; write the name of a JSON object's key")
    return Json(field)


def _custom(reader: Any, comparison: Any = None) -> Custom:
    return Custom(_user_function(reader), None if comparison is None else _user_function(comparison))


def _user_function(spec: Any) -> Callable[..., Any]:
    if not isinstance(spec, str | Path):
        raise UserError(f"reader or comparison is {spec!r:.80}; write it as file.py:function")
    return load_function(str(spec), "answer function")


# name: (constructor, options, required option)
_BUILDERS: dict[str, tuple[Callable[..., AnswerType], tuple[str, ...], str | None]] = {
    "choice": (_choice, ("choices",), None),
    "label": (_label, ("labels",), "labels"),
    "number": (Number, (), None),
    "math": (Math, (), None),
    "exact": (_exact, ("ignore_case",), None),
    "regex": (_regex, ("pattern", "ignore_case"), "pattern"),
    "json": (_json, ("field",), None),
    "custom": (_custom, ("reader", "comparison"), "reader"),
    "constraints": (Constrained, (), None),
}
