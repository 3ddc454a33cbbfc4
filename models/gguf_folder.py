"""A GGUF file as a model folder, which every script, mlx-lm and transformers open: `--model path/to/model.gguf`.

A file is converted once and kept in the user's cache under the hash of its content, in float32 where computing in it
is fastest (Linux CPU) and in bfloat16 elsewhere. Needs neither mlx nor torch.

    python -m models.gguf_folder model.gguf                            converts it; prints the folder in the cache
    mlx_lm.convert --hf-path FOLDER -q --mlx-path model-4bit           quantizes that folder for MLX

The cache is gguf-models under $XDG_CACHE_HOME, ~/Library/Caches (macOS) or ~/.cache.
"""

import fcntl
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common.cli import run
from common.errors import UserError
from common.files import (
    Kind,
    Unwritable,
    atomic_folder,
    expanded,
    sweep,
    user_cache,
    why_and_remedy,
    write_json,
)
from common.parser import Parser
from common.progress import progress
from common.schemas import read_as
from models.gguf_reader import GGUFFile, read_gguf
from models.gguf_tokenizer import tokenizer_of

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}  # in the safetensors format: code, bytes a number
SOURCE_FILE = "source.json"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         SOURCE_FILE)  # fmt: skip
CONVERTED = Kind(SOURCE_FILE, FILES)
VERSION = 1  # raise it when code changes what the same file gives


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file, there or not."""
    return name.lower().endswith(".gguf") and not expanded(name).is_dir()


def gguf_folder(path: str | Path, dtype: str) -> Path:
    """The folder of the GGUF file at `path` in the cache, converted first where it is missing.

    dtype: float32 or bfloat16. Raises UserError for a file that cannot be converted or a cache that cannot be written.
    """
    path = gguf_file(path)
    with cache_errors(path.name):
        digest = known_hash(path)
        folder = gguf_cache() / f"{_plain(path.stem)}-{digest[:12]}-{dtype}-v{VERSION}"
        if is_complete(folder):
            return folder
        with only_one(folder):
            if not is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
                convert(path, folder, dtype, digest)
    return folder


def gguf_file(path: str | Path) -> Path:
    """The path of a GGUF file. Raises UserError where there is none."""
    path = expanded(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; check the path")
    return path


def gguf_cache() -> Path:
    return user_cache() / "gguf-models"


@contextmanager
def cache_errors(name: str) -> Iterator[None]:
    """Say in one line that the cache cannot be written."""
    try:
        yield
    except (OSError, Unwritable) as error:
        raise UserError(
            f"{name} cannot be kept in {gguf_cache()} ({why_and_remedy(error)[0]}); "
            "set XDG_CACHE_HOME to a folder that can be written and has room"
        ) from None


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the lock beside `folder`, so that one process makes it while others wait. Freed when its process ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is making {folder.name}; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def known_hash(path: Path) -> str:
    """The SHA-256 of a file, computed once as long as its size and time stay: gigabytes take seconds at every start."""
    path, stat = path.resolve(), path.stat()
    now = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = gguf_cache() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"
    known = read_as(dict[str, Any], note, "delete it") if note.is_file() else {}
    if {key: known.get(key) for key in now} != now or not isinstance(known.get("sha256"), str):
        with path.open("rb") as file:
            known = {**now, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        write_json(note, known)
    return known["sha256"]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80]


def convert(path: Path, folder: str | Path, dtype: str, digest: str) -> Path:
    """Write the GGUF file at `path` to `folder`, which is there whole or not at all. Returns the folder.

    digest: the file's SHA-256, for the folder's source.json. Raises UserError as `gguf_folder` does.
    """
    file = read_gguf(path)
    tokenizer = tokenizer_of(file)
    with atomic_folder(folder, CONVERTED) as temporary:
        _write_weights(file, temporary / "model.safetensors", dtype)
        tokenizer.save_pretrained(temporary, save_jinja_files=False)
        write_json(temporary / "config.json", {**file.config, "dtype": dtype})
        write_json(temporary / "generation_config.json", file.token_settings)
        source = {"file": path.name, "sha256": digest, "quantization": file.quantization, "dtype": dtype}
        described = {key: file.metadata[f"general.{key}"] for key in ("name", "license") if _told(file, key)}
        write_json(temporary / SOURCE_FILE, {**source, **described})
    return Path(folder)


def _told(file: GGUFFile, key: str) -> bool:
    return isinstance(file.metadata.get(f"general.{key}"), str)


def _write_weights(file: GGUFFile, path: Path, dtype: str) -> None:
    """Write all weights to `path` in the safetensors format, one at a time, so that one of them is in memory.

    The format (a length, a JSON header, the bytes) is written here, as NumPy has no bfloat16 to hand to a library.
    """
    code, size = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers wants to find
    end = 0
    for name, shape in file.shapes.values():
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    title = f"converting {file.path.name}, once"
    with path.open("wb") as output, progress(len(file.shapes), title, "tensor") as bar:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, weight in file.weights():
            output.write(_rounded(weight, dtype).tobytes())
            bar.update()


def _rounded(weight: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as it is; bfloat16 as the upper halves of float32, rounded to the nearest, ties to even."""
    weight = np.ascontiguousarray(weight, dtype="<f4")
    if dtype == "float32":
        return weight
    bits = weight.view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def main() -> None:
    parser = Parser("Convert a GGUF file to a model folder in the cache; print its path.", yaml_file=False)
    parser.add_argument("file", help="a GGUF file of a Llama, Mistral or SmolLM")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES), help="precision of the folder's weights")
    args = parser.parse_args()
    print(gguf_folder(args.file, args.dtype))


if __name__ == "__main__":
    run(main)
