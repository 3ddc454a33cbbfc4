"""A local Hugging Face hub that implements the protocol of uploads by huggingface-hub.

with HubServer() as hub:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    ...
    hub.files      what was committed: name → bytes
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer:
    """Accepts uploads by regular commits and LFS. refuse: word → status for requests whose path contains it, such as
    {"preupload": 500}; status 0 closes the connection instead."""

    def __init__(self, refuse: dict[str, int] | None = None, token: str = "hf_test"):
        self.refuse, self.token = refuse or {}, token
        self.repos: dict[str, bool] = {}  # name → private
        self.objects: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def answer(self, body: bytes) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        refused = next((status for word, status in hub.refuse.items() if word in path), None)
        if refused == 0:
            self.close_connection = True
            self.connection.close()
            return
        if refused:
            self.reply({"error": "no"}, refused)
        elif "/lfs-object/" not in path and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.reply({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self.reply(
                {"files": [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]}
            )
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif "/lfs-object/" in path:
            hub.objects[path.rpartition("/")[2]] = body
            self.reply({})
        elif "/commit/" in path:
            self.commit(body)
        elif path.startswith("/api/models/") and path.removeprefix("/api/models/") in hub.repos:
            name = path.removeprefix("/api/models/")
            self.reply({"id": name, "private": hub.repos[name], "siblings": [], "tags": []})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        else:
            self.reply({"error": "Repository not found"}, 404)

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self.reply({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repos[name] = asked.get("private") is True or asked.get("visibility") == "private"
        self.reply({"url": f"{self.hub.url}/{name}"})

    def batch(self, asked: dict) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs-object/{entry['oid']}", "header": {}}}}
            for entry in asked["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def commit(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                self.hub.files[value["path"]] = content
        name = self.path.partition("/commit/")[0].removeprefix("/api/models/")
        url = f"{self.hub.url}/{name}/commit/{'1' * 40}"
        self.reply({"commitUrl": url, "commitOid": "1" * 40, "success": True})

    def reply(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 401:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(data)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
