"""Many samples from local endpoints: memory, time and the cache, in generation and vote; then once more from the cache.

    python benchmarks/synth_scale.py                           20 000 samples, at most 4 votes each, 2 endpoints
    python benchmarks/synth_scale.py --count 2000 --votes 0    a quick look

The endpoints run in processes of their own and write word problems of about 60 words, unlike each other, and answers of
about 80. What is measured is this process: the stages of synth.run, the client, the cache. Memory is the peak so far.
After the second pass, which sends nothing, the stages' files have to be the same bytes.
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import Endpoint, completion, serve, serving
from common.cli import run
from common.errors import UserError
from common.parser import Parser
from rewards.answers import answer_type
from synth.pipeline.generate import generate
from synth.pipeline.verify import Voting, verify
from synth.stages import kept, write_rows
from synth.task import Task
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher

TASK = Task("sums in words", "Solve the word problem.", answer=answer_type("number"))
SYLLABLES = [first + second for first in "bdfgklmnprstvw" for second in ("a", "e", "i", "o", "u", "an", "er", "il")]
VOCABULARY = ["".join(random.Random(number).choices(SYLLABLES, k=3)) for number in range(20_000)]
MEGABYTE = 1e6


def words(rng: random.Random, count: int) -> str:
    """That many words without a meaning."""
    return " ".join(rng.choices(VOCABULARY, k=count))


def answer_to(body: dict, sample: int) -> str:
    """A sample of its own for every number, the right sum for every vote, and JSON with neither for the probe."""
    asked = body["messages"][-1]["content"]
    if numbers := re.findall(r"(\d+) and (\d+) in all", asked):
        total = sum(map(int, numbers[-1]))
        return f"{words(random.Random(sample), 80)}. The answer is {total}"
    rng = random.Random(sample)
    one, other = rng.randrange(1000), rng.randrange(1000)
    text = f"{words(rng, 28)}, {words(rng, 28)}: {one} and {other} in all?"
    return json.dumps({"input": text, "output": str(one + other), "waves": 3})


class Answering(Endpoint):
    """Answers by the number of the sample, which the client sends along."""

    def asked(self, first: bytes, fields: Mapping[bytes, bytes], body: bytes) -> None:
        content = answer_to(json.loads(body), int(fields.get(b"x-sample", 0)))
        self.send(completion(content, len(body) // 4, len(content) // 4))


class Meter:
    """Prints a row of the table every `every` answers."""

    def __init__(self, teacher: Teacher, cache: Path, every: int):
        self.teacher, self.cache, self.every = teacher, cache, every
        self.started, self.cpu, self.last = time.perf_counter(), time.process_time(), 0

    def row(self, stage: str) -> None:
        """One row, now."""
        total = self.teacher.ledger.total
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        files = sum(path.stat().st_size for path in self.cache.parent.glob(f"{self.cache.name}*"))
        seconds, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu
        figures = f"{total.calls:7d}  {total.cached:7d}  {memory / MEGABYTE:8.1f}  {files / MEGABYTE:8.1f}"
        print(f"{stage:10}  {figures}  {seconds:7.1f}  {cpu:7.1f}", flush=True)

    async def watch(self, stage: str) -> None:
        """A row whenever so many more answers have come."""
        while True:
            await asyncio.sleep(0.05)
            total = self.teacher.ledger.total
            if total.calls + total.cached >= self.last + self.every:
                self.last = total.calls + total.cached
                self.row(stage)


async def one_pass(urls: list[str], folder: Path, args: argparse.Namespace) -> list[str]:
    """Generation and vote, with the cache in `folder`; returns the digests of what they write."""
    cache = folder / "cache.sqlite"
    digests = []
    with Cache(cache) as store:
        async with Teacher(" ".join(urls), "m", store, concurrency=args.concurrency, endpoint="local") as teacher:
            meter = Meter(teacher, cache, args.every)
            rows = []
            for stage in ("generate", "verify") if args.votes else ("generate",):
                watching = asyncio.create_task(meter.watch(stage))
                if stage == "generate":
                    rows = await generate(TASK, teacher, args.count)
                else:
                    rows = await verify(kept(rows), TASK, teacher, Voting(votes=args.votes))
                watching.cancel()
                write_rows(folder / f"{stage}.jsonl", rows)
                digests.append(hashlib.sha256((folder / f"{stage}.jsonl").read_bytes()).hexdigest())
                meter.row(f"{stage} end")
                print(f"{stage}: kept {len(kept(rows))} of {len(rows)}", flush=True)
            for endpoint in teacher.endpoints:
                print(f"{endpoint.calls} calls to endpoint {urls.index(endpoint.url) + 1}")
    return digests


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--count", type=int, default=20_000, help="samples to ask for")
    parser.add_argument("--votes", type=int, default=4, help="most votes a sample; 0: no vote")
    parser.add_argument("--endpoints", type=int, default=2, help="local servers")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight at each")
    parser.add_argument("--every", type=int, default=10_000, help="answers from row to row of the table")
    parser.add_argument("--serve", action="store_true", help="be an endpoint")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.serve:
        asyncio.run(serve(Answering))
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = [f"{stack.enter_context(serving('--serve'))}/v1" for _ in range(args.endpoints)]
        found = []
        for name in ("asked", "from the cache"):
            print(f"{name}\nstage         calls   cached   peak MB  cache MB  seconds    cpu s")
            found.append(asyncio.run(one_pass(urls, folder, args)))
    if found[0] != found[1]:
        raise UserError("the second pass wrote other bytes than the first; compare the stages' files")
    print("both passes wrote the same bytes")


if __name__ == "__main__":
    run(main)
