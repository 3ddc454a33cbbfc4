"""Where a completion marks an answer: tags, boxes, hashes, phrases. What it means: rewards.answers.

python -m pytest tests/test_answers.py
"""

import re
from collections.abc import Iterator

MOST = 20  # markers of a kind to try, from the last backwards
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_TAG_END = re.compile(r"</answer>", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_HASHES = re.compile(r"####+[ \t]*\n?([^\n]*)")
_NUMBERED_HEADING = re.compile(r"\s*[0-9]+[.):]\s+\S")
_PHRASE = re.compile(
    r"\banswer[*_]*\s*(?:is\b(?!\s+not\b)|was\b|(?:would|should|must)\s+be\b|:|=)[*_:\s]*(?=([^\n]{0,2000}))",
    re.IGNORECASE,
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|rm)\s*\{([^{}]*)\}")
_INLINE_MATHS = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]", re.DOTALL)


def last_tag(text: str) -> str | None:
    """The content of the last `<answer>` tag: "" if it is empty or never closed, None if there is no tag."""
    starts = [match.end() for match in _TAG.finditer(text)]
    if not starts:
        return None
    end = _TAG_END.search(text, starts[-1])
    return text[starts[-1] : end.start()].strip() if end else ""


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{}, nested braces included: "" if never closed, None if there is none."""
    matches = list(_BOXED.finditer(text))
    if not matches:
        return None
    start = matches[-1].end()
    if not text.startswith("{", start):
        return text[start:].split("$")[0].split(None, 1)[0] if text[start:].split("$")[0].split() else ""
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + 1 : start + brace.start()].strip()
    return ""


def hash_spans(text: str) -> Iterator[str]:
    """What follows `####`, last first: anything on the last line, single words before it (others are headings)."""
    for match in reversed(list(_HASHES.finditer(text))[-MOST:]):
        at_end = not text[match.end() :].strip()
        if (at_end or len(match[1].split()) == 1) and not _NUMBERED_HEADING.match(match[1]):
            yield match[1]


def phrase_spans(text: str) -> Iterator[str]:
    """The rest of the line after "the answer is", "Answer:" and the like, last first."""
    return (match[1] for match in reversed(list(_PHRASE.finditer(text))[-MOST:]) if match[1].strip())


def inline_maths(text: str) -> Iterator[str]:
    """The content of $ $, $$ $$, \\( \\) or \\[ \\], last first."""
    return (match[1] or match[2] or match[3] for match in reversed(list(_INLINE_MATHS.finditer(text))[-MOST:]))


def bare(span: str) -> str:
    """`span` without surrounding white space, emphasis, quotes and dollar signs, and without \\text{} and the like."""
    return _WRAPPED.sub(r"\1", span).strip().strip("*_`\"'“”$ \n\t").removeprefix("\\(").removesuffix("\\)").strip()


def collapsed(text: str) -> str:
    """`text` stripped, with every run of white space replaced by one space."""
    return " ".join(text.split())
