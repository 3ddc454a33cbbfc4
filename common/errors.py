"""The one exception for a user's mistake, which `common.cli.run` turns into one line and exit code 2; and what other
libraries raise for a user's files.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# What mlx-lm and transformers raise for a damaged or unknown model folder.
OPENING_ERRORS = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


class UserError(Exception):
    """A mistake the user can fix. The message gives the fact, the value and the remedy, in one line."""


def reason(error: Exception) -> str:
    """The type of an error and the first line of its message: the message alone may be empty or say too little."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


LONGEST_LINE = 4000  # characters


def one_line(message: str) -> str:
    """A message as one line of a terminal: control characters are shown as Python writes them, and the middle of an
    endless one is left out.
    """
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], message)
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE - 1000]} ... {line[-1000:]}"


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Say in one line that `name` cannot be opened, whatever a library raises for the content of its files.

    name: with its verb's subject, such as "the tokenizer of MODEL" or "MODEL". The block calls libraries only.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (each library has types of its own; tokenizers raises plain Exception)
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{name} needs Python code that comes with it, which is never run here; use a model without such code"
            ) from None
        raise UserError(f"{name} cannot be opened ({reason(error)}); check that it is complete") from None
