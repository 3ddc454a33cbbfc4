"""A teacher, opened by its settings: an endpoint, or an offline teacher started as a process of its own."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from common.files import write_json
from common.parser import split_words
from common.schemas import read_as
from synth.chat_api import OFFLINE_MODEL
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher
from synth.teacher.flags import TeacherSettings
from synth.teacher.limits import Count

ROOT = Path(__file__).resolve().parent.parent.parent


@contextmanager
def offline_teacher(flags: str = "") -> Iterator[str]:
    """The URL of an offline teacher in a process of its own, which ends with the block, or with this process.

    Raises UserError where it does not start; its own message is then on stderr.
    """
    command = [sys.executable, "-m", "synth.offline", "--until-stdin-closes", *split_words("offline-teacher", flags)]
    pipe = subprocess.PIPE
    # From the project's folder, so that -m finds it wherever the user is.
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
async def open_teacher(settings: TeacherSettings) -> AsyncIterator[Teacher]:
    """The teacher at a URL; prints what it cost when it is closed. Raises UserError as Teacher does."""
    if not settings.teacher_url or not settings.teacher_model:
        raise UserError("no teacher is named; give --teacher-url and --teacher-model")
    assert settings.cache is not None, "where a run folder would say it, teacher_of is called"
    with Cache(settings.cache) as cache:
        teacher = Teacher(
            settings.teacher_url,
            settings.teacher_model,
            cache,
            settings.limits,
            settings.concurrency,
            timeout=settings.timeout,
            endpoint=settings.endpoint,
        )
        async with teacher:
            try:
                yield teacher
            finally:
                total = teacher.ledger.total
                priced = settings.price_in or settings.price_out
                cost = f"{total.money:.4g} in money" if priced else "cost unknown, as no prices were given"
                print(
                    f"teacher: {total.calls} calls ({total.retries} retries), {total.cached} from the cache, "
                    f"{total.tokens} tokens, {cost}"
                )
                for endpoint in teacher.endpoints if len(teacher.endpoints) > 1 else ():
                    print(f"teacher: {endpoint.calls} calls to {endpoint.url}")


@asynccontextmanager
async def teacher_of(settings: TeacherSettings, folder: Path) -> AsyncIterator[Teacher]:
    """The teacher of a run: its cache and its ledger are kept in the run folder, and the ledger goes on from there.

    Without a URL it is an offline teacher. The ledger is written every second.
    """
    ledger = folder / "ledger.json"
    with nullcontext() if settings.teacher_url else offline_teacher(settings.offline_teacher) as started:
        if started:
            # Its port changes from run to run; its answers depend on its flags, so the cache knows it by them.
            name = f"offline teacher {settings.offline_teacher}"
            settings = replace(settings, teacher_url=started, teacher_model=OFFLINE_MODEL, endpoint=name)
        settings = replace(settings, cache=settings.cache or str(folder / "cache.sqlite"))
        async with open_teacher(settings) as teacher:
            if ledger.is_file():
                teacher.ledger.restore(read_as(dict[str, Count], ledger))

            async def keep_ledger() -> None:
                while True:
                    await asyncio.sleep(1)
                    write_json(ledger, teacher.ledger.as_dict())

            keeping = asyncio.create_task(keep_ledger())
            try:
                yield teacher
            finally:
                keeping.cancel()
                write_json(ledger, teacher.ledger.as_dict())
