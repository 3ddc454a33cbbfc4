"""mlx_lm.server with a small model as a second, real teacher: it is not disturbed by what is ours in a request."""

import asyncio

import pytest

from synth.prompts import NewSample
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher
from synth.teacher.completions import Ask
from tests.mlx_server import serving


@pytest.fixture(scope="module")
def server(tiny_folder):
    with serving(tiny_folder) as url:
        yield url


def test_it_answers_the_real_client_with_a_sample_index(server, tiny_folder, tmp_path):
    """An untrained model says nothing of sense, so a schema is obeyed by chance only; but every answer is stored."""
    asks = [Ask([{"role": "user", "content": "1 + 1 ="}], None, 20.0, 8, sample) for sample in range(6)]
    asks.append(Ask([{"role": "user", "content": "Write a sample."}], NewSample, max_tokens=8))

    async def main():
        with Cache(tmp_path / "c") as cache:
            async with Teacher(server, "default_model", cache, timeout=30) as teacher:
                return await teacher.ask_all(asks), teacher.ledger.total

    replies, total = asyncio.run(main())
    assert {reply.status for reply in replies[:6]} <= {"ok", "truncated", "empty"}
    assert len({reply.text for reply in replies[:6]}) > 1  # the temperature is sent: the server's own is 0
    assert replies[6].status in ("malformed", "truncated", "empty") and total.retries == 0
    again, total = asyncio.run(main())
    assert [reply.text for reply in again] == [reply.text for reply in replies] and total.calls == 0
