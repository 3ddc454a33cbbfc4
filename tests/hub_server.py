"""A Hugging Face hub on loopback that implements what huggingface-hub 2.x needs to download a model.

    with HubServer({"TinyLlama/TinyLlama-1.1B-Chat-v1.0": folder}) as hub: ... hub.url, hub.asked

A name in `gated` is answered as a model whose terms were not accepted; every other unknown name as a hub does.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves folders under names while entered. asked: (method, path) of every request."""

    def __init__(self, models: dict[str, Path], gated: tuple[str, ...] = ()):
        self.models, self.gated = models, gated
        self.asked: list[tuple[str, str]] = []

    def __enter__(self) -> "HubServer":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        self.asked.append((request.command, path))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, kind, file = "/".join(parts[:2]), (parts + [""] * 3)[2], "/".join(parts[4:])
        if name in self.gated:
            return self._refuse(request, 403, "GatedRepo", "Access to this model is restricted")
        if name not in self.models:
            return self._refuse(request, 404, "RepoNotFound", "Repository not found")
        folder = self.models[name]
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        if path.startswith("/api/") and kind == "revision":
            return self._json(request, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        if path.startswith("/api/") and kind == "tree":
            return self._json(request, [self._entry(folder / file, file) for file in files])
        if kind == "resolve" and file in files:
            content = (folder / file).read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self._send(request, 200, content, headers)
        return self._refuse(request, 404, "EntryNotFound", "Entry not found")

    def _entry(self, path: Path, name: str) -> dict:
        content = path.read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _json(self, request, content) -> None:
        self._send(request, 200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, request, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._send(request, status, body, {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, request, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
