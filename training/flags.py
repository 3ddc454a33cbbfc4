"""The flag groups that the training scripts share, and how a run is resumed."""

import argparse
import itertools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_json
from common.parser import Parser
from common.ranges import COUNT, COUNT_OR_ALL, FINITE, NATURAL, NOT_NEGATIVE, POSITIVE, SEED, SHARE_BELOW_1
from common.schemas import read_as
from models.adapter_config import WEIGHT_TYPES
from training.metrics import resumed_config
from training.optimizer_groups import LARGE, OPTIMIZERS, depends_on_size
from training.schedules import SCHEDULES
from training.settings import Settings

# What a person calls them.
KINDS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "full": "full fine-tuning",
    "soft_prompt": "a soft prompt",
    "none": "the value head alone",
}


# What a resumed run takes anew, besides its length: where things go, what is reported, and how memory is saved. Any
# other flag would change what is trained, so another value than the run's own is refused.
TAKEN_ANEW = (
    *("save_file", "fused_model", "save_every", "keep_checkpoints", "log_with", "verbose"),
    *("steps_per_report", "steps_per_eval", "steps_per_samples", "logits_memory", "grad_checkpoint", "device"),
)


def default_output_dir(script: str) -> str:
    """A run folder name that is free: runs/SCRIPT-YYYYMMDD-HHMMSS, and -2, -3 where a second has several."""
    name = f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbered = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
    return next(free for free in numbered if not Path(free).exists())


def add_adapter_flags(parser: argparse.ArgumentParser, dropout: float) -> None:
    """Which weights are trained, and how an adapter is made. dropout: PPO needs 0, so that the ratio starts at 1."""
    group = parser.add_argument_group("adapter")
    group.add_argument("--prompt-tuning", action="store_true", help="train a soft prompt instead of LoRA")
    group.add_argument("--num-prompt-tokens", type=COUNT, default=32, help="length of the soft prompt, tokens")
    group.add_argument("--fine-tune-type", choices=WEIGHT_TYPES, default="lora", help="which weights to train")
    group.add_argument(
        "--lora-layers", "--num-layers", type=COUNT_OR_ALL, default=16, help="last layers to adapt; -1: all"
    )
    group.add_argument("--lora-rank", type=COUNT, default=8, help="LoRA rank")
    group.add_argument("--lora-scale", type=FINITE, default=10.0, help="multiplier of the LoRA update")
    group.add_argument(
        "--lora-dropout", type=SHARE_BELOW_1, default=dropout, help="dropout before the LoRA, probability"
    )
    group.add_argument(
        "--lora-keys",
        nargs="+",
        default=None,
        help="module names within a layer, such as self_attn.q_proj (default: all)",
    )
    group.add_argument("--grad-checkpoint", action="store_true", help="recompute activations to save memory")


def adapter_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_adapter_flags` as the fields of `models.adapters.AdapterConfig`."""
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
    parser: argparse.ArgumentParser, defaults: Mapping[str, tuple[str, float]], large: Mapping[str, tuple[str, float]]
) -> argparse._ArgumentGroup:
    """The fields of `training.settings.Settings`, but for the seed; defaults, large: by the kind of adapter.

    Returns the group, for more of a script's own.
    """
    group = parser.add_argument_group("optimizer")
    kinds = {kind: default for kind, default in defaults.items() if kind != "none"}
    others = [f"{name} for {kind}" for kind, (name, _) in kinds.items() if name != "adam"]
    names = ", ".join(["adam", *others])
    group.add_argument("--optimizer", choices=OPTIMIZERS, help=f"optimizer (default: {names})")
    rates = ", ".join(f"{kind} {rate:g}" for kind, (_, rate) in kinds.items())
    others = [f"{kind} {large[kind][1]:g}" for kind in kinds if large[kind] != kinds[kind]]
    rates += f"; of a model of more than {LARGE // 10**6} million weights: {', '.join(others)}"
    group.add_argument("--learning-rate", type=POSITIVE, help=f"step size (default: {rates})")
    group.add_argument(
        "--lr-schedule", choices=SCHEDULES, help="linear and cosine decay to 0 over the run, wsd over its last fifth"
    )
    group.add_argument("--warmup-steps", type=NATURAL, help="updates over which the rate rises from 0")
    group.add_argument("--weight-decay", type=NOT_NEGATIVE, help="decoupled weight decay; 0: none")
    group.add_argument("--max-grad-norm", type=NOT_NEGATIVE, help="clip the gradient to this norm; 0: no clipping")
    return group


def add_logits_memory(parser: argparse._ActionsContainer, default: int | None = None) -> None:
    """How much of the logits is computed at a time. default: where no settings have one."""
    parser.add_argument(
        "--logits-memory", type=COUNT, default=default, help="MB for logits, which are computed a few tokens at a time"
    )


def set_defaults(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """Give the flags that are fields of `settings` their defaults. Raises KeyError for a field without a flag."""
    actions = {action.dest: action for action in parser._actions}
    for name, default in settings.defaults().items():
        actions[name].default = default


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Where a run's files go, how it is resumed, and who is told of it."""
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", default=None, help="run folder (default: runs/SCRIPT-TIME)")
    group.add_argument(
        "--resume", metavar="RUN_FOLDER", help="continue a stopped run with its own flags; others are refused or named"
    )
    group.add_argument("--keep-checkpoints", type=NATURAL, default=2, help="newest checkpoints to keep; 0: all")
    group.add_argument(
        "--log-with", "--report-to", choices=("none", "wandb", "tensorboard"), default="none", help="tracker"
    )
    group.add_argument("--verbose", action="store_true", help="print all figures of a report, not only the main ones")
    group.add_argument("--seed", type=SEED, help="seed of everything random")


def parse_or_resume(parser: Parser, length: str) -> argparse.Namespace:
    """The flags of this call, or with --resume those of the run it names.

    length: the attribute of how many steps a run has. Given together with --resume, it extends the run; flags of
    TAKEN_ANEW take the place of the run's own, which is said. Raises UserError for any other that differs.
    """
    args = parser.parse_args()
    if not args.resume:
        return args
    run, changed = resumed_with(parser, args, (length, *TAKEN_ANEW))
    steps = changed.pop(length, None)
    if steps is not None:
        extend(run, length, steps)
    say_changes(parser, run, changed)
    for name, value in changed.items():
        _change(run, name, value)
    return run


def resumed_with(
    parser: Parser, args: argparse.Namespace, free: Iterable[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags of the run that --resume names, and those of `free` that this command line gives another value.

    Raises UserError for any other flag whose value differs from the run's.
    """
    run = resumed(parser, args, resumed_config(args.resume))
    changed = {name: value for name, value in given_flags(parser).items() if value != getattr(run, name)}
    refuse_others(parser, run, changed, free)
    return run, changed


def say_changes(parser: argparse.ArgumentParser, run: argparse.Namespace, changed: Mapping[str, Any]) -> None:
    """Print a line for every flag that a resumed run takes anew."""
    for name, value in changed.items():
        print(f"{flag_of(parser, name)} is now {value}; the run had {getattr(run, name)}", flush=True)


def given_flags(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The flags on the command line, but for --resume: those alone, so that 200 steps asked for differ from 200 by
    default.
    """
    unset: tuple = ()  # which no flag reads to, and to which a flag that collects values can add
    names = [action.dest for action in parser._actions]
    found = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(names, unset))))
    return {name: value for name, value in found.items() if value != unset and name not in ("help", "resume")}


def refuse_others(
    parser: argparse.ArgumentParser, run: argparse.Namespace, changed: Mapping[str, Any], free: Iterable[str]
) -> None:
    """Raise UserError if a resumed run was given other flags than its own. free: those that it may be given anew."""
    free = list(free)
    others = [name for name in changed if name not in free]
    if others:
        flags = ", ".join(f"{flag_of(parser, name)} {changed[name]} (the run: {getattr(run, name)})" for name in others)
        allowed = ", ".join(flag_of(parser, name) for name in free if hasattr(run, name))
        remedy = f"leave them out, or change only {allowed}" if allowed else "leave them out, or start a new run"
        raise UserError(f"{run.resume} was begun with other flags: {flags}; {remedy}")


def flag_of(parser: argparse.ArgumentParser, name: str) -> str:
    """The flag of an attribute, as help shows it."""
    return next(action.option_strings[0] for action in parser._actions if action.dest == name and action.option_strings)


def extend(run: argparse.Namespace, length: str, steps: int) -> None:
    """Give a resumed run more steps, in `run` and in its config.json. Raises UserError for fewer than it had."""
    planned, flag = getattr(run, length), f"--{length.replace('_', '-')}"
    if steps < planned:
        raise UserError(
            f"{flag} {steps} is less than the {planned} of {run.resume}; a resumed run can only be extended"
        )
    if steps > planned:
        _change(run, length, steps)
        print(f"{run.resume} is extended from {planned} to {steps} steps; its learning rate schedule now ends there")


def _change(run: argparse.Namespace, name: str, value: Any) -> None:
    """Change a flag of a resumed run, in `run` and in its config.json."""
    setattr(run, name, value)
    config = Path(run.resume) / "config.json"
    write_json(config, {**read_as(dict[str, Any], config), name: value})


def resumed(parser: Parser, args: argparse.Namespace, config: dict[str, Any]) -> argparse.Namespace:
    """The flags of the run that `--resume` names, in place of those of this call. parser: which read `args`.

    Raises UserError for flags that it does not know, and for values that they never have.
    """
    unknown = sorted(config.keys() - vars(args).keys())
    if unknown:
        raise UserError(
            f"{args.resume} was begun by another version or script (flags {', '.join(unknown)}); resume it by that one"
        )
    parser.check_values(config, Path(args.resume) / "config.json")
    return argparse.Namespace(**{**vars(args), **config, "resume": args.resume, "output_dir": args.resume})


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's own randomness, so that a resumed run draws what it would have drawn."""
    return seed * 1_000_003 + step


def describe(sizes: tuple[int, int], kind: str, optimizer: tuple[str, float], device: object, rate_given: bool) -> str:
    """Two lines on what is trained, and by which optimizer. sizes: number of trainable weights, and of all.

    rate_given: whether the rate is a flag's, or a resumed run's, and not chosen by the model's size.
    """
    (trainable, total), (name, rate) = sizes, optimizer
    by_size = not rate_given and depends_on_size(kind, total)
    why = " (chosen by the model's size; --learning-rate sets it)" if by_size else ""
    what = f"training {trainable:,} of {total:,} weights ({KINDS.get(kind, kind)}) on {device}"
    return f"{what}\nby {name.capitalize()}, learning rate {rate:g}{why}"
