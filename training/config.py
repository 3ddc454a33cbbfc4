"""Flags: one parser for every script, YAML behind it, and the flag groups that several scripts share.

A flag's default stands in one place, here or in its script. Hyphen and underscore are the same flag. A YAML
file (`-c`) gives defaults that flags override; unknown flags and unknown YAML keys are errors.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from data.errors import UserError
from data.records import FEATURE_FLAGS
from training.optimizer_groups import OPTIMIZERS

import yaml

# The optimizer and its learning rate that train each kind of adapter; chosen on the embedded model (docs/sft.md).
SFT_OPTIMIZERS = {
    "lora": ("adam", 5e-4),
    "dora": ("adam", 5e-4),
    "full": ("adam", 3e-4),
    "soft_prompt": ("adam", 3e-2),
    "none": ("adam", 1e-3),
}
PPO_OPTIMIZERS = {"lora": ("adam", 5e-4), "dora": ("adam", 5e-4), "full": ("adam", 3e-4), "soft_prompt": ("muon", 0.4)}


class Collect(argparse.Action):
    """For a flag of one or more values that may also be given more than once: all of them, in place of its default."""

    def __call__(self, parser, namespace, values, option_string=None):
        so_far = getattr(namespace, self.dest)
        setattr(namespace, self.dest, list(values) if so_far is self.default else [*so_far, *values])


def boolean(text: str) -> bool:
    """Read the value of a flag such as `--adap_kl_ctrl True`."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where it says something: not for switches, nor where the flag is simply left out."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser for which `--lora-layers` and `--lora_layers` are one flag, with `-c FILE` for YAML."""

    def __init__(self, description: str | None, yaml_file: bool = True):
        super().__init__(
            description=(description or "").strip().split("\n\n")[0],
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.yaml_file = yaml_file
        if yaml_file:
            self.add_argument("-c", "--config", metavar="FILE", help="YAML file of defaults for these flags")

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage; exit code 2."""
        self.exit(2, f"error: {message}; see {Path(self.prog).name} --help\n")

    def parse_args(self, args=None, namespace=None):
        """Parse `args` (default: the command line), with flags over the YAML file over defaults."""
        words = [_hyphenate(word) for word in (sys.argv[1:] if args is None else args)]
        path = _config_file(words) if self.yaml_file else None
        if path is not None:
            self._set_defaults_from(path)
        return super().parse_args(words, namespace)

    def _set_defaults_from(self, path: str) -> None:
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            # --no-mask-prompt is a spelling of false, not a key of its own.
            words = [word for word in action.option_strings if not word.startswith("--no-") or action.nargs != 0]
            if action.dest not in ("help", "config"):
                actions |= dict.fromkeys(map(_key, [action.dest, *words]), action)
        content = read_yaml(path)
        # mlx-lm's files nest the LoRA settings; here each is a flag of its own.
        nested = content.pop("lora_parameters", None) or {}
        if not isinstance(nested, dict):
            raise UserError(f"{path} sets lora_parameters to {nested!r}; write rank, scale, dropout, keys below it")
        seen: dict[str, str] = {}
        for key, value in [*content.items(), *((f"lora_{key}", value) for key, value in nested.items())]:
            if _key(str(key)) not in actions:
                known = sorted({action.dest for action in actions.values()})
                raise UserError(f"{path} has the unknown key {key!r}; known are {', '.join(known)}")
            action = actions[_key(str(key))]
            if action.dest in seen:
                raise UserError(f"{path} sets {seen[action.dest]} and {key}, which are the same; keep one of them")
            seen[action.dest] = str(key)
            action.default = _from_yaml(action, value, f"{path} sets {key} to {value!r}")
            action.required = False


def _key(word: str) -> str:
    """A flag as a key in YAML: --lora-layers, lora-layers → lora_layers."""
    return word.lstrip("-").replace("-", "_")


def _from_yaml(action: argparse.Action, value: Any, fact: str) -> Any:
    """`value` as the flag of `action` would read it from the command line. Raises UserError that begins with `fact`."""
    if value is None and action.default is None:
        return None
    if isinstance(value, list):
        if action.nargs != "+":
            raise UserError(f"{fact}, but it takes one value; see --help")
        return [_from_word(action, item, fact) for item in value]
    return [_from_word(action, value, fact)] if action.nargs == "+" else _from_word(action, value, fact)


def _from_word(action: argparse.Action, value: Any, fact: str) -> Any:
    if value is None or isinstance(value, list | dict):
        raise UserError(f"{fact}, which it cannot take; see --help")
    # A flag without a value is true or false; every other is read from text, as YAML takes 1e-3 for text.
    read: Any = boolean if action.nargs == 0 else action.type or str
    try:
        word = read(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(f"{fact}, which it cannot take; see --help") from None
    if action.choices and word not in action.choices:
        raise UserError(f"{fact}; use one of {', '.join(map(str, action.choices))}")
    return word


def _hyphenate(word: str) -> str:
    """`--lora_layers=4` → `--lora-layers=4`; values and short flags are left alone."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _config_file(words: list[str]) -> str | None:
    """The file that the last -c names, in any of the forms that argparse takes."""
    path = None
    for word, following in itertools.zip_longest(words, words[1:]):
        if word in ("-c", "--config"):
            path = following
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif word.startswith("-c"):
            path = word.removeprefix("-c").removeprefix("=")
    return path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises UserError where it is missing, malformed, or no mapping."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML ({str(error).splitlines()[0]}); mend it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a YAML mapping of flag names to values; write `iters: 600`, say")
    return content


def positive(name: str, value: float, zero: bool = False) -> None:
    """Raise UserError unless `value` is above 0 (or 0 where `zero` is allowed)."""
    if not (value > 0 or (zero and value == 0)):
        raise UserError(f"--{name} is {value}; it has to be {'at least 0' if zero else 'above 0'}")


def default_output_dir(script: str) -> str:
    """A run folder name that is free: runs/SCRIPT-YYYYMMDD-HHMMSS, and -2, -3 where a second has several."""
    name = f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbered = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
    return next(free for free in numbered if not Path(free).exists())


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where rows are, what their keys are called, and which tokens are trained. Also of data.check."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default="data", help="folder of .jsonl files or of save_to_disk, or OWNER/NAME on the hub"
    )
    group.add_argument("--data-base", default="increasing_mult_2_", help="name of the .jsonl files before train.jsonl")
    group.add_argument("--mask-prompt", action=argparse.BooleanOptionalAction, default=True,
                       help="train completions and the assistant's turns only")  # fmt: skip
    add_feature_flags(group, (kind for kind in FEATURE_FLAGS if kind != "answer"))


def add_feature_flags(group: argparse._ActionsContainer, kinds: Iterable[str]) -> None:
    """What the data calls its keys, for each of `kinds` (of FEATURE_FLAGS)."""
    for kind in kinds:
        group.add_argument(f"--{kind}-feature", metavar="KEY", help=f'what the rows call "{FEATURE_FLAGS[kind]}"')


def add_adapter_flags(parser: argparse.ArgumentParser, dropout: float) -> None:
    """Which weights are trained, and how an adapter is made. dropout: PPO wants 0, so that the ratio starts at 1."""
    group = parser.add_argument_group("adapter")
    group.add_argument("--prompt-tuning", action="store_true", help="train a soft prompt instead of LoRA")
    group.add_argument("--num-prompt-tokens", type=int, default=32, help="length of the soft prompt, tokens")
    group.add_argument(
        "--fine-tune-type", choices=("lora", "dora", "full"), default="lora", help="which weights to train"
    )
    group.add_argument("--lora-layers", "--num-layers", type=int, default=16, help="last layers to adapt; -1: all")
    group.add_argument("--lora-rank", type=int, default=8, help="LoRA rank")
    group.add_argument("--lora-scale", type=float, default=10.0, help="multiplier of the LoRA update")
    group.add_argument("--lora-dropout", type=float, default=dropout, help="dropout before the LoRA, probability")
    group.add_argument(
        "--lora-keys",
        nargs="+",
        default=None,
        help="module names within a layer, such as self_attn.q_proj (default: all)",
    )
    group.add_argument("--grad-checkpoint", action="store_true", help="work layers out twice to hold less in memory")


def adapter_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_adapter_flags` as the fields of `models.adapters.AdapterConfig`."""
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora-dropout is {args.lora_dropout}; it has to be at least 0 and below 1")
    if args.num_prompt_tokens < 1:
        raise UserError(f"--num-prompt-tokens is {args.num_prompt_tokens}; it has to be at least 1")
    lora = {"rank": args.lora_rank, "scale": args.lora_scale, "dropout": args.lora_dropout}
    if args.lora_keys:
        lora["keys"] = list(args.lora_keys)
    return {
        "fine_tune_type": "soft_prompt" if args.prompt_tuning else args.fine_tune_type,
        "num_layers": args.lora_layers,
        "lora_parameters": lora,
        "num_prompt_tokens": args.num_prompt_tokens,
        "model": args.model,
    }


def add_optimizer_flags(
    parser: argparse.ArgumentParser, defaults: Mapping[str, tuple[str, float]], schedule: str
) -> argparse._ArgumentGroup:
    """Optimizer and learning rate (by the kind of adapter, where the flags are left out), schedule, and clipping.

    Returns the group, for more of a script's own.
    """
    group = parser.add_argument_group("optimizer")
    kinds = {kind: default for kind, default in defaults.items() if kind != "none"}
    others = [f"{name} for {kind}" for kind, (name, _) in kinds.items() if name != "adam"]
    names = ", ".join(["adam", *others])
    group.add_argument("--optimizer", choices=OPTIMIZERS, help=f"what turns gradients into steps (default: {names})")
    rates = ", ".join(f"{kind} {rate:g}" for kind, (_, rate) in kinds.items())
    group.add_argument("--learning-rate", type=float, help=f"step size (default: {rates})")
    group.add_argument(
        "--lr-schedule", choices=("constant", "linear", "cosine"), default=schedule, help="the last two end at 0"
    )
    group.add_argument("--warmup-steps", type=int, default=0, help="steps over which the rate rises from 0")
    group.add_argument("--weight-decay", type=float, default=0.0, help="decoupled decay of the weights; 0: none")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="clip the gradient to this norm; 0: don't")
    return group


def optimizer_and_rate(args: argparse.Namespace, default: tuple[str, float]) -> tuple[str, float]:
    """The optimizer and its rate by the flags, or by the default for what is trained.

    Raises UserError for an optimizer without a rate: a step of the one is not what a step of the other is.
    """
    name, rate = default
    if args.learning_rate is None and args.optimizer not in (None, name):
        raise UserError(f"--optimizer {args.optimizer} has no default rate here; give --learning-rate")
    return args.optimizer or name, args.learning_rate or rate


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Where a run lies, how it is resumed, and who is told of it."""
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", default=None, help="run folder (default: runs/SCRIPT-TIME)")
    group.add_argument("--resume", metavar="RUN_FOLDER", help="go on with a stopped run, by its own flags")
    group.add_argument("--keep-checkpoints", type=int, default=2, help="newest checkpoints to keep; 0: all")
    group.add_argument(
        "--log-with", "--report-to", choices=("none", "wandb", "tensorboard"), default="none", help="tracker"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of everything random")


def resumed(args: argparse.Namespace, config: dict[str, Any]) -> argparse.Namespace:
    """The flags of the run that `--resume` names, in place of those of this call."""
    unknown = sorted(config.keys() - vars(args).keys())
    if unknown:
        raise UserError(f"{args.resume} was written by another version or script (flags {', '.join(unknown)})")
    return argparse.Namespace(**{**vars(args), **config, "resume": args.resume, "output_dir": args.resume})


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's own randomness, so that a resumed run draws what it would have drawn."""
    return seed * 1_000_003 + step


def describe(sizes: tuple[int, int], kind: str, optimizer: tuple[str, float], device: object) -> str:
    """One line on what is trained, and by which optimizer. sizes: weights that are trained, and all."""
    (trainable, total), (name, rate) = sizes, optimizer
    return f"training {trainable:,} of {total:,} weights ({kind}) by {name}, learning rate {rate:g}, on {device}"
