"""The argument parser of every script, with optional YAML files of defaults.

Hyphen and underscore are the same flag. A YAML file (`-c`) gives defaults that flags override; unknown flags and
unknown YAML keys are errors.
"""

import argparse
import itertools
import re
import shlex
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError, one_line
from common.ranges import Numbers
from common.yaml_files import read_yaml


class Collect(argparse.Action):
    """Collects all values of a flag that takes several and may be repeated, instead of its default."""

    def __call__(self, parser, namespace, values, option_string=None):
        so_far = getattr(namespace, self.dest)
        setattr(namespace, self.dest, list(values) if so_far is self.default else [*so_far, *values])


class Repeated(argparse.Action):
    """Joins the values of a flag that may be given several times by spaces, instead of its default."""

    def __call__(self, parser, namespace, values, option_string=None):
        so_far = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if so_far is self.default or not so_far else f"{so_far} {values}")


def boolean(text: str) -> bool:
    """Read the value of a flag such as `--adap_kl_ctrl True`."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults only where they are informative: not for switches, nor for flags that default to nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == ""  # 0 is something
        return action.help if nothing else super()._get_help_string(action)


class _HelpAll(argparse.Action):
    """Prints every flag, and exits."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.print_all()
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argument parser for which `--lora-layers` and `--lora_layers` are one flag, with `-c FILE` for YAML."""

    def __init__(self, description: str | None, yaml_file: bool = True):
        super().__init__(
            prog=_program(),
            description=(description or "").strip().split("\n\n")[0],
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.yaml_file = yaml_file
        self.main_flags: tuple[str, ...] = ()
        if yaml_file:
            self.add_argument("-c", "--config", metavar="FILE", help="YAML file of defaults for these flags")

    def show_first(self, *flags: str) -> None:
        """Let --help show these flags only, in this order; --help-all then shows all. Call it once."""
        self.main_flags = flags
        self.add_argument("--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help="show all flags")

    def format_help(self) -> str:
        """What --help prints."""
        if not self.main_flags:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_text(f"usage: {self.prog} [flags]")
        formatter.add_text(self.description)
        formatter.start_section("flags that are set most")
        formatter.add_arguments([self._option_string_actions[flag] for flag in self.main_flags])
        formatter.end_section()
        formatter.add_text(f"{self.prog} --help-all shows all {len(self._actions)} flags")
        return formatter.format_help()

    def print_all(self) -> None:
        """What --help-all prints."""
        self._print_message(super().format_help(), sys.stdout)

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage, with the flag that an unknown one may stand for; exit code 2."""
        found = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = get_close_matches(found[1], self._option_string_actions, n=1, cutoff=0.8) if found else []
        meant = f"did you mean {near[0]}? " if near else ""
        self.exit(2, f"error: {one_line(message)}; {meant}see {self.prog} --help{'-all' if self.main_flags else ''}\n")

    def parse_args(self, args=None, namespace=None):
        """Parse `args` (default: the command line), with flags over the YAML file over defaults."""
        words = [_hyphenate(word) for word in (sys.argv[1:] if args is None else args)]
        path = _config_file(words) if self.yaml_file else None
        if path is not None:
            self._set_defaults_from(path)
        return super().parse_args(words, namespace)

    def _get_value(self, action, arg_string):
        """Refuse a number out of its flag's range as every other mistake of a user is refused."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if isinstance(action.type, Numbers):
                raise UserError(f"{action.option_strings[0]} is {arg_string}; it has to be {action.type}") from None
            raise

    def check_values(self, values: Mapping[str, Any], place: object) -> None:
        """Raise UserError, which begins with `place`, where a value by its flag's name is none that the flag gives."""
        actions = {action.dest: action for action in self._actions}
        for name, value in values.items():
            action = actions.get(name)
            if action is None or value == action.default:
                continue
            several = action.nargs == "+"
            for one in value if several and isinstance(value, list) else [value]:
                if several != isinstance(value, list) or not _gives(action, one):
                    what = f"it has to be {action.type}" if isinstance(action.type, Numbers) else "its flag never does"
                    raise UserError(f"{place} sets {name} to {one!r:.60}; {what}")

    def _set_defaults_from(self, path: str) -> None:
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            # --no-mask-prompt spells false; it is not a key.
            words = [word for word in action.option_strings if not word.startswith("--no-") or action.nargs != 0]
            if action.dest not in ("help", "help_all", "config"):
                actions |= dict.fromkeys(map(_key, [action.dest, *words]), action)
        content = read_yaml(path)
        # mlx-lm's files nest the LoRA settings; here each is a flag of its own.
        nested = content.pop("lora_parameters", None) or {}
        if not isinstance(nested, dict):
            raise UserError(f"{path} sets lora_parameters to {nested!r:.60}; write rank, scale, dropout, keys below it")
        seen: dict[str, str] = {}
        for key, value in [*content.items(), *((f"lora_{key}", value) for key, value in nested.items())]:
            if _key(str(key)) not in actions:
                known = sorted({action.dest for action in actions.values()})
                raise UserError(f"{path} has the unknown key {key!r:.60}; known are {', '.join(known)}")
            action = actions[_key(str(key))]
            if action.dest in seen:
                raise UserError(f"{path} sets {seen[action.dest]} and {key}, which are the same; keep one of them")
            seen[action.dest] = str(key)
            action.default = _from_yaml(action, value, f"{path} sets {key} to {value!r:.60}")
            action.required = False


def _program() -> str:
    """How the running script or module is started: python sft.py, python -m synth.run."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return f"python -m {spec.name.removesuffix('.__main__')}"
    path = Path(sys.argv[0])
    return f"python {path.name if path.is_absolute() else path}"


def _key(word: str) -> str:
    """A flag as a key in YAML: --lora-layers, lora-layers → lora_layers."""
    return word.lstrip("-").replace("-", "_")


def _from_yaml(action: argparse.Action, value: Any, fact: str) -> Any:
    """`value` as the flag of `action` would read it from the command line. Raises UserError starting with `fact`."""
    if value is None and action.default is None:
        return None
    if isinstance(value, list):
        if isinstance(action, Repeated):
            return " ".join(_from_word(action, item, fact) for item in value)
        if action.nargs != "+":
            raise UserError(f"{fact}, but it takes one value; see --help")
        return [_from_word(action, item, fact) for item in value]
    return [_from_word(action, value, fact)] if action.nargs == "+" else _from_word(action, value, fact)


def _from_word(action: argparse.Action, value: Any, fact: str) -> Any:
    if value is None or isinstance(value, list | dict):
        raise UserError(f"{fact}, which it cannot take; see --help")
    # A flag without a value is true or false; others are parsed from text, since YAML reads 1e-3 as a string.
    read: Any = boolean if action.nargs == 0 else action.type or str
    try:
        word = read(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        why = f"; it has to be {read}" if isinstance(read, Numbers) else ", which it cannot take; see --help"
        raise UserError(f"{fact}{why}") from None
    if action.choices and word not in action.choices:
        raise UserError(f"{fact}; use one of {', '.join(map(str, action.choices))}")
    return word


def _gives(action: argparse.Action, value: Any) -> bool:
    """Whether `value` is of the kind that the flag of `action` gives."""
    if isinstance(action.type, Numbers):
        return value in action.type
    if action.nargs == 0 or action.type is boolean:
        return isinstance(value, bool)
    return isinstance(value, str) and "\0" not in value and (not action.choices or value in action.choices)


def _hyphenate(word: str) -> str:
    """`--lora_layers=4` → `--lora-layers=4`; values and short flags are left alone."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _config_file(words: list[str]) -> str | None:
    """The file named by the last -c, in any form that argparse accepts."""
    path = None
    for word, following in itertools.zip_longest(words, words[1:]):
        if word in ("-c", "--config"):
            path = following
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif word.startswith("-c"):
            path = word.removeprefix("-c").removeprefix("=")
    return path


def split_words(flag: str, text: str) -> list[str]:
    """The words of a flag that holds further flags as one string. Raises UserError for a quote without its end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{flag} {text!r:.200} cannot be split into words ({error}); fix it") from None


def positive(name: str, value: float, zero: bool = False) -> None:
    """Raise UserError unless `value` is above 0 (or 0 where `zero` is allowed)."""
    if not (value > 0 or (zero and value == 0)):
        raise UserError(f"--{name} is {value}; it has to be {'at least 0' if zero else 'above 0'}")
