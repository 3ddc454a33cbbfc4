"""Replacing a function of mlx-lm."""

import sys
from collections.abc import Callable


def replace_in_mlx_lm(original: Callable, replacement: Callable) -> None:
    """Replace `original` in every mlx-lm module imported so far.

    Modules imported later get `replacement` from the module that defines it.
    """
    name = original.__name__
    for module in [module for path, module in sys.modules.items() if path.startswith("mlx_lm.models.")]:
        if getattr(module, name, None) is original:
            setattr(module, name, replacement)
