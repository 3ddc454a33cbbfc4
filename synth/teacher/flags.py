"""The flags by which a command finds its teacher, and the teacher that they describe, opened.

Leaves out keys, which come from the environment only. Every entry point that asks a teacher uses it.

    python -m pytest tests/test_generate.py -k command
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from common.errors import UserError
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher
from synth.teacher.limits import Limits

ROOT = Path(__file__).resolve().parent.parent.parent


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """Which teacher is asked, how hard, and what it may cost."""
    group = parser.add_argument_group("teacher")
    group.add_argument("--teacher-url", help="an OpenAI-compatible endpoint, up to and with /v1")
    group.add_argument("--teacher-model", help="the model's name at that endpoint")
    group.add_argument("--cache", default="synth_cache.sqlite", metavar="FILE", help="where answers are kept")
    group.add_argument("--concurrency", type=int, default=8, help="most requests in flight")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds a request may take")
    group.add_argument("--teacher-temperature", type=float, default=1.0, help="of generation, rewriting and votes")
    group.add_argument("--answer-tokens", type=int, default=1024, help="most tokens of one answer")
    group.add_argument("--max-calls", type=int, help="limit on calls, retries counted")
    group.add_argument("--max-tokens", type=int, help="limit on tokens, of prompts and answers together")
    group.add_argument("--max-money", type=float, help="limit on money, in the currency of the prices")
    group.add_argument("--price-in", type=float, default=0.0, help="of a million prompt tokens")
    group.add_argument("--price-out", type=float, default=0.0, help="of a million answer tokens")


def limits_from(args: argparse.Namespace) -> Limits:
    """The limits and prices that `add_teacher_flags` has read."""
    return Limits(args.max_calls, args.max_tokens, args.max_money, args.price_in, args.price_out)


@contextmanager
def offline_teacher(words: str = "") -> Iterator[str]:
    """The URL of an offline teacher that runs as a process of its own until the block is left, or this process ends.

    words: its flags. Raises UserError where it does not start; then its own message stands on stderr.
    """
    command = [sys.executable, "-m", "synth.offline", "--until-stdin-closes", *shlex.split(words)]
    pipe = subprocess.PIPE
    # From the project's folder, by which -m finds it, wherever the user's is.
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        url = process.stdout.readline().strip()
        if not url:
            raise UserError("the offline teacher did not start; its message stands above")
        try:
            yield url
        finally:
            process.stdin.close()


@asynccontextmanager
async def open_teacher(args: argparse.Namespace, endpoint: str | None = None) -> AsyncIterator[Teacher]:
    """The teacher of `add_teacher_flags`; prints what it cost when it is closed. Raises UserError as Teacher does.

    endpoint: the name the cache knows it by, where that is not its URL.
    """
    if not args.teacher_url or not args.teacher_model:
        raise UserError("no teacher is named; give --teacher-url and --teacher-model")
    with Cache(args.cache) as cache:
        teacher = Teacher(
            args.teacher_url,
            args.teacher_model,
            cache,
            limits_from(args),
            args.concurrency,
            timeout=args.timeout,
            endpoint=endpoint,
        )
        async with teacher:
            try:
                yield teacher
            finally:
                total = teacher.ledger.total
                print(
                    f"teacher: {total.calls} calls ({total.retries} retries), {total.cached} from the cache, "
                    f"{total.tokens} tokens, {total.money:.4g} in money"
                )
