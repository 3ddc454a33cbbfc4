"""JSON that may be anyone's: text → value, or a ValueError in one line."""

import json
import re
from typing import Any

DEEPEST = 64  # levels of lists and objects
TOO_DEEP = f"nested more than {DEEPEST} levels deep"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as an escape


def parse_json(text: str) -> Any:
    """The content of JSON that may be anyone's.

    Raises ValueError if it is malformed, nested more than DEEPEST levels deep, which templates cannot render, or holds
    half of a surrogate pair, which no file and no tokenizer can.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    # Most rows have too few brackets to be too deep.
    level = [found] if text.count("[") + text.count("{") > DEEPEST else []
    for _ in range(DEEPEST):
        inner = [item for item in level if isinstance(item, list | dict)]
        level = [part for item in inner for part in (item.values() if isinstance(item, dict) else item)]
    if any(isinstance(item, list | dict) for item in level):
        raise ValueError(TOO_DEEP)
    try:
        if SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair, {error.object[error.start]!a}") from None
    return found
