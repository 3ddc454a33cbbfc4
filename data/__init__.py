"""Generating, reading, validating and batching `.jsonl`. Needs neither mlx nor torch."""

import common  # noqa: F401  first, so that Ctrl-C among the imports of a command is one line
