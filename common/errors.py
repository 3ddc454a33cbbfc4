"""The one exception for a user's mistake, which `common.cli.run` turns into one line and exit code 2; and what other
libraries raise for a user's files.
"""

# What mlx-lm and transformers raise for a damaged or unknown model folder.
OPENING_ERRORS = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


class UserError(Exception):
    """A mistake the user can fix. The message gives the fact, the value and the remedy, in one line."""


def reason(error: Exception) -> str:
    """The type of an error and the first line of its message: the message alone may be empty or say too little."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
