"""What a run will need of memory, by its flags: --plan, the warning before a run that will not fit, the figure beside
the measured peak in its summary.

    python sft.py --plan --model Qwen/Qwen3-0.6B --plan-memory 16

Not here: the bytes (models.memory_plan), sizes (models.outline).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.parser import Parser
from common.ranges import COUNT, POSITIVE
from data.sources import find_split, whole
from models.adapter_config import CONFIG_FILE, SINGLE_FILE_SUFFIXES, AdapterConfig, find_adapter
from models.gpu import Machine, a_mac, this_machine
from models.loading import config_of
from models.memory_plan import EvaluationWork, MemoryPlan, PPOWork, SFTWork, plan_evaluation, plan_ppo, plan_sft
from models.outline import outline_of
from training.advantages import estimator
from training.evaluation import BATCH_SIZE
from training.flags import adapter_settings
from training.optimizer_groups import ppo_optimizer, sft_optimizer
from training.ppo_step import rows_to_score
from training.settings import PPOSettings, SFTSettings

CHARACTERS = 3  # of a token, at the least that texts have on average; of the embedded models, one
FEW_TOKENS = 1000  # a vocabulary this small has a token for a character
PROMPT = 256  # tokens of a prompt, where nothing tells its length
DIGITS_PROMPT = 8  # tokens of a start of the digit rule
MOMENTS = {"adam": 2, "muon": 1}

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Planner:
    """How one script plans: what it is asked, and which flags could make it need less, the cheapest first."""

    plan: Callable[[argparse.Namespace, Config, int, bool], MemoryPlan]  # of flags, config.json, length, on a GPU
    length: Callable[[argparse.Namespace, Config], tuple[int, str]]  # tokens of the longest text, and why
    remedies: Callable[[argparse.Namespace], Iterator[dict[str, Any]]]  # flags by their attributes


def add_plan_flags(parser: Parser) -> None:
    """--plan, and what it plans for."""
    group = parser.add_argument_group("memory plan")
    group.add_argument("--plan", action="store_true", help="print what memory the run would need, and load nothing")
    group.add_argument("--plan-memory", type=POSITIVE, metavar="GB", help="plan for a Mac with so much (default: here)")
    group.add_argument(
        "--plan-length",
        type=COUNT,
        metavar="TOKENS",
        help="of the longest row (PPO, evaluation: prompt) to plan for (default: by the characters of the data)",
    )


# SFT


def _sft_plan(args: argparse.Namespace, config: Config, length: int, on_gpu: bool) -> MemoryPlan:
    settings, adapter = SFTSettings.from_flags(args), _adapter(args, args.resume_adapter_file)
    if args.reward_model and args.lora_layers == 0 and adapter.fine_tune_type in ("lora", "dora"):
        adapter = AdapterConfig("none")
    outline = outline_of(config, adapter if args.train or args.resume_adapter_file else None)
    texts = 2 if args.reward_model or settings.dpo else 1
    optimizer, _ = sft_optimizer(settings, outline.kind, outline.trained)
    work = SFTWork(
        rows=-(-settings.batch_size // settings.gradient_accumulation_steps) * texts,
        validation_rows=settings.batch_size * texts,
        length=min(length, settings.max_length),
        moments=MOMENTS[optimizer],
        logits_bytes=settings.logits_memory * 10**6,
        checkpoint=args.grad_checkpoint,
        several_pieces=settings.gradient_accumulation_steps > 1,
        head=args.reward_model,
    )
    return plan_sft(outline, work, on_gpu)


def _sft_length(args: argparse.Namespace, config: Config) -> tuple[int, str]:
    try:
        source = find_split(args.data, args.data_base, "train" if args.train else "test")
    except UserError:
        source = None
    found = _longest(source, config)
    most = args.max_length
    if found is None:
        return most, "--max-length"
    return min(found, most), f"the longest of {source}" if found < most else "--max-length"


def _sft_remedies(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    yield from _pieces(args.gradient_accumulation_steps, args.batch_size)
    if not (args.grad_checkpoint or args.pack or args.lora_dropout):
        yield {"grad_checkpoint": True}
    yield from _adapter_remedies(args)
    yield from _halves(args, "batch_size", "max_length")


# PPO


def _ppo_plan(args: argparse.Namespace, config: Config, length: int, on_gpu: bool) -> MemoryPlan:
    settings, adapter = PPOSettings.from_flags(args), _adapter(args, args.resume_file)
    outline = outline_of(config, adapter)
    optimizer, _ = ppo_optimizer(settings, outline.kind, outline.trained)
    how = estimator(settings.advantage)
    work = PPOWork(
        batch=settings.batch_size,
        distinct=settings.batch_size // (settings.num_generations if how.compares_completions else 1),
        piece=rows_to_score(settings),
        prompt=length,
        completion=settings.max_completion_length,
        moments=MOMENTS[optimizer],
        logits_bytes=settings.logits_memory * 10**6,
        checkpoint=args.grad_checkpoint,
        base_is_reference=settings.use_peft,
        several_pieces=settings.gradient_accumulation_steps > 1,
        head=how.uses_value_head,
        reward_models=_reward_models(args, on_gpu),
    )
    return plan_ppo(outline, work, on_gpu)


def _prompt_length(args: argparse.Namespace, config: Config) -> tuple[int, str]:
    if not args.prompts:
        return DIGITS_PROMPT, "the digit rule's"
    found = _longest(args.prompts, config)
    return (found, f"the longest of {args.prompts}") if found else (PROMPT, "a guess; --plan-length says it")


def _ppo_remedies(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    divisors = [n for n in range(2, args.mini_batch_size + 1) if args.mini_batch_size % n == 0]
    yield from ({"gradient_accumulation_steps": n} for n in divisors if n > args.gradient_accumulation_steps)
    if not args.grad_checkpoint:
        yield {"grad_checkpoint": True}
    yield from _adapter_remedies(args)
    smaller = args.batch_size
    while smaller % 2 == 0 and smaller > 2:
        smaller //= 2
        yield {"batch_size": smaller, **({"mini_batch_size": smaller} if args.mini_batch_size > smaller else {})}
    yield from _halves(args, "max_completion_length")


# Evaluation


def _evaluation_plan(args: argparse.Namespace, config: Config, length: int, on_gpu: bool) -> MemoryPlan:
    adapter = find_adapter(args.resume_file).config if args.resume_file else None
    outline = outline_of(config, adapter)
    others = {name for name in (args.against, args.reference) if name and name != args.model}
    work = EvaluationWork(
        batch=min(BATCH_SIZE, args.num_samples),
        prompt=length,
        completion=args.max_completion_length,
        reference=bool(args.reference),
        logits_bytes=args.logits_memory * 10**6,
        other_models=sum(_weights(name, on_gpu) for name in others) + _reward_models(args, on_gpu),
    )
    return plan_evaluation(outline, work, on_gpu)


def _evaluation_remedies(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    yield from _halves(args, "max_completion_length")


PLANNERS = {
    "sft.py": Planner(_sft_plan, _sft_length, _sft_remedies),
    "ppo_training.py": Planner(_ppo_plan, _prompt_length, _ppo_remedies),
    "evaluate.py": Planner(_evaluation_plan, _prompt_length, _evaluation_remedies),
}


# What they share


def _adapter(args: argparse.Namespace, path: str | None) -> AdapterConfig:
    """What is put on the base: a new adapter by the flags, or the one at `path`, of which the weights are not read."""
    return find_adapter(path).config if path else AdapterConfig(**adapter_settings(args))


def _pieces(now: int, most: int) -> Iterator[dict[str, Any]]:
    number = now
    while number < most:
        number = min(2 * number, most)
        yield {"gradient_accumulation_steps": number}


def _adapter_remedies(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if args.fine_tune_type == "full" and not args.prompt_tuning:
        yield {"fine_tune_type": "lora"}
    elif args.lora_layers > 1 and not args.prompt_tuning:
        yield {"lora_layers": args.lora_layers // 2}


def _halves(args: argparse.Namespace, *names: str) -> Iterator[dict[str, Any]]:
    for name in names:
        half = getattr(args, name) // 2
        while half:
            yield {name: half}
            half //= 2


def _reward_models(args: argparse.Namespace, on_gpu: bool) -> int:
    """Bytes of reward models: an adapter on the policy's own base has no more than its own weights."""
    total = 0
    for path in args.reward_model or ():
        if Path(path).suffix in SINGLE_FILE_SUFFIXES or (Path(path) / CONFIG_FILE).is_file():
            adapter = find_adapter(path).config
            total += 4 * outline_of(config_of(adapter.model, on_gpu), adapter).trained
            total += 0 if adapter.model == args.model else _weights(adapter.model, on_gpu)
        else:
            total += _weights(path, on_gpu)
    return total


def _weights(name: str, on_gpu: bool) -> int:
    return outline_of(config_of(name, on_gpu)).weights


def _longest(source: Any, config: Config) -> int | None:
    """Tokens of the longest row of a .jsonl file, by its characters; None of what is no file here."""
    path = whole(source) if isinstance(source, str) else source
    if not isinstance(path, Path) or not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        most = max((_characters(line) for line in file), default=0)
    return -(-most // (1 if config.get("vocab_size", FEW_TOKENS) < FEW_TOKENS else CHARACTERS)) + 1


def _characters(line: str) -> int:
    """Of all texts in a row, however it is nested."""
    try:
        waiting, count = [json.loads(line)], 0
    except (ValueError, RecursionError):
        return len(line)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, list | dict):
            waiting += value.values() if isinstance(value, dict) else value
    return count


# What is said


@dataclass(frozen=True)
class Planned:
    """A plan with what it is for."""

    plan: MemoryPlan
    machine: Machine
    length: int
    why: str  # where the length is from
    remedy: str  # the flag to turn first, and what it would bring; "" where the run fits

    @property
    def fits(self) -> bool:
        """Whether the machine has the memory."""
        return self.plan.peak <= self.machine.memory


def plan_run(script: str, args: argparse.Namespace) -> Planned:
    """The plan of a run by its flags, for the machine that they name, or this one. Nothing but config.json is fetched.

    Raises UserError for a model that cannot be planned.
    """
    planner = PLANNERS[script]
    machine = a_mac(args.plan_memory) if args.plan_memory else this_machine()
    config = config_of(args.model, machine.on_gpu)
    length, why = (args.plan_length, "--plan-length") if args.plan_length else planner.length(args, config)
    return planned_with(script, args, config, length, why, machine)


def planned_with(
    script: str, args: argparse.Namespace, config: Config, length: int, why: str, machine: Machine
) -> Planned:
    """`plan_run` where config.json, the length of the longest text, and where that is from, are known."""
    planner = PLANNERS[script]
    plan = planner.plan(args, config, length, machine.on_gpu)
    remedy = "" if plan.peak <= machine.memory else _remedy(planner, args, config, length, machine, plan)
    return Planned(plan, machine, length, why, remedy)


def _remedy(
    planner: Planner, args: argparse.Namespace, config: Config, length: int, machine: Machine, plan: MemoryPlan
) -> str:
    """The first flag by which the run would fit, or else the one that brings most, by planning again with it."""
    best, words = plan.peak, ""
    for flags in planner.remedies(args):
        changed = planner.plan(argparse.Namespace(**{**vars(args), **flags}), config, length, machine.on_gpu)
        if changed.peak <= machine.memory:
            return f"{_words(flags)} brings it to {gigabytes(changed.peak)} GB"
        if changed.peak < best:
            best, words = changed.peak, f"{_words(flags)} brings most, {gigabytes(changed.peak)} GB, and is not enough"
    smaller = f"; a 4-bit base has {gigabytes(_four_bit(config))} GB of weights" if not _is_quantized(config) else ""
    return f"{words or 'no flag helps'}{smaller}"


def _is_quantized(config: Config) -> bool:
    return bool(config.get("quantization") or config.get("quantization_config"))


def _four_bit(config: Config) -> int:
    return outline_of({**config, "quantization": {"bits": 4, "group_size": 64}}).weights


def _words(flags: Mapping[str, Any]) -> str:
    """Flags as they are typed."""
    named = [(f"--{name.replace('_', '-')}", value) for name, value in flags.items()]
    return " ".join(flag if value is True else f"{flag} {value}" for flag, value in named)


def gigabytes(size: float) -> str:
    """10⁹ bytes with three significant digits, but no more than three decimals."""
    return f"{size / 1e9:.{3 if size < 1e10 else 1}f}"


def verdict(planned: Planned) -> str:
    """A line: whether it fits and, if not, the first flag to turn."""
    plan, machine = planned.plan, planned.machine
    needs = f"{gigabytes(plan.peak)} GB ({plan.widest})"
    has = f"the {gigabytes(machine.memory)} GB that {machine.name} has for it"
    return f"fits: {needs} of {has}" if planned.fits else f"does not fit: {needs} of {has}; {planned.remedy}"


def report(args: argparse.Namespace, planned: Planned) -> str:
    """What --plan prints: a table of what is held, one of the phases, and the verdict."""
    plan = planned.plan
    lines = [f"{args.model}, texts of {planned.length} tokens ({planned.why}); GB"]
    lines += [f"  {name:<26}{gigabytes(size):>12}" for name, size in plan.held.items() if size]
    lines += ["", f"  {'':<26}" + "".join(f"{name:>12}" for name in plan.phases)]
    names = list(dict.fromkeys(name for phase in plan.phases.values() for name, size in phase.items() if size))
    for name in names:
        cells = [gigabytes(phase[name]) if name in phase else "" for phase in plan.phases.values()]
        lines.append(f"  {name:<26}" + "".join(f"{cell:>12}" for cell in cells))
    peaks = [gigabytes(plan.peak_of(phase)) for phase in plan.phases]
    lines += [f"  {'peak, with what is held':<26}" + "".join(f"{peak:>12}" for peak in peaks), verdict(planned)]
    return "\n".join(lines)


def show_plan(script: str, args: argparse.Namespace) -> bool:
    """With --plan, print the plan; returns whether the script has nothing more to do."""
    if args.plan:
        print(report(args, plan_run(script, args)))
    return args.plan


def planned_peak(script: str, args: argparse.Namespace) -> float | None:
    """What the run is planned to need, in bytes; one line on stderr where that is more than the machine has.

    A warning and no refusal, as a plan can be wrong. None where the model cannot be planned.
    """
    try:
        planned = plan_run(script, args)
    except UserError:
        return None
    if not planned.fits:
        print(f"warning: by its plan the run {verdict(planned)} (--plan shows all)", file=sys.stderr)
    return float(planned.plan.peak)
