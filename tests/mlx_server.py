"""mlx_lm.server as a process, for as long as a test asks it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 60  # seconds
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON that a URL answers; with a body, by POST."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with OPENER.open(request, timeout=PATIENCE) as response:
        return json.load(response)


@contextmanager
def serving(folder: str | Path) -> Iterator[str]:
    """Serve the model in `folder`; gives the URL of its API once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import models.cpu; models.cpu.enable(); import mlx_lm.server as s; s.main()"
    command = [sys.executable, "-c", code, "--model", str(folder), "--port", str(port)]
    own = {"HF_HUB_OFFLINE": "1", "MLX_DISABLE_COMPILE": "1"}  # compiling costs more than a few tokens gain
    process = subprocess.Popen(command, env={**os.environ, **own}, stderr=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            try:
                assert ask(url + "/health")["status"] == "ok"
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()
