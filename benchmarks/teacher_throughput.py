"""How near the teacher's client comes to the ideal: calls of a fixed latency, many at once, over real HTTP.

    python benchmarks/teacher_throughput.py                         500 calls of 400 ms, 32 at once, 3 times
    python benchmarks/teacher_throughput.py --latency 0.1 --clients teacher create

The server runs in a process of its own and does nothing but wait, so that what is measured is the client. Ideal is
calls * latency / concurrency. "teacher" is synth/teacher/client.py with its cache, limits and ledger; "create" the
openai package's own chat.completions.create behind a semaphore. The clock starts with the first call: imports are not
counted, opening the connections is. The machine's load is shown, because a loaded one measures the load.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from openai import AsyncOpenAI

from benchmarks.endpoint import Endpoint, completion, serve, serving
from common.cli import run
from common.errors import UserError
from common.parser import Parser
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher
from synth.teacher.completions import Ask
from synth.teacher.limits import Limits

CLIENTS = ("teacher", "create")
WORDS = "A train leaves at noon and travels at eighty kilometres an hour. " * 8


class Result(NamedTuple):
    """One run. overhead: seconds over the ideal's; cpu: milliseconds of this process per call."""

    client: str
    seconds: float
    overhead: float
    cpu: float
    peak: int
    load: float


class Answering(Endpoint):
    """Answers every POST after the latency, and every GET with the counts."""

    latency = 0.4
    stats = {"calls": 0, "in_flight": 0, "peak": 0}  # noqa: RUF012  (shared by all connections)

    def asked(self, first: bytes, fields: Mapping[bytes, bytes], body: bytes) -> None:
        if first.startswith(b"GET"):
            self.send(self.stats)
            return
        self.stats["calls"] += 1
        self.stats["in_flight"] += 1
        self.stats["peak"] = max(self.stats["peak"], self.stats["in_flight"])
        asyncio.get_running_loop().call_later(self.latency, self.answer)

    def answer(self) -> None:
        self.stats["in_flight"] -= 1
        self.send(completion("At two.", prompt_tokens=9, completion_tokens=4))


async def ask_teacher(url: str, calls: int, concurrency: int, cache: Cache) -> float:
    """Seconds that our `Teacher` takes. Raises UserError unless every call was answered and stored."""
    limits = Limits(calls=calls, tokens=10**9, money=1e6, price_in=1.0, price_out=1.0)
    async with Teacher(f"{url}/v1", "m", cache, limits, concurrency) as teacher:
        asks = [Ask([{"role": "user", "content": f"{index} {WORDS}"}]) for index in range(calls)]
        start = time.perf_counter()
        replies = await teacher.ask_all(asks)
        seconds = time.perf_counter() - start
    if {reply.status for reply in replies} != {"ok"} or cache.counts() != {"ok": calls}:
        raise UserError(f"not every call was answered and stored: {cache.counts()}; see what else the machine does")
    return seconds


async def ask_create(url: str, calls: int, concurrency: int, cache: Cache) -> float:
    """Seconds that the openai package's own `create` takes."""
    del cache  # it has none
    places = asyncio.Semaphore(concurrency)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        completions = client.chat.completions  # imported at its first use, which is not to be measured

        async def ask(index: int) -> None:
            async with places:
                message = {"role": "user", "content": f"{index} {WORDS}"}
                await completions.create(model="m", messages=[message], temperature=1.0, max_tokens=64)  # type: ignore[list-item]

        start = time.perf_counter()
        await asyncio.gather(*(ask(index) for index in range(calls)))
        return time.perf_counter() - start


def measure(client: str, calls: int, latency: float, concurrency: int) -> Result:
    """One run of one client against a fresh server, with a fresh cache."""
    ask = {"teacher": ask_teacher, "create": ask_create}[client]
    server = serving("--serve", "--latency", str(latency))
    with server as url, tempfile.TemporaryDirectory() as folder, Cache(Path(folder) / "cache") as cache:
        cpu = time.process_time()
        seconds = asyncio.run(ask(url, calls, concurrency, cache))
        cpu = 1000 * (time.process_time() - cpu) / calls
        with urlopen(f"{url}/stats") as response:
            stats = json.load(response)
    if stats["calls"] != calls:
        raise UserError(f"the server got {stats['calls']} calls, not {calls}; see what else the machine does")
    return Result(client, seconds, seconds - calls * latency / concurrency, cpu, stats["peak"], os.getloadavg()[0])


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--latency", type=float, default=0.4, help="of the server, seconds")
    parser.add_argument("--concurrency", type=int, default=32, help="most calls in flight")
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=["teacher"])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each client")
    parser.add_argument("--most", type=float, default=1.15, help="times the ideal that the teacher's best run may take")
    parser.add_argument("--serve", action="store_true", help="be the server")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.serve:
        Answering.latency = args.latency
        asyncio.run(serve(Answering))
        return
    ideal = args.calls * args.latency / args.concurrency
    print(f"{args.calls} calls of {args.latency:g} s at {args.concurrency} at once: ideal {ideal:.2f} s")
    print("client    seconds  times ideal  cpu ms/call  peak in flight  load")
    results = []
    for _ in range(args.repeats):
        for client in args.clients:
            r = measure(client, args.calls, args.latency, args.concurrency)
            results.append(r)
            shown = f"{client:8}  {r.seconds:7.2f}  {r.seconds / ideal:11.3f}"
            print(f"{shown}  {r.cpu:11.2f}  {r.peak:14d}  {r.load:4.1f}", flush=True)
    ours = [result for result in results if result.client == "teacher"]
    if any(result.peak > args.concurrency for result in ours):
        raise UserError(f"more than {args.concurrency} calls were in flight; the gate is broken")
    if ours and min(result.seconds for result in ours) > args.most * ideal:
        raise UserError(f"the best run took more than {args.most:g} times the ideal; see the load of the machine")


if __name__ == "__main__":
    run(main)
