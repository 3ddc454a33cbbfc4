"""Time and memory to index a library and to query it, on passages made by rule.

    python benchmarks/retrieval.py                         100 000 passages, both engines, and how far they agree
    python benchmarks/retrieval.py --passages 1000000      bm25s only: rank-bm25 is skipped above 100 000

A passage has 80 to 120 words from a vocabulary of 200 000, which follow Zipf's law; a query has five words, rare ones
as likely as frequent ones. Each phase runs in its own process, so that its peak memory is its own; the peak includes
the pages read from memory-mapped files. The relevance of the passages is not measured.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from tqdm import tqdm

from common.cli import run
from common.files import atomic_file, write_json
from common.parser import Parser
from synth.pipeline.retrieval import ENGINES, Index, best, build_index

VOCABULARY = 200_000
EXPONENT = 1.07
CHUNK = 1000  # passages drawn at once
RANK_BM25_LIMIT = 100_000
TOP_K = 10
MIB = 2**20


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", default="runs/retrieval_benchmark", help="folder of library, index and results")
    return parser.parse_args()


def vocabulary() -> list[str]:
    """Words of one to five syllables; frequent ones are short, as in natural language."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]

    def word(number: int) -> str:
        letters = ""
        while number >= 0:
            letters += syllables[number % len(syllables)]
            number = number // len(syllables) - 1
        return letters

    return [word(number) for number in range(VOCABULARY)]


def write_library(path: Path, passages: int, seed: int) -> None:
    """Write a `.jsonl` of that many passages; the same for the same seed."""
    random = np.random.default_rng(seed)
    chances = np.cumsum(1 / np.arange(1, VOCABULARY + 1) ** EXPONENT)
    known = vocabulary()
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for first in tqdm(range(0, passages, CHUNK), desc="writing the library", disable=None):
            lengths = random.integers(80, 121, min(CHUNK, passages - first))
            drawn = np.searchsorted(chances, random.random(int(lengths.sum())) * chances[-1]).tolist()
            for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
                text = " ".join([known[number] for number in drawn[end - length : end]])
                file.write(json.dumps({"text": text}) + "\n")


def make_queries(count: int, seed: int) -> list[str]:
    """Five words each, whose rank in the vocabulary is log-uniform."""
    known = vocabulary()
    ranks = np.random.default_rng(seed + 1).uniform(0, np.log(VOCABULARY), (count, 5))
    return [" ".join(known[int(rank)] for rank in np.exp(row) - 1) for row in ranks]


def measured(work: Callable, *arguments: object) -> dict[str, Any]:
    """The result of `work`, with its seconds and peak memory, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, work, arguments).result()


def _measure(work: Callable, arguments: tuple) -> dict[str, Any]:
    started = time.perf_counter()
    result = work(*arguments)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {**result, "seconds": seconds, "peak_mib": peak / MIB}


def index_library(library: Path, folder: Path, engine: str) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    index = build_index(library, folder, engine=engine)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"passages": len(index), "disk_mib": size / MIB}


def query_index(folder: Path, queries: list[str]) -> dict[str, Any]:
    """Opens the index and loads what scores it; searches each query by itself; then ranks by score alone."""
    started = time.perf_counter()
    index = Index(folder)
    index.scores(queries[0])
    opened = time.perf_counter()
    found = [len(index.search(query, TOP_K)) for query in queries]
    searched = time.perf_counter()
    ranked = [best(index.scores(query), TOP_K) for query in queries]
    return {
        "open_seconds": opened - started,
        "search_seconds": searched - opened,
        "ranking_seconds": time.perf_counter() - searched,
        "found": float(np.mean(found)),
        "ranked": ranked,
    }


def overlap(one: list[list[int]], other: list[list[int]]) -> float:
    """The mean share of a query's top passages that both engines have in common."""
    pairs = [(set(a), set(b)) for a, b in zip(one, other, strict=True) if a or b]
    return float(np.mean([len(a & b) / max(len(a), len(b)) for a, b in pairs]))


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir)
    library = folder / f"library-{args.passages}-{args.seed}.jsonl"
    if not library.exists():
        write_library(library, args.passages, args.seed)
    queries = make_queries(args.queries, args.seed)
    print(f"{args.passages:,} passages, {library.stat().st_size / MIB:.0f} MiB; {args.queries} queries, top {TOP_K}")
    results: dict[str, Any] = {"passages": args.passages, "queries": args.queries, "seed": args.seed}
    ranked = {}
    for engine in args.engines:
        if engine == "rank-bm25" and args.passages > RANK_BM25_LIMIT:
            print(f"rank-bm25  skipped above {RANK_BM25_LIMIT:,} passages")
            continue
        indexed = measured(index_library, library, folder / f"index-{engine}", engine)
        queried = measured(query_index, folder / f"index-{engine}", queries)
        ranked[engine] = queried.pop("ranked")
        results[engine] = {"index": indexed, "query": queried}
        print(
            f"{engine:9}  index {indexed['seconds']:.1f} s, peak {indexed['peak_mib']:,.0f} MiB, "
            f"on disk {indexed['disk_mib']:,.0f} MiB | open {queried['open_seconds']:.2f} s, "
            f"{args.queries} queries {queried['search_seconds']:.2f} s "
            f"(ranking alone {queried['ranking_seconds']:.2f} s), peak {queried['peak_mib']:,.0f} MiB"
        )
    if len(ranked) == 2:
        results["overlap"] = overlap(*ranked.values())
        print(f"both engines have {results['overlap']:.1%} of their top {TOP_K} in common")
    write_json(folder / f"results-{args.passages}.json", results)


if __name__ == "__main__":
    run(main)
