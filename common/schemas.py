"""JSON files that others may have written, cut or edited, read as what they have to be.

    class State(Schema):
        step: Annotated[int, Field(ge=0)]

    state = read_as(State, path, "resume from an earlier checkpoint")

Types are strict (no text for a number, no true for 1) and numbers finite. Keys that a schema does not name are kept. A
dataclass can be a schema, too.
"""

import json
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from common.errors import UserError
from common.files import read_json

T = TypeVar("T")


class Schema(BaseModel):
    """An object in a JSON file; a subclass names the keys that are used."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _finite(self) -> Self:
        """So in values whose types are not named."""
        try:
            json.dumps(self.model_dump(), allow_nan=False)
        except ValueError:
            raise ValueError("a number in it is not finite") from None
        return self


def read_as(kind: type[T], path: str | Path, remedy: str = "restore it or recreate it") -> T:
    """A JSON file as `kind`: a Schema, or a type such as dict[str, Any].

    Raises UserError, with the file, the key and the remedy, if it is missing, malformed, or something else.
    """
    return conforming(kind, read_json(path), path, remedy)


def read_key(kind: type[T], path: str | Path, key: str, remedy: str = "restore it or recreate it") -> T:
    """The value of one key of the object in a JSON file, as `kind`. Raises UserError as `read_as` does."""
    content = read_as(dict[str, Any], path, remedy)
    if key not in content:
        raise UserError(f"{path} lacks {key}; {remedy}")
    return conforming(kind, content[key], f"{path} ({key})", remedy)


def conforming(kind: type[T], content: Any, path: object, remedy: str = "restore it or recreate it") -> T:
    """The content of the JSON file `path` as `kind`. Raises UserError as `read_as` does."""
    try:
        # As JSON, where a tuple is a list and a dataclass an object.
        return TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key, said = ".".join(map(str, first["loc"])), first["msg"].splitlines()[0]
    if first["type"] == "missing":
        raise UserError(f"{path} lacks {key}; {remedy}")
    value = f"{first['input']!r:.60}" if isinstance(first["input"], str | int | float | None) else "something else"
    raise UserError(f"{path} has {f'{value} as {key}' if key else value}: {said[:1].lower()}{said[1:]}; {remedy}")
