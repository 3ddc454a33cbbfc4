"""Questions to a teacher and their replies, and how a chat completion is read.

Refusals, truncated, empty and malformed answers are told apart here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel

from synth.chat_api import count_tokens
from synth.teacher import structured
from synth.teacher.cache import Stored
from synth.teacher.limits import Cost
from synth.teacher.pace import Fault

MOST_TOKENS = 10**9  # of one call


class Reply(NamedTuple):
    """One answer. parsed: set if a schema was given and status is "ok".

    status: "ok"; "refusal", "truncated", "empty"; "malformed": the schema was not followed, even after a correction
    turn; "failed": no response came (not stored, so asked again after a restart). reason: why, if not "ok".
    cached: no call was made for it.
    """

    text: str
    parsed: Any
    status: str
    usage: Cost
    cached: bool
    reason: str = ""


@dataclass(frozen=True)
class Ask:
    """One question. sample: index among otherwise equal calls; stage: the ledger's row.

    temperature and max_tokens are always sent, because servers' defaults differ; top_p only if given.
    """

    messages: list[dict]
    schema: type[BaseModel] | None = None
    temperature: float = 1.0
    max_tokens: int = 1024
    sample: int = 0
    stage: str = ""
    top_p: float | None = None


def read_completion(response: dict, ask: Ask, safe: Callable[[str], str]) -> Stored:
    """A response's content, as it is stored. safe: applied to every text. Raises Fault if it is no completion.

    If the endpoint reports no usage, tokens are estimated from the texts.
    """
    try:
        if not response["choices"]:
            raise Fault("again", f"empty choices {response.get('error') or ''}".strip())
        choice = response["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refused = message.get("content") or "", message.get("refusal")
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content)
        usage = response.get("usage") or {}
        counted = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        text = safe(content).encode(errors="replace").decode()  # a lone surrogate could not be stored
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise Fault("again", f"the response is no completion ({type(error).__name__}: {error})") from None
    guessed = (count_tokens(ask.messages), count_tokens([{"content": text}]))
    tokens = [_number(c, guess) for c, guess in zip(counted, guessed, strict=True)]
    if refused or finish == "content_filter":
        return Stored(text, "refusal", safe(str(refused or "content filter")), *tokens)
    return Stored(text, *_status(text, finish, ask), *tokens)


def _number(given: Any, guess: int) -> int:
    """A number of tokens as an endpoint reports it, or the guess where that is none: limits are to bind by it."""
    number = isinstance(given, int | float) and not isinstance(given, bool)
    return int(given) if number and 0 <= given <= MOST_TOKENS else guess


def _status(text: str, finish: str | None, ask: Ask) -> tuple[str, str]:
    """The status of an answer that was not refused outright, and the reason if it is not "ok"."""
    if finish == "length":
        return "truncated", f"cut at {ask.max_tokens} tokens"
    if not text.strip():
        return "empty", "no text in the answer"
    parsed, reason = structured.read_json_answer(text, ask.schema) if ask.schema else (None, "")
    if parsed is None and structured.is_refusal(text):
        return "refusal", "an apology instead of an answer"
    return ("malformed", reason) if reason else ("ok", "")
