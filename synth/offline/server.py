"""The offline teacher: an OpenAI-compatible server on loopback that answers the pipeline's prompts by rule.

It serves the demo and the tests, over real HTTP, without network and without a model. It prints its URL, on one line.
The randomness in an answer (whether it is wrong, and how) depends only on the seed, the messages and the sample index,
so that a run that was killed and started again gets the answers it would have got. It knows the tasks that have a rule
(rules.py, reviews.py) and instructions that are sums in words (instructions.py); for the effect of temperature, top_p
and template see sampling.py. It does not stream.

    python -m synth.offline --port 8080 --error-rate 0.2      with OfflineTeacher() as server: server.url
"""

import json
import re
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from random import Random
from socketserver import ThreadingTCPServer
from typing import Any, NamedTuple

from common.errors import UserError
from common.parser import Parser, split_words
from common.ranges import NATURAL, NOT_NEGATIVE, SEED, SHARE
from synth.chat_api import OFFLINE_MODEL, SAMPLE_HEADER, count_tokens
from synth.offline.instructions import read_question
from synth.offline.reviews import Reviews
from synth.offline.rules import Arithmetic, Digits, Facts, Rule, Sample
from synth.offline.sampling import favourite, sampling_of
from synth.prompts import STAGES
from synth.task import SHIPPED, load_task

TASKS = ("arithmetic", "digits", "library_facts", "reviews")  # those it knows, by their instructions
NEW = ("new_sample", "harder", "easier")  # stages whose answer is a sample
MOST_BYTES = 16_000_000  # of a request
SECTION = re.compile(r"^<(\w+) ([a-z]+)>\n(.*?)\n</\1 \2>$", re.DOTALL | re.MULTILINE)  # as synth/prompts.py writes
APOLOGY = "I'm sorry, but I can't help with that."
UNREADABLE = ("Let me think about that for a while.", "This one is a nice exercise for the reader.")
PLACEHOLDERS = {"string": "text", "integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}


class BadRequest(Exception):
    """A request that cannot be answered: status 400 and the message."""


class Request(NamedTuple):
    """One of the pipeline's prompts, parsed. sections: the data in it, by name (the last of each name)."""

    stage: str
    rule: Rule
    sections: dict[str, str]
    prompt: str


class OfflineTeacher:
    """The server, in threads of this process while it is entered. url: up to and including `/v1`.

    error_rate, malformed_rate, refusal_rate: shares of answers, 0..1; a new sample may have a wrong output, too.
    latency_ms: of every answer. port: 0 for a free one. calls: answers so far; asked: how often each request came
    (messages and sample index). Raises UserError for a bad argument or a port in use.
    """

    def __init__(
        self,
        error_rate: float = 0.2,
        latency_ms: float = 0.0,
        malformed_rate: float = 0.0,
        refusal_rate: float = 0.0,
        seed: int = 0,
        port: int = 0,
    ):
        rates = {"error": error_rate, "malformed": malformed_rate, "refusal": refusal_rate}
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise UserError(f"--{name}-rate is {rate}; it must be between 0 and 1")
        if not latency_ms >= 0 or not 0 <= port <= 65535:
            raise UserError(f"--latency-ms is {latency_ms} and --port {port}; they must be at least 0, and 0 to 65535")
        self.error_rate, self.malformed_rate, self.refusal_rate = error_rate, malformed_rate, refusal_rate
        self.latency, self.seed, self.port = latency_ms / 1000, seed, port
        rules: dict[str, Rule] = dict(zip(TASKS, (Arithmetic(), Digits(), Facts(seed), Reviews()), strict=True))
        self.rules = {load_task(SHIPPED / f"{name}.yaml").instruction: rule for name, rule in rules.items()}
        self.names = ", ".join(rules)
        self.calls = 0
        self.asked: Counter[str] = Counter()
        self._unnumbered: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> "OfflineTeacher":
        outer = self

        class Handler(_Handler):
            teacher = outer

        try:
            self._http = _Server(("127.0.0.1", self.port), Handler)
        except OSError as error:
            raise UserError(f"--port {self.port} cannot be used ({error.strerror}); omit it for a free one") from None
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._http.server_close()

    def complete(self, body: dict[str, Any], sample: str | None = None) -> dict[str, Any]:
        """The chat completion for a request's body. sample: the index the client sent, if any. Raises BadRequest."""
        messages = _checked_messages(body)
        identity = self._identity(body, messages, sample)
        rng = Random(identity)
        schema = _schema(body)
        question = read_question(messages, SECTION)
        request = None if question else self._read(messages, schema)
        if question is None and request is None:
            assert schema is not None, "else there was an answer or an error"
            return _completion(body, json.dumps(_obeying(schema, {})))
        refused, malformed, wrong = (rng.random() for _ in range(3))
        if refused < self.refusal_rate:
            return _completion(body, None if schema else APOLOGY, APOLOGY if schema else None)
        if question is not None:
            content = question.content(rng, wrong, self.error_rate)
        else:
            assert request is not None, "one of the two was read"
            sampling = sampling_of(body, request.prompt, self.error_rate)
            source = favourite(identity, sampling.repeats, self.seed, type(request.rule).__name__) or rng
            content = _content(request, source if request.stage in NEW else rng, wrong < sampling.error_rate)
        if malformed < self.malformed_rate:
            return _completion(body, _spoiled(rng, content))
        if isinstance(content, dict):
            content = json.dumps(_obeying(schema, content) if schema else content)
        return _completion(body, content)

    def _identity(self, body: dict[str, Any], messages: list[dict], sample: str | None) -> str:
        """What an answer depends on. If a client sends no number, equal requests are numbered as they arrive."""
        request = json.dumps(messages, sort_keys=True)
        with self._lock:
            self.calls += 1
            if sample is None and body.get("seed") is not None:
                sample = str(body["seed"])
            if sample is None:
                sample = str(self._unnumbered[request])
                self._unnumbered[request] += 1
            self.asked[f"{sample} {request}"] += 1
        return f"{self.seed} {sample if body.get('temperature') != 0 else ''} {request}"

    def _read(self, messages: list[dict], schema: dict[str, Any] | None) -> Request | None:
        """The prompt, parsed; None if it is not one of the pipeline's, but has a schema to follow."""
        first_line = messages[0]["content"].split("\n")[0]
        stage = next((name for name, line in STAGES.items() if line == first_line), None)
        prompt = next((message["content"] for message in messages if message["role"] == "user"), "")
        rule = next((rule for text, rule in self.rules.items() if prompt.startswith(f"Task: {text}\n")), None)
        if stage is not None and rule is not None:
            return Request(stage, rule, {name: text for name, _, text in SECTION.findall(prompt)}, prompt)
        if schema is not None and stage is None:
            return None
        raise BadRequest(f"the offline teacher knows the prompts of the tasks {self.names} only; name another teacher")


def _checked_messages(body: Any) -> list[dict]:
    messages = body.get("messages") if isinstance(body, dict) else None
    texts = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not messages or not texts:
        raise BadRequest("messages must be a list of objects with a role and a text as content")
    if body.get("stream"):
        raise BadRequest("the offline teacher does not stream")
    return messages


def _schema(body: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that the answer must follow, if any."""
    wanted = body.get("response_format")
    if wanted is None:
        return None
    try:
        schema = wanted["json_schema"]["schema"]
        properties = schema["properties"]
        if not all(isinstance(prop, dict) for prop in properties.values()):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise BadRequest("response_format must be a json_schema of an object with properties") from None
    return schema


def _obeying(schema: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """`content` with exactly the properties of a flat schema; placeholders for missing ones."""
    properties = schema["properties"].items()
    return {name: content.get(name, PLACEHOLDERS.get(prop.get("type"))) for name, prop in properties}


def _content(request: Request, rng: Random, wrong: bool) -> dict[str, Any] | str:
    """A stage's answer: fields, or text for stage "answer"."""
    rule, passage, given = request.rule, request.sections.get("passage"), request.sections.get("input", "")
    if request.stage == "keywords":
        return {"keywords": list(rule.keywords)}
    if request.stage == "pattern":
        return {"summary": rule.summary}
    if request.stage == "answer":
        found = rule.solve(rng, given, passage)
        if found is None:
            return UNREADABLE[0]
        return rule.wrong(rng, given, found) if wrong else found
    if request.stage == "new_sample":
        sample: Sample = rule.sample(rng, passage)
    else:
        sample = rule.changed(rng, given, 1 if request.stage == "harder" else -1, passage)
    output = rule.wrong(rng, sample.input, sample.output) if wrong else sample.output
    return {"input": sample.input, "output": output}


def _spoiled(rng: Random, content: dict[str, Any] | str) -> str:
    """An unreadable answer: prose, or JSON that is truncated or has other keys."""
    prose = rng.choice(UNREADABLE)
    if isinstance(content, str):
        return prose
    cut, renamed = (
        json.dumps(content)[: len(next(iter(content))) + 4],
        {f"the {name}": content[name] for name in content},
    )
    return rng.choice((prose, cut, json.dumps(renamed)))


def _completion(body: dict[str, Any], content: str | None, refusal: str | None = None) -> dict[str, Any]:
    """The response object of the Chat Completions API."""
    prompt, made = count_tokens(body["messages"]), count_tokens([{"content": content or refusal or ""}])
    usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}
    head = {"id": "chatcmpl-offline", "object": "chat.completion", "created": int(time.time())}
    return {**head, "model": body.get("model", OFFLINE_MODEL), "choices": [choice], "usage": usage}


class _Server(ThreadingTCPServer):
    # Not HTTPServer, which looks up the machine's name; that takes seconds on some networks.
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128  # with the default of 5, many simultaneous connections wait for seconds


class _Handler(BaseHTTPRequestHandler):
    teacher: OfflineTeacher
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        model = {"id": OFFLINE_MODEL, "object": "model", "created": 0, "owned_by": "synth"}
        pages: dict[str, dict] = {"/health": {"status": "ok"}, "/v1/models": {"object": "list", "data": [model]}}
        found = pages.get(self.path)
        self._send(*((200, found) if found else _error(404, f"no such path: {self.path}")))

    def do_POST(self) -> None:
        self._send(*self._answer())

    def _answer(self) -> tuple[int, dict[str, Any]]:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,9}", length) or int(length) > MOST_BYTES:
            self.close_connection = True  # what follows is not a request
            return _error(413, f"a request needs a Content-Length of at most {MOST_BYTES}")
        content = self.rfile.read(int(length))
        if self.path != "/v1/chat/completions":
            return _error(404, f"no such path: {self.path}")
        time.sleep(self.teacher.latency)
        try:
            return 200, self.teacher.complete(json.loads(content), self.headers.get(SAMPLE_HEADER))
        except (ValueError, RecursionError):
            return _error(400, "the request cannot be read as JSON")
        except BadRequest as error:
            return _error(400, str(error))

    def _send(self, status: int, found: dict[str, Any]) -> None:
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        # A client that was killed or gave up is not an error of the server.
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: Any) -> None:
        """Nothing: the one line of output is the URL."""


def _error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "invalid_request_error", "code": None}}


def teacher_from(flags: str) -> OfflineTeacher:
    """An offline teacher by its flags as one string. Raises UserError as OfflineTeacher does."""
    settings = vars(parse_args(split_words("offline-teacher", flags)))
    settings.pop("until_stdin_closes")
    return OfflineTeacher(**settings)


def parse_args(args: Sequence[str] | None = None) -> Namespace:
    """The flags of the command line."""
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--port", type=NATURAL, default=0, help="on loopback; 0: a free one")
    parser.add_argument("--error-rate", type=SHARE, default=0.2, help="share of answers that are wrong, 0..1")
    parser.add_argument("--latency-ms", type=NOT_NEGATIVE, default=0.0, help="of every answer, milliseconds")
    parser.add_argument("--malformed-rate", type=SHARE, default=0.0, help="share of unreadable answers, 0..1")
    parser.add_argument("--refusal-rate", type=SHARE, default=0.0, help="share of refused answers, 0..1")
    parser.add_argument("--seed", type=SEED, default=0, help="of all randomness")
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="exit when stdin is closed, as when the parent process ends"
    )
    return parser.parse_args(args)


def main() -> None:
    """Serve until it is stopped."""
    flags = vars(parse_args())
    bound = flags.pop("until_stdin_closes")
    with OfflineTeacher(**flags) as server:
        print(server.url, flush=True)
        if bound:
            sys.stdin.buffer.read()
        else:
            threading.Event().wait()
