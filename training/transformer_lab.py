"""Compatibility with Transformer Lab, whose MLX RLAIF trainer starts the walkthrough's `ppo_training.py` as a process.

    python ppo_training.py --model=DIR --batch_size=8 --mini_batch_size=8 --ppo_epoch=4 --num_steps=100
        --init_kl_coef=0.2 --seed=42 --custom_hf_dataset=rows.json --max_completion_length=64 --output_dir=models/NAME
        --ground_truth_reward --adap_kl_ctrl=True

It gives prompts with their answers as --custom_hf_dataset, reads `Step - N` and figures from the output as it comes,
and registers the model that it then finds in --output_dir. Everything else is as in any other run.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.parser import Parser
from data.sources import contents, whole
from training.metrics import figure

ANSWERS = ("answer", "Output", "chosen")  # what rows call the answer, the first that is there


def add_flags(parser: Parser) -> None:
    """The flag by which its calls are recognised, and the one that says where the model goes."""
    group = parser.add_argument_group("Transformer Lab")
    group.add_argument(
        "--custom-hf-dataset",
        metavar="FILE",
        help="as --prompts; --ground-truth-reward then means the rows' own answers, and --output-dir takes the model",
    )
    group.add_argument("--fused-model", metavar="DIR", help="also write the fused model there, at the end")


def own_flags(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of such a call in terms of all the others; those of any other call as they are.

    The prompts are the rows of --custom-hf-dataset. --ground-truth-reward scores by their answers, where they have any,
    else by the digit rule. The model goes into --output-dir, and run folder and adapter into `run` below it.
    """
    if not args.custom_hf_dataset:
        return args
    if args.prompts:
        raise UserError("--prompts and --custom-hf-dataset are both given; they mean the same: leave one out")
    changed: dict[str, Any] = {"prompts": args.custom_hf_dataset}
    answer = _answer_key(args)
    if args.ground_truth_reward and answer:
        changed |= {"ground_truth_reward": False, "answer": "exact", "answer_feature": answer}
    if args.output_dir:
        run = Path(args.output_dir) / "run"
        changed |= {"output_dir": str(run), "save_file": str(run / "adapters"), "fused_model": args.output_dir}
    return argparse.Namespace(**{**vars(args), **changed})


def _answer_key(args: argparse.Namespace) -> str | None:
    """What the first row calls its answer; None where it has none, or is no row (which its reader will refuse)."""
    first: list[Any] = [row for _, row in islice(contents(whole(args.custom_hf_dataset)), 1)]
    keys = first[0] if first and isinstance(first[0], dict) else {}
    return args.answer_feature or next((key for key in ANSWERS if key in keys), None)


def reader_line(step: int, figures: Mapping[str, float], scores: Sequence[float]) -> str:
    """What its reader looks for besides the figures of the report line: the KL and all scores under its own names."""
    listed = ", ".join(map(figure, scores))
    return f"Step - {step} | kl_div: {figure(figures['kl'])} | Reward: array([{listed}], dtype=float32)"
