"""Files of named arrays: read whole, or refused in one line. The twin for PyTorch: models.torch_arrays."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from safetensors import safe_open

from common.files import reading
from models.adapter_config import refuse_arrays


def read_arrays(path: str | Path, remedy: str, weights: bool = True) -> dict[str, mx.array]:
    """The arrays of a .safetensors or .npz file by name, evaluated.

    weights: all are floating-point numbers. Raises UserError, which ends with `remedy`, if the file is damaged, holds
    anything else, or a number that is not finite.
    """
    with reading(path, remedy):
        check_whole(path)
        arrays = dict(mx.load(str(path)))
        mx.eval(arrays)
    if weights:
        refuse_arrays(path, (name for name, array in arrays.items() if not _floats(array)), "no weights", remedy)
    check_finite(path, arrays, remedy)
    return arrays


def check_whole(path: str | Path) -> None:
    """Raise safetensors' error for a .safetensors file whose parts do not fit: mlx's own reader looks at less."""
    if Path(path).suffix == ".safetensors":
        with safe_open(path, framework="numpy"):
            pass


def check_finite(source: object, arrays: Mapping[str, mx.array], remedy: str) -> None:
    """Raise UserError, naming the first, if arrays of floating-point numbers hold NaN or infinity."""
    # A sum is the quickest look; one of float16 can overflow though every number is finite.
    sums = {name: mx.isfinite(array.sum()) for name, array in arrays.items() if _floats(array)}
    mx.eval(sums)
    suspects = (name for name, finite in sums.items() if not finite.item())
    found = (name for name in suspects if not mx.isfinite(arrays[name]).all().item())
    refuse_arrays(source, found, "numbers that are not finite", remedy)


def _floats(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)
