"""mlx_lm.server with a small model as a second, real teacher: it is not disturbed by what is ours in a request."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from synth.prompts import NewSample
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher
from synth.teacher.completions import Ask

PATIENCE = 60  # seconds
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url):
    with OPENER.open(url, timeout=5) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def server(tiny_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        "import models.cpu; models.cpu.enable(); import mlx_lm.server as s; s.main()",
        "--model",
        str(tiny_folder),
    ]
    process = subprocess.Popen(
        [*command, "--port", str(port)], env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL
    )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            try:
                assert get(url + "/health")["status"] == "ok"
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()


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
