"""Answers as JSON: the schema sent to an endpoint or written into the prompt, and the answer read back.

Nothing in an answer is executed.
"""

import functools
import json
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from synth.teacher.lenient_json import objects_in

PROBE_MESSAGES = [{"role": "user", "content": "Write one short sentence about the sea."}]
LONGEST_REFUSAL = 300  # characters
REFUSAL = re.compile(
    r"\W*(?:(?:i['’]?m|i am)\s+(?:\w+\s+)?sorry|sorry|apologies|i apologi[sz]e|unfortunately|as an ai|i)\b"
    r".{0,100}?\b(?:can['’]?t|cannot|can not|unable to|not able to|won['’]?t|(?:must|have to) decline)\b"
    r".{0,20}?\b(?:help|assist|comply|fulfil+|provide|do that|do this|answer|engage|create|generate|write|"
    r"discuss|support|continue|share|request)\b",
    re.IGNORECASE | re.DOTALL,
)
THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


class Probe(BaseModel):
    """What only an endpoint that holds itself to a schema would answer to PROBE_MESSAGES."""

    waves: int


def is_refusal(text: str) -> bool:
    """Whether a text is only a short apology for not answering."""
    return len(text) <= LONGEST_REFUSAL and REFUSAL.match(text) is not None


@functools.cache
def schema_of(schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a pydantic class; cached, because making it takes as long as sending it."""
    return schema.model_json_schema()


@functools.cache
def response_format(schema: type[BaseModel]) -> dict[str, Any]:
    """The `response_format` of the Chat Completions API for a pydantic class, in its strict form."""
    strict = _strict(schema_of(schema))
    return {"type": "json_schema", "json_schema": {"name": schema.__name__, "strict": True, "schema": strict}}


def _strict(node: Any) -> Any:
    """Every property required, no others allowed, no defaults, as OpenAI's strict mode demands."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    strict = {name: _strict(value) for name, value in node.items()}
    if node.get("type") == "object" and isinstance(node.get("properties"), dict):
        # A property may itself be called "default": the key is removed only from the property's own node.
        for prop in strict["properties"].values():
            if isinstance(prop, dict):
                prop.pop("default", None)
        strict |= {"required": list(node["properties"]), "additionalProperties": False}
    return strict


def with_schema(messages: list[dict], schema: type[BaseModel]) -> list[dict]:
    """The messages with the schema appended to the last one, for endpoints that accept no schema."""
    text = json.dumps(schema_of(schema), ensure_ascii=False)
    demand = f"Answer with one JSON object and nothing else. It must obey this JSON schema:\n{text}"
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{demand}"}]


def correction(text: str, reason: str) -> list[dict]:
    """The turn that returns a malformed answer with what is wrong with it."""
    demand = f"That could not be read: {reason}. Give the same answer again as one valid JSON object and nothing else."
    return [{"role": "assistant", "content": text}, {"role": "user", "content": demand}]


def read_json_answer(text: str, schema: type[BaseModel]) -> tuple[BaseModel | None, str]:
    """The answer as an object of `schema`, or None and the reason in one line.

    Tried in turn: the text itself; without leading thoughts and a code fence; the objects in it, read leniently.
    """
    inner = _unfenced(THOUGHT.sub("", text).strip())
    for candidate in (text, inner):
        try:
            return schema.model_validate_json(candidate), ""
        except ValidationError:
            continue
    reason = "no JSON in the answer"
    try:
        for found in objects_in(inner):
            # A lone surrogate, which no file could hold, becomes a question mark.
            whole = json.dumps(found, ensure_ascii=False).encode(errors="replace")
            try:
                return schema.model_validate_json(whole), ""
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(map(str, first["loc"])) or "the answer"
                reason = f"{where}: {first['msg']}"
    except ValueError as error:
        reason = f"no readable JSON ({error})"
    return None, " ".join(reason.split())


def _unfenced(text: str) -> str:
    """The text between the first code fence and the last, or the whole text if it starts like an object."""
    start = re.search(r"```[\w-]*\s*", text)
    if not start or text.startswith("{"):
        return text
    end = text.rfind("```")
    return text[start.end() : end] if end >= start.end() else text[start.end() :]
