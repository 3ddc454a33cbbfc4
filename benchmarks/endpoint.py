"""A teacher's endpoint in a process of its own, which parses no more of HTTP than our client sends.

A benchmark says what it answers by a subclass of Endpoint, which its flag --serve hands to `serve`, and starts itself
with that flag by `serving`.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from common.errors import UserError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class Endpoint(asyncio.Protocol):
    """One connection; `asked` is each subclass's own."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, rest = self.received.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in lines if b": " in line)
        if not end or len(rest) < int(fields.get(b"content-length", 0)):
            return
        self.received = b""  # clients wait for the answer before they send again
        self.asked(first, fields, rest)

    def asked(self, first: bytes, fields: Mapping[bytes, bytes], body: bytes) -> None:
        """A whole request has come: its first line, its headers in lower case, its body."""
        raise NotImplementedError

    def send(self, answer: dict[str, Any]) -> None:
        """Answer with JSON."""
        body = json.dumps(answer).encode()
        self.transport.write(HEAD % len(body) + body)


def completion(content: str, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """A chat completion as endpoints send it."""
    message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [message], "usage": usage}


async def serve(endpoint: type[Endpoint]) -> None:
    """Serve until killed; the port is the first line on stdout."""
    server = await asyncio.get_running_loop().create_server(endpoint, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def serving(*words: str) -> Iterator[str]:
    """The running benchmark once more, with these words, as a server; yields its address."""
    with subprocess.Popen([sys.executable, sys.argv[0], *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise UserError("the server did not start; its error stands above")
            yield f"http://127.0.0.1:{line.strip()}"
        finally:
            process.kill()
