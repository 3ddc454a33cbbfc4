"""BM25 search for passages of a local library, with an index kept on disk.

The library is `.jsonl`, `.txt` and `.md`, plain or as `.gz`, `.bz2`, `.xz`, split into passages of a fixed number of
words. Up to 50 000 passages are scored by rank-bm25 in memory, more by bm25s, whose index is memory-mapped. Both use
the same formula, BM25 (k1 1.5, b 0.75) with idf ln((N + 1) / df), which is rank-bm25's BM25Plus and bm25s's "bm25+"
with delta 0: a delta adds the same number to all passages. (BM25Okapi has no counterpart: it raises negative idf to a
quarter of the mean.)

There is no stemming, no stop words, and no segmentation of scripts without spaces: a run of Chinese is one word.

    python benchmarks/retrieval.py --passages 1000000       time and memory
"""

import bz2
import gzip
import json
import lzma
import math
import re
import zlib
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import bm25s
import numpy as np
from pydantic import Field
from rank_bm25 import BM25Plus

from common.errors import UserError
from common.files import Kind, atomic_folder, reading, write_json
from common.progress import Progress, progress
from common.schemas import Schema, read_as
from synth.near_duplicates import find_duplicates

LENGTH = 200  # words per passage
OVERLAP = 40  # words
# ROUGE-L: copies with small changes. Passages with the same wording and different facts have 0.8 to 0.9.
NEAR_DUPLICATES = 0.95
LARGE = 50_000  # passages, above which bm25s takes over
ENGINES = ("rank-bm25", "bm25s")
K1, B = 1.5, 0.75
TEXT_KEYS = ("text", "passage", "content")

KINDS = (".jsonl", ".txt", ".md")
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
WORD = re.compile(r"\w+")
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|\n\s*\n|\n(?=#)")
BLOCK = 1 << 16  # characters of a .txt or .md held at once
RANK_OFFSET = 60  # of reciprocal rank fusion (Cormack et al., SIGIR 2009)

REMEDY = "delete that folder"  # where an index is damaged
MARKER = "retrieval_index.json"
FORMAT = 1  # of the folder; changing it rebuilds every index
TEXTS, TEXT_ENDS = "passages.bin", "passage_ends.npy"  # UTF-8 of all passages end to end; byte where each ends
WORDS, WORD_ENDS = "words.bin", "word_ends.npy"  # int32 numbers of all words end to end; where each passage ends
VOCABULARY = "vocab.index.json"  # word → number; the name under which bm25s saves it
INDEX = Kind(MARKER, (MARKER, TEXTS, TEXT_ENDS, WORDS, WORD_ENDS, "*.index.*"), lambda content: "made_from" in content)


class Passage(NamedTuple):
    """A piece of the library. id: FILE#NUMBER, stable while file and splitting are; source: the file's path."""

    id: str
    text: str
    source: str


def words(text: str) -> list[str]:
    """The tokeniser of passages and queries: runs of letters, digits and underscores, in lower case."""
    return WORD.findall(text.lower())


def cut(text: str, length: int, overlap: int) -> list[str]:
    """Split a text into passages of at most `length` words, each starting at most `overlap` words before the last end.

    A passage starts and ends at a sentence boundary if there is one in the overlap or in its second half; the overlap
    is at most half the length. No word is lost.
    """
    spans = [match.span() for match in WORD.finditer(text)]
    starts = [start for start, _ in spans]
    sentences: dict[int, int] = {}  # index of a sentence's first word → character where the sentence starts
    for match in SENTENCE_END.finditer(text):
        sentences.setdefault(bisect_left(starts, match.end()), match.end())
    begins = sorted(sentences)

    def character(word: int) -> int:
        if word in (0, len(spans)):
            return 0 if word == 0 else len(text)
        gap = text[spans[word - 1][1] : spans[word][0]]
        # Symbols before a word belong to it: -5, $5, (see
        return sentences.get(word, starts[word] - len(re.split(r"\s", gap)[-1]))

    passages, first, last = [], 0, 0
    while last < len(spans):
        last = min(first + length, len(spans))
        if last < len(spans):
            last = max(begins[bisect_left(begins, first + length // 2 + 1) : bisect_left(begins, last + 1)] or [last])
        passages.append(text[character(first) : character(last)].strip())
        first = last - overlap
        first = min(begins[bisect_left(begins, first) : bisect_left(begins, last + 1)] or [first])
    return passages


def library_files(library: str | Path | Sequence[str | Path]) -> dict[str, Path]:
    """The files of a library by name: a folder's are named by their path within it, hidden ones are skipped.

    A second file of the same name becomes NAME~2. Raises UserError if a path is missing, empty or of another kind.
    """
    files: dict[str, Path] = {}
    for root in map(Path, [library] if isinstance(library, str | Path) else library):
        if not root.exists():
            raise UserError(f"the library {root} does not exist; check the path")
        found = [root] if root.is_file() else sorted(path for path in root.rglob("*") if _is_text(path, root))
        if not found or not _kind(found[0]):
            raise UserError(f"the library {root} holds no .jsonl, .txt or .md (plain, .gz, .bz2 or .xz)")
        for path in found:
            if path in files.values():
                continue
            name = base = root.name if path == root else path.relative_to(root).as_posix()
            count = 1
            while name in files:
                count += 1
                name = f"{base}~{count}"
            files[name] = path
    if not files:
        raise UserError("the library names no file or folder; give one, or use no library")
    return files


def _kind(path: Path) -> str:
    """`.jsonl`, `.txt` or `.md`, compressed or not; empty if it is none of these."""
    name = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    return name.suffix.lower() if name.suffix.lower() in KINDS else ""


def _is_text(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return bool(_kind(path)) and not hidden and path.is_file()


def _lines(path: Path, bar: Progress) -> Iterator[tuple[int, str]]:
    """Number and text of each line. Raises UserError with the line if the file cannot be decoded or decompressed."""
    number = done = 0
    try:
        with path.open("rb") as raw, OPENERS.get(path.suffix.lower(), nullcontext)(raw) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                bar.update(raw.tell() - done)
                done = raw.tell()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number} is not UTF-8 (byte {error.start} of the line); save it as UTF-8") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after line {number} ({error}); replace the file") from None


def _texts(path: Path, text_key: str | None, bar: Progress) -> Iterator[str]:
    """The texts to split: the rows of a `.jsonl`, the blocks of a `.txt` or `.md`."""
    lines = _lines(path, bar)
    if _kind(path) == ".jsonl":
        yield from (_text_of(line, f"{path}:{number}", text_key) for number, line in lines if line.strip())
        return
    block: list[str] = []
    size = 0
    for _, line in lines:
        block.append(line)
        size += len(line)
        # A block ends between paragraphs, unless a paragraph is very long.
        if size >= BLOCK and (not line.strip() or size >= 4 * BLOCK):
            yield "".join(block)
            block, size = [], 0
    yield "".join(block)


def _text_of(line: str, place: str, text_key: str | None) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise UserError(f'{place} is {type(row).__name__}, not an object; write {{"text": "..."}}')
    keys = [key for key in ([text_key] if text_key else TEXT_KEYS) if key in row]
    if not keys:
        wanted = repr(text_key) if text_key else " or ".join(map(repr, TEXT_KEYS))
        raise UserError(f"{place} has the keys {sorted(row)}; it needs {wanted}, or name the key of the text")
    if not isinstance(row[keys[0]], str):
        raise UserError(f"{place} has {keys[0]!r} of type {type(row[keys[0]]).__name__}; it must be a string")
    return row[keys[0]]


def build_index(
    library: str | Path | Sequence[str | Path],
    folder: str | Path,
    length: int = LENGTH,
    overlap: int = OVERLAP,
    text_key: str | None = None,
    engine: str | None = None,
) -> "Index":
    """The index of a library, kept in `folder`: opened if made from the same files in the same way, else rebuilt.

    A file counts as unchanged while path, size and modification time are. length, overlap: words per passage, and words
    that it may share with the next; text_key: the `.jsonl` field of the text (default: text, passage or content);
    engine: one of ENGINES (default: by size). The folder is replaced atomically.
    Raises UserError, with file and line, if the library is missing, empty or cannot be read.
    """
    if length < 1 or not 0 <= overlap <= length // 2:
        raise UserError(f"passages of {length} words cannot overlap by {overlap}; use 0 to half the length")
    if engine not in (None, *ENGINES):
        raise UserError(f"the retrieval engine {engine!r} is not known; use one of {', '.join(ENGINES)}")
    files = library_files(library)
    states = [[name, str(path), path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()]
    cutting = {"length": length, "overlap": overlap, "text_key": text_key}
    made_from = {"format": FORMAT, **cutting, "engine": engine, "files": states}
    folder = Path(folder)
    known = read_as(dict[str, Any], folder / MARKER, REMEDY) if (folder / MARKER).is_file() else {}
    if known.get("made_from") != made_from:
        with atomic_folder(folder, INDEX) as temporary:
            size = sum(path.stat().st_size for path in files.values())
            with progress(size, "reading the library", "byte", scale=True) as bar:
                firsts, vocabulary = _write_passages(files, temporary, length, overlap, text_key, bar)
            count = len(np.load(temporary / TEXT_ENDS, mmap_mode="r"))
            if not count:
                raise UserError(f"the library {', '.join(map(str, files.values()))} has no words; add text to it")
            chosen = engine or ENGINES[count > LARGE]
            if chosen == "bm25s":
                _write_bm25s(temporary, vocabulary)
            else:
                (temporary / VOCABULARY).write_text(json.dumps(vocabulary), encoding="utf-8")
            write_json(temporary / MARKER, {"made_from": made_from, "engine": chosen, "first_passages": firsts})
    return Index(folder)


def _pieces(text: str, length: int, overlap: int) -> Iterator[tuple[str, list[str]]]:
    """The passages of a text with their words; none if it has no words."""
    found = words(text)
    if len(found) > length:
        yield from ((piece, words(piece)) for piece in cut(text, length, overlap))
    elif found:
        yield text.strip(), found


def _write_passages(
    files: dict[str, Path], folder: Path, length: int, overlap: int, text_key: str | None, bar: Progress
) -> tuple[list[int], dict[str, int]]:
    """Write all passages and the numbers of their words, one text in memory at a time.

    Returns the number of each file's first passage, and word → number.
    """
    vocabulary: defaultdict[str, int] = defaultdict()
    vocabulary.default_factory = vocabulary.__len__  # a new word gets the next number
    text_ends, word_ends, firsts = array("q"), array("q"), []
    text_end = word_end = 0
    with (folder / TEXTS).open("wb") as texts_file, (folder / WORDS).open("wb") as words_file:
        for path in files.values():
            firsts.append(len(text_ends))
            for text in _texts(path, text_key, bar):
                for piece, its_words in _pieces(text, length, overlap):
                    # JSON may contain lone surrogates, which UTF-8 cannot encode.
                    text_end += texts_file.write(piece.encode("utf-8", errors="replace"))
                    array("i", map(vocabulary.__getitem__, its_words)).tofile(words_file)
                    word_end += len(its_words)
                    text_ends.append(text_end)
                    word_ends.append(word_end)
    np.save(folder / TEXT_ENDS, np.array(text_ends, dtype=np.int64))
    np.save(folder / WORD_ENDS, np.array(word_ends, dtype=np.int64))
    return firsts, dict(vocabulary)


class _WordNumbers:
    """The passages as lists of word numbers, read from disk one at a time; both libraries accept it as a corpus."""

    def __init__(self, folder: Path, vocabulary: dict[str, int]):
        self.vocab = vocabulary
        self.ends = np.load(folder / WORD_ENDS)
        self.numbers = np.memmap(folder / WORDS, dtype=np.int32, mode="r").view(np.ndarray)

    @property
    def ids(self) -> "_WordNumbers":
        """bm25s recognises a corpus of numbers by its `ids` and `vocab`."""
        return self

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for end in self.ends.tolist():
            yield self.numbers[start:end].tolist()
            start = end


def _write_bm25s(folder: Path, vocabulary: dict[str, int]) -> None:
    """Replace the word numbers with bm25s's index, which holds every word's score in every passage."""
    model = bm25s.BM25(k1=K1, b=B, delta=0, method="bm25+")
    model.index(_WordNumbers(folder, vocabulary), create_empty_token=False, show_progress=False)
    model.save(folder, show_progress=False)
    (folder / WORDS).unlink()
    (folder / WORD_ENDS).unlink()


class MadeFrom(Schema):
    """What an index was made from. files: name, path, size and time of each."""

    files: Annotated[list[tuple[str, str, int, int]], Field(min_length=1)]


class Manifest(Schema):
    """The marker of an index."""

    engine: Literal[ENGINES]  # type: ignore[valid-type]
    first_passages: list[int]
    made_from: MadeFrom


class Index:
    """An index folder, opened. `len(index)` is the number of passages."""

    def __init__(self, folder: str | Path):
        self._folder = folder = Path(folder)
        self.repeated = 0
        manifest = read_as(Manifest, folder / MARKER, REMEDY)
        self.engine: str = manifest.engine
        self.vocabulary = read_as(dict[str, int], folder / VOCABULARY, REMEDY)
        self._names, self._sources = zip(*(state[:2] for state in manifest.made_from.files), strict=True)
        self._firsts = manifest.first_passages
        with reading(folder, REMEDY):
            self._ends = np.load(folder / TEXT_ENDS, mmap_mode="r")
            self._texts = np.memmap(folder / TEXTS, dtype=np.uint8, mode="r")

        # Opened now and not at the first search, when the folder may hold the index of a changed library.
        if self.engine == "bm25s":
            model = bm25s.BM25.load(folder, mmap=True, load_vocab=False, show_progress=False)
            self._load_scorer = lambda: model.get_scores_from_ids
        else:
            numbers = _WordNumbers(folder, self.vocabulary)
            self._load_scorer = lambda: BM25Plus(numbers, k1=K1, b=B, delta=0).get_scores

    @cached_property
    def _scores_of(self) -> Callable[[list[int]], np.ndarray]:
        """Word numbers → every passage's score. Loaded at first use, as rank-bm25 has to count words first."""
        return self._load_scorer()

    def __len__(self) -> int:
        return len(self._ends)

    def scores(self, query: str) -> np.ndarray:
        """BM25 of every passage, (len(self),) float32; 0 if no word of the query occurs. Repeated words count once."""
        known = [self.vocabulary[word] for word in dict.fromkeys(words(query)) if word in self.vocabulary]
        if not known:
            return np.zeros(len(self), dtype=np.float32)
        return np.asarray(self._scores_of(known), dtype=np.float32)

    def search(
        self, queries: str | Sequence[str], top_k: int = 10, near_duplicates: float = NEAR_DUPLICATES
    ) -> list[Passage]:
        """The `top_k` best passages, best first; fewer if fewer contain a word of a query or are distinct.

        Several queries are merged by reciprocal rank, as their scores have no common scale. Of near-duplicates (ROUGE-L
        of at least `near_duplicates`) the best is kept; `repeated` is the number of others.
        """
        scores = [self.scores(query) for query in ([queries] if isinstance(queries, str) else queries)]
        depth = 2 * top_k
        while True:
            rankings = [best(row, depth) for row in scores]
            passages = [self._passage(number) for number in merge(rankings)[:depth]]
            texts = [passage.text for passage in passages]
            repeated = {duplicate.number for duplicate in find_duplicates(texts, threshold=near_duplicates)}
            distinct = [passage for number, passage in enumerate(passages) if number not in repeated]
            self.repeated = len(repeated)
            if len(distinct) >= top_k or len(passages) < depth:
                return distinct[:top_k]
            depth *= 4

    def passage(self, passage_id: str) -> Passage:
        """The passage with this id. Raises UserError if there is none."""
        name, _, digits = passage_id.rpartition("#")
        if name in self._names and re.fullmatch("[0-9]+", digits):
            number = self._firsts[self._names.index(name)] + int(digits)
            if number < len(self) and self._passage(number).id == passage_id:
                return self._passage(number)
        raise UserError(f"the library has no passage {passage_id!r}; the library or its splitting has changed since")

    def _passage(self, number: int) -> Passage:
        # A file without words shares its first number with the next file; the last of them is the right one.
        file = int(np.searchsorted(self._firsts, number, side="right")) - 1
        start = int(self._ends[number - 1]) if number else 0
        text = self._texts[start : int(self._ends[number])].tobytes().decode("utf-8")
        return Passage(f"{self._names[file]}#{number - self._firsts[file]}", text, self._sources[file])


def best(scores: np.ndarray, count: int) -> list[int]:
    """The indices of the highest positive scores, best first; ties by lower index."""
    least = -math.inf if count >= len(scores) else np.partition(scores, -count)[-count]
    found = np.flatnonzero((scores >= least) & (scores > 0))
    return found[np.lexsort((found, -scores[found]))][:count].tolist()


def merge(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Reciprocal rank fusion: an item's score is the sum of 1 / (60 + rank) over the rankings."""
    worth: defaultdict[int, float] = defaultdict(float)
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            worth[item] += 1 / (RANK_OFFSET + rank)
    return sorted(worth, key=lambda item: (-worth[item], item))
