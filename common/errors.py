"""The one exception for a user's mistake; `common.cli.run` turns it into one line and exit code 2."""


class UserError(Exception):
    """A mistake the user can mend. The message gives the fact, the value and the remedy, in one line."""
