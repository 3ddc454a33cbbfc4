"""Putting a function of ours in the place of one of mlx-lm's."""

import sys
from collections.abc import Callable


def replace_in_mlx_lm(original: Callable, replacement: Callable) -> None:
    """Put `replacement` in the place of `original` in every module of mlx-lm imported so far.

    Modules imported later take it from the ones where it is defined.
    """
    name = original.__name__
    for module in [module for path, module in sys.modules.items() if path.startswith("mlx_lm.models.")]:
        if getattr(module, name, None) is original:
            setattr(module, name, replacement)
