"""A GGUF file of 4-bit numbers as a folder for MLX that holds these very numbers, in the user's cache.

Quantizing the float32 weights anew would cost more than the file's own quantization did: at mlx-lm's defaults (4 bits
in groups of 64) SmolLM2-135M-Instruct loses 0.43 nats a token on English text. Serves the quantizations that mlx
computes with as they are: Q4_0, Q4_1 and Q8_0.
"""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from common.files import atomic_folder, write_json
from common.schemas import read_as
from models.gguf_folder import CONVERTED, cache_errors, is_complete, only_one
from models.gguf_reader import GGUFFile, halves_of_heads, read_gguf

BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
GROUP_SIZE = 32  # GGUF's


def four_bit_folder(path: Path, source: Path) -> Path:
    """The folder of the GGUF file at `path` with its own quantized numbers, made first where it is missing.

    source: the folder that the file was converted to; scales and norms are in its precision. Raises UserError where
    the folder cannot be written or the file is of another quantization.
    """
    folder = source.with_name(f"{source.name}-4bit")
    with cache_errors(folder.name):
        if is_complete(folder):
            return folder
        with only_one(folder):
            if not is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _write(path, source, folder)
    return folder


def _write(path: Path, source: Path, folder: Path) -> None:
    file, config = read_gguf(path), read_as(dict[str, Any], source / "config.json")
    bits = _bits(file)
    others = {module: _quantization(count) for module, count in bits.items() if count != 4}
    config["quantization"] = config["quantization_config"] = {**_quantization(4), "mode": "affine", **others}
    weights = _weights(file, config, bits)
    with atomic_folder(folder, CONVERTED) as temporary:
        mx.save_safetensors(str(temporary / "model.safetensors"), weights, metadata={"format": "mlx"})
        write_json(temporary / "config.json", config)
        for other in source.iterdir():
            if not (temporary / other.name).exists():
                shutil.copy(other, temporary)


def _bits(file: GGUFFile) -> dict[str, int]:
    """The bits of every quantized module. Raises UserError for a quantization that mlx does not compute with."""
    bits = {}
    for name, (theirs, _) in file.shapes.items():
        kind = file.tensors[name].tensor_type.name
        if kind in BITS:
            bits[theirs.removesuffix(".weight")] = BITS[kind]
        elif kind != "F32":
            raise file.refuse(f"{name} is {kind}, none of {', '.join(BITS)}, in which MLX computes")
    return bits


def _weights(file: GGUFFile, config: dict[str, Any], bits: dict[str, int]) -> dict[str, mx.array]:
    """The file's numbers as they are, with their rows in transformers' order, and scales and norms as floats."""
    arrays = mx.load(str(file.path))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, (theirs, _) in file.shapes.items():
        stem, module = name.removesuffix(".weight"), theirs.removesuffix(".weight")
        count = heads.get(stem.split(".")[-1])
        for part in ("weight", "scales", "biases") if module in bits else ("weight",):
            array = arrays[f"{stem}.{part}"]
            array = halves_of_heads(array, count) if count else array
            weights[f"{module}.{part}"] = array if array.dtype == mx.uint32 else array.astype(_dtype(config))
    return weights


def _dtype(config: dict[str, Any]) -> mx.Dtype:
    return getattr(mx, config["dtype"])


def _quantization(bits: int) -> dict[str, int]:
    return {"group_size": GROUP_SIZE, "bits": bits}
