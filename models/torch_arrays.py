"""Files of named arrays in PyTorch: read whole, or refused in one line. The twin of models.arrays."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.files import reading
from models.adapter_config import refuse_arrays


def read_arrays(path: str | Path, remedy: str, weights: bool = True) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .npz file by name.

    weights: all are floating-point numbers. Raises UserError, which ends with `remedy`, if the file is damaged, holds
    anything else, or a number that is not finite.
    """
    with reading(path, remedy):
        if Path(path).suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            tensors = load_file(path)
    if weights:
        others = (name for name, tensor in tensors.items() if not tensor.is_floating_point())
        refuse_arrays(path, others, "no weights", remedy)
    check_finite(path, tensors, remedy)
    return tensors


def check_finite(source: object, tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Raise UserError, naming the first, if tensors of floating-point numbers hold NaN or infinity."""
    found = (
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all()
    )
    refuse_arrays(source, found, "numbers that are not finite", remedy)
