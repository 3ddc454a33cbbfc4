"""Where rows come from: a `.jsonl`, a folder that datasets' `save_to_disk` wrote, or a data set of Hugging Face's hub.

The optional packages pyarrow (which reads such folders) and datasets (which downloads) are imported only if needed.
What a row must contain: data.records.

    python -m pytest tests/test_sources.py
"""

import functools
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.json_text import parse_json
from common.schemas import Schema, read_key

SAVE = "save it again with datasets' save_to_disk"
INSTALL_ARROW = "pip install pyarrow"
INSTALL_HUB = "pip install datasets"
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}
HELD_OUT = 0.1  # share of the training rows used for validation if there is no validation split
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")  # OWNER/NAME, optionally with :CONFIGURATION


class ArrowFile(Schema):
    """An entry of a saved split's state.json."""

    filename: str


class Split(NamedTuple):
    """A split of a data set, or its rows from share `start` to share `end` (0..1). folder: of a saved data set."""

    data: str
    split: str
    folder: Path | None = None
    start: float = 0.0
    end: float = 1.0

    def __str__(self) -> str:
        shares = {(0.0, 1.0): "", (0.0, 1 - HELD_OUT): ", first 90 %", (1 - HELD_OUT, 1.0): ", last 10 %"}
        return f"{self.data} ({self.split}{shares[self.start, self.end]})"


Source = str | Path | Split
OWN_BASE = "increasing_mult_2_"  # of the data in data/, by which the walkthrough trains


def base_in(data: str | Path, base: str | None) -> str:
    """The base of the splits of `data`: the given one, that of the walkthrough's data, or none, as mlx-lm has it.

    So a folder with train.jsonl, valid.jsonl and test.jsonl needs no --data-base.
    """
    if base is not None:
        return base
    own = any((Path(data) / f"{OWN_BASE}{split}.jsonl").exists() for split in SPLIT_NAMES)
    return OWN_BASE if own or not Path(data).is_dir() else ""


def find_split(data: str | Path, base: str, split: str) -> Path | Split:
    """Where the rows of `split` (train, valid or test) are: `DATA/BASEsplit.jsonl`, or a split of a data set.

    data: a folder of .jsonl files, a folder of `save_to_disk`, or OWNER/NAME[:CONFIGURATION] on the hub. A data set
    without a validation split is validated on the last tenth of its training rows. Raises a UserError that lists what
    there is instead.
    """
    folder = Path(data)
    if is_saved(folder):
        return _choose(str(data), split, saved_splits(folder))
    if not folder.exists() and is_hub_name(str(data)):
        return _choose(str(data), split, dict.fromkeys(_downloaded(str(data))))
    return _jsonl_split(folder, base, split)


def whole(data: str | Path) -> Path | Split:
    """The one file, or the training split, that `data` names: a .jsonl, a folder of `save_to_disk`, a hub name."""
    path = Path(data)
    if is_saved(path):
        splits = saved_splits(path)
        split = "train" if "train" in splits else next(iter(splits))
        return Split(str(data), split, splits[split])
    if not path.exists() and is_hub_name(str(data)):
        return Split(str(data), "train")
    return path


def _jsonl_split(folder: Path, base: str, split: str) -> Path:
    path = folder / f"{base}{split}.jsonl"
    if path.is_file():
        return path
    if not folder.is_dir():
        wanted = f"{'' if base == OWN_BASE else base}{split}.jsonl"
        raise UserError(f"--data {folder} is not a folder; name the one that contains {wanted}")
    bases = sorted(p.name.removesuffix(f"{split}.jsonl") for p in folder.glob(f"*{split}.jsonl"))
    found = f"existing bases: {', '.join(map(repr, bases))}" if bases else "nor for any other base"
    raise UserError(f"{path} does not exist; {found}: set --data and --data-base")


def _choose(data: str, split: str, folders: Mapping[str, Path | None]) -> Split:
    def named(kind: str) -> str | None:
        return next((name for name in SPLIT_NAMES[kind] if name in folders), None)

    name, held_out = named(split), named("valid") is None
    if name is None and split == "valid" and "train" in folders:
        return Split(data, "train", folders["train"], 1 - HELD_OUT, 1.0)
    if name is None:
        raise UserError(
            f"{data} has the splits {', '.join(folders)}, none of which serves as {split}; name other --data"
        )
    return Split(data, name, folders[name], 0.0, 1 - HELD_OUT if split == "train" and held_out else 1.0)


def is_hub_name(data: str) -> bool:
    """Whether `data` could name a data set on the hub: OWNER/NAME, optionally with :CONFIGURATION; not a .jsonl."""
    return bool(HUB_NAME.fullmatch(data)) and not data.endswith((".json", ".jsonl"))


def is_saved(folder: Path) -> bool:
    """Whether datasets' save_to_disk wrote `folder`: a data set with splits, or a single one."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_splits(folder: Path) -> dict[str, Path]:
    """Split name → folder of a saved data set; one without splits counts as "train"."""
    if (folder / "dataset_dict.json").is_file():
        splits = {name: folder / name for name in read_key(list[str], folder / "dataset_dict.json", "splits", SAVE)}
        if splits:
            return splits
    if not (folder / "state.json").is_file():
        raise UserError(f"{folder} was not written by datasets' save_to_disk (no state.json); name such a folder")
    return {"train": folder}


def contents(source: Source) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row of `source`, unchecked; a line that is not JSON is yielded as its UserError.

    place is FILE:LINE, or NAME, row N. Raises UserError if nothing can be read at all.
    """
    if isinstance(source, Split):
        rows = arrow_rows(source.folder) if source.folder else _downloaded(source.data)[source.split]
        # Of two or more rows at least one is held out.
        bounds = [min(round(share * len(rows)), len(rows) - (0 < share < 1)) for share in (source.start, source.end)]
        name = source.folder or f"{source.data} ({source.split})"
        return ((f"{name}, row {n + 1}", rows[n]) for n in range(*bounds))
    path = Path(source)
    if is_saved(path):
        return contents(whole(path))
    return _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        # Not splitlines(): it also splits at U+2028 and others, which may occur unescaped in JSON strings.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    return ((f"{path}:{n}", _parsed(line, f"{path}:{n}")) for n, line in enumerate(lines, 1) if line.strip())


def _parsed(line: str, place: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        return UserError(f"{place} is not valid JSON ({error}); write one object a line")


def arrow_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of one saved split. Raises UserError if pyarrow is missing or a file cannot be read."""
    files = read_key(list[ArrowFile], folder / "state.json", "_data_files", SAVE)
    return [row for file in files for row in _arrow_file(folder / Path(file.filename).name)]


def _arrow_file(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow as arrow  # optional
    except ImportError:
        raise UserError(f"{file.parent} is an Arrow folder, and pyarrow is not installed; {INSTALL_ARROW}") from None
    try:
        with arrow.memory_map(str(file)) as mapped:
            return arrow.ipc.open_stream(mapped).read_all().to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise UserError(
            f"{file} cannot be read as Arrow ({' '.join(str(error).split())[:100]}); save it again"
        ) from None


@functools.cache
def _downloaded(data: str) -> Any:
    """The splits, by name, of the hub's data set OWNER/NAME[:CONFIGURATION]: downloaded once, then cached."""
    try:
        import datasets  # optional
        import huggingface_hub
    except ImportError:
        raise UserError(f"{data} is not a local folder; to read it from the Hugging Face hub: {INSTALL_HUB}") from None
    name, _, configuration = data.partition(":")
    if not _hub_answers():
        # Its retries would take a minute. Offline, it uses its cache or fails at once.
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(
            f"{data} is not a local folder, and the Hugging Face hub did not give it ({cause}); check name and network"
        ) from None


def _hub_answers() -> bool:
    """Whether the hub can be reached; assumed behind a proxy, where that cannot be tested."""
    import huggingface_hub

    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError:
        return False
    return True
