"""The modules of a model that lie outside its lists of layers: a short walk, where that over all layers takes long."""

from collections.abc import Iterator
from typing import Any

import mlx.nn as nn


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each, the model itself first, in the order of mlx's `named_modules`."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        yield name, module
        stack += _children(module, f"{name}." if name else "")


def _children(container: dict[str, Any], prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for key, value in container.items():
        if isinstance(value, nn.Module):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _children(value, f"{prefix}{key}.")
