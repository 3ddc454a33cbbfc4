"""A teacher on loopback that fails as it is told to, and records what it was asked. Over real HTTP.

    with FaultyServer(lambda body, seen: "500" if seen == 0 else "ok") as server: ... server.url

The plan is called with the request's body and how often the same messages were asked before; it returns the name
of a behaviour, or a (status, headers, bytes) triple.
"""

import json
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content, finish="stop", **message):
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def error(status, message, code=None, **headers):
    body = {"error": {"message": message, "code": code, "type": code}}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode()


def good(body):
    """An answer to any request: JSON for a schema, else a text that depends on the messages alone."""
    return completion(f"answer to {body['messages'][-1]['content']}")


RESPONSES = {
    "ok": lambda body: good(body),
    "json": lambda body: completion('{"question": "What is 1 + 1?", "answer": 2}'),
    "fenced": lambda body: completion('Here it is:\n```json\n{"question": "a", "answer": 2}\n```\nEnjoy!'),
    "repairable": lambda body: completion("{'question': 'a', answer: 2,}"),
    "prose": lambda body: completion("The question is simple."),
    "wrong type": lambda body: completion('{"question": "a", "answer": "many"}'),
    "apology": lambda body: completion("I'm sorry, but I can't help with that request."),
    "refusal": lambda body: completion(None, refusal="I will not."),
    "filter": lambda body: completion("", finish="content_filter"),
    "truncated": lambda body: completion('{"question": "a", "ans', finish="length"),
    "empty": lambda body: completion(" \n"),
    "no choices": lambda body: {**good(body), "choices": []},
    "null choice": lambda body: {**good(body), "choices": [None]},
    "list": lambda body: [1],
    "429": lambda body: error(429, "slow down", "rate_limit_exceeded"),
    "429 seconds": lambda body: error(429, "slow down", Retry_After="0.05"),
    "429 date": lambda body: error(429, "slow down", Retry_After=formatdate(time.time() + 1, usegmt=True)),
    "429 long": lambda body: error(429, "slow down", Retry_After="86400"),
    "quota": lambda body: error(429, "You exceeded your current quota", "insufficient_quota"),
    "500": lambda body: error(500, "boom"),
    "503": lambda body: error(503, "overloaded"),
    "400": lambda body: error(400, "context too long"),
    "400 filter": lambda body: error(400, "the prompt was filtered", "content_filter"),
    "404": lambda body: error(404, "no such model"),
    "html": lambda body: (200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><p>Welcome</p>"),
    "broken json": lambda body: (200, {}, b'{"choices": [{"mess'),
}


class FaultyServer:
    """Runs in threads of this process. calls, peak: requests so far, most at once; bodies, headers: as received."""

    def __init__(self, plan="ok", latency=0.0):
        self.plan = plan if callable(plan) else lambda body, seen: plan
        self.latency = latency
        self.calls = self.in_flight = self.peak = 0
        self.bodies: list[dict] = []
        self.headers: list[Message] = []
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self):
                # A client that was killed, or has given up, is no fault of the server.
                with suppress(ConnectionError, ValueError):
                    outer.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def handle(self):
                with suppress(ConnectionError):
                    super().handle()

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # the default of 5 makes many who connect at once wait for seconds
            block_on_close = False

        self.http = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request, body):
        asked = json.dumps(body["messages"])
        with self.lock:
            seen, self.seen[asked] = self.seen[asked], self.seen[asked] + 1
            self.calls += 1
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            self.bodies.append(body)
            self.headers.append(request.headers)
        behaviour = self.plan(body, seen)
        time.sleep(3.0 if behaviour == "slow" else self.latency)
        with self.lock:  # before the answer is sent: the client may be quicker to send its next request
            self.in_flight -= 1
        if behaviour in ("drop", "slow"):
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            return
        found = behaviour if isinstance(behaviour, tuple | dict) else RESPONSES[behaviour](body)
        status, headers, content = found if isinstance(found, tuple) else (200, {}, json.dumps(found).encode())
        request.send_response(status)
        cut = behaviour == "half"
        for name, value in {"Content-Type": "application/json", **headers}.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content) + (100 if cut else 0)))
        request.end_headers()
        request.wfile.write(content)
        if cut:
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True


RESPONSES["half"] = RESPONSES["broken json"]
