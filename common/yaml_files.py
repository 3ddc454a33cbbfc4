"""Reading YAML that may be anyone's: plain data only, of a limited size, and no key twice.

    LARGEST characters, after aliases are replaced by what they stand for; MOST values and keys; DEEPEST levels;
    integers of 64 bits

Only the types of JSON are read: tags are refused, and a date stays the text that it is.

    python -m pytest tests/test_yaml_files.py
"""

from pathlib import Path
from typing import Any, ClassVar

import yaml

from common.errors import UserError

LARGEST = 1_000_000
MOST = 50_000  # read in a third of a second
DEEPEST = 32
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast


class _Refused(yaml.MarkedYAMLError):
    """YAML that is valid, and not taken. at: the event or node to name the line of."""

    def __init__(self, problem: str, at: Any = None):
        super().__init__(problem=problem, problem_mark=at and at.start_mark)


def read_yaml(path: str | Path, what: str = "") -> dict[str, Any]:
    """The mapping in a YAML file. what: how errors call the file.

    Raises UserError, with the line where there is one, if it is missing, malformed, over a limit or not a mapping.
    """
    place = f"{what} {path}".strip()
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            text = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{place} is not UTF-8; save it as UTF-8") from None
    content = parse_yaml(text, place)
    if not isinstance(content, dict):
        raise UserError(f"{place} is not a YAML mapping of names to values; write, for example, `seed: 1`")
    return content


def parse_yaml(text: str, place: str) -> Any:
    """The content of a YAML text. place: how errors call it. Raises UserError if it is malformed or over a limit."""
    try:
        if len(text) > LARGEST:
            raise _Refused(f"over {LARGEST:,} characters")
        _check(text)
        return yaml.load(text, Loader=_DataLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        taken = "cannot be taken" if isinstance(error, _Refused) else "is not valid YAML"
        raise UserError(f"{place}{line} {taken} ({' '.join(str(error.problem).split())[:160]}); fix it") from None
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{place} is not valid YAML ({why}); fix it") from None


def _check(text: str) -> None:
    """Raise _Refused for what is too deep, or too large with its aliases, before anything is made of it."""
    sizes: dict[str | None, int] = {}  # of what an anchor names: characters, and one more for every node
    open_nodes: list[tuple[str | None, int]] = []  # anchor and size so far
    event: Any
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if number > MOST:
            raise _Refused(f"more than {MOST:,} values and keys", event)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _Refused(f"it has the tag {event.tag:.60}", event)
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 0))
            if len(open_nodes) > DEEPEST:
                raise _Refused(f"nested more than {DEEPEST} levels deep", event)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, len(event.value)
            event.value.encode()  # a lone surrogate, which no file can hold, raises a ValueError
            if "\0" in event.value:
                raise _Refused("text with a null character", event)
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(event.anchor, 0)
            if any(event.anchor == anchor for anchor, _ in open_nodes):
                raise _Refused(f"alias *{event.anchor} contains itself", event)
        else:
            continue
        if anchor:
            sizes[anchor] = size
        if open_nodes:
            around, before = open_nodes[-1]
            open_nodes[-1] = (around, size := before + size + 1)
        if size > LARGEST:
            why = f"over {LARGEST:,} characters once aliases are replaced"
            raise _Refused(why, event)


class _DataLoader(_Loader):
    """Builds what JSON could hold as well, and refuses a key that is given twice."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
        for first, pairs in _Loader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises _Refused for a duplicate key; one that a merge (<<) brings is overridden, as YAML has it."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("a key is a list or mapping", key)
            word = self.construct_object(key) if not key.tag.endswith(":merge") else "<<"
            if word in seen:
                raise _Refused(f"key {word!r:.60} is there twice", key)
            seen.add(word)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Raises _Refused for an integer that 64 bits cannot hold."""
        if len(node.value) > 70 or not -(2**63) <= (value := super().construct_yaml_int(node)) < 2**63:
            raise _Refused(f"integer {node.value:.20}… of more than 64 bits", node)
        return value


_DataLoader.add_constructor("tag:yaml.org,2002:int", _DataLoader.construct_yaml_int)
