"""Synthetic data: a teacher model writes, votes on, adapts and selects what a base model is trained on."""

import common  # noqa: F401  first, so that Ctrl-C among the imports of a command is one line
