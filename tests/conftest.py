"""Model folders for every test: the embedded model itself, and its untrained twin, which costs nothing."""

from dataclasses import replace
from pathlib import Path

import models.fast_blas  # noqa: F401  (before mlx)
from models.tiny import RECIPES, build, tiny_model_path

import pytest


def tiny_random_folder(folder: Path, **changes) -> Path:
    """Write an untrained tiny-digits to `folder`: a real model folder in well under a second.

    changes: fields of the Recipe that differ, such as hidden_size or seed.
    """
    return build(replace(RECIPES["tiny-digits"], steps=0, **changes), folder)


@pytest.fixture(scope="session")
def tiny_digits() -> Path:
    """The folder of the embedded model in the user's own cache, built there if it is missing. Not to be written to."""
    return tiny_model_path()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained model. Not to be written to."""
    return tiny_random_folder(tmp_path_factory.mktemp("models") / "tiny-random")
