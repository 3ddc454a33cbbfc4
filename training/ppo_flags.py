"""The flags of PPO, shared by ppo_training.py and pytorch_ppo_training.py, and what they say.

Not here: the defaults (training.settings), and which settings fit together (training.ppo_step.check_settings).
"""

import argparse
import math
import os
from typing import Any

import numpy as np

from common.errors import UserError
from common.parser import Collect, Parser, boolean, positive
from common.ranges import COUNT, FINITE, NATURAL, NOT_NEGATIVE, POSITIVE, SHARE
from data.digits import DigitRule, digit_prompts, held_out_starts
from data.flags import add_feature_flags
from data.prompts import read_prompts
from data.records import feature_names
from data.sources import is_hub_name
from models.adapter_base import MODEL_HELP
from rewards.combined import KINDS, reward_weights
from rewards.user_code import TIMEOUT
from training.advantages import ESTIMATORS
from training.flags import add_adapter_flags, add_logits_memory, add_optimizer_flags, add_run_flags, set_defaults
from training.optimizer_groups import HEAD_RATE, LARGE, LARGE_PPO_OPTIMIZERS, LARGE_STEP_KL, PPO_OPTIMIZERS, STEP_KL
from training.ppo import KL_KINDS
from training.ppo_step import GROUP_KL_COEF, KL_COEF, KL_TARGET, check_settings
from training.settings import PPOSettings

ADVANTAGES = tuple(ESTIMATORS)
# A reward model is right only near what it was trained on, so that the KL is held, and tighter (docs/ppo_training.md).
MODEL_S_KL = {"init_kl_coef": 0.1, "target": 4.0}


MAIN_FLAGS = (
    *("--model", "--ground-truth-reward", "--reward-model", "--reward-function", "--prompts", "--num-steps"),
    *("--batch-size", "--max-completion-length", "--learning-rate", "--init-kl-coef", "--save-file", "--resume"),
)


def ppo_parser(description: str | None) -> Parser:
    """The parser of both PPO scripts. docs/ppo_training.md says where a default is not the walkthrough's."""
    parser = Parser(description)
    parser.add_argument("--model", help=MODEL_HELP)
    add_reward_flags(parser)
    _add_score_flags(parser)
    _add_rollout_flags(parser)
    _add_ppo_flags(parser)
    _add_kl_flags(parser)
    add_adapter_flags(parser, dropout=0.0)
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--save-file",
        "--adapter-path",
        default="ppo_adapters",
        help="folder for the adapter, or .npz or .safetensors file",
    )
    group.add_argument("--resume-file", help="start from this adapter, which is then the reference too")
    group.add_argument("--use-peft", action="store_true", help="the reference is the base with the adapter off")
    group.add_argument("--save-best", action="store_true", help="save the adapter of the best held-out score")
    group.add_argument("--save-every", type=COUNT, default=20, help="steps between checkpoints")
    optimizer = add_optimizer_flags(parser, PPO_OPTIMIZERS, LARGE_PPO_OPTIMIZERS)
    optimizer.add_argument(
        "--step-kl",
        type=NOT_NEGATIVE,
        help="nats per completion that a step moves the policy; the rate adapts; 0: it doesn't (default: "
        f"{STEP_KL}; of a model of more than {LARGE // 10**6} million weights {LARGE_STEP_KL}, but for soft prompts)",
    )
    optimizer.add_argument(
        "--value-head-learning-rate",
        "--critic-learning-rate",
        type=POSITIVE,
        help=f"of the value head (default: --learning-rate, but at most {HEAD_RATE:g})",
    )
    add_run_flags(parser)
    set_defaults(parser, PPOSettings)
    parser.show_first(*MAIN_FLAGS)
    return parser


def add_reward_flags(parser: Parser) -> None:
    """Where scores come from."""
    group = parser.add_argument_group("reward (one of the first, or several with --reward-weights)")
    for kind in KINDS:
        kind.add_flag(group)
    group.add_argument(
        "--reward-weights",
        metavar="NAME=WEIGHT",
        nargs="+",
        action=Collect,
        help="score by the weighted sum of the rewards given: digit_rule, answer, a function's or folder's name",
    )
    group.add_argument(
        "--reward-timeout",
        type=NOT_NEGATIVE,
        default=TIMEOUT,
        help="seconds a call of your own function may take; 0: any",
    )
    group.add_argument("--decreasing", action="store_true", help="digit rule: strictly decreasing, not increasing")
    group.add_argument("--multiple-of", type=COUNT, default=2, help="digit rule: every number is a multiple of this")


def _add_score_flags(parser: Parser) -> None:
    group = parser.add_argument_group("score")
    group.add_argument("--missing-eos-penalty", type=FINITE, help="subtracted from a score without an EOS")
    group.add_argument("--score-clip", type=NOT_NEGATIVE, help="clip scores to ± this; 0: no clipping")
    group.add_argument(
        "--scale-scores", "--use-score-scaling", action="store_true", help="divide scores by their running std"
    )
    group.add_argument(
        "--normalize-scores", "--use-score-norm", action="store_true", help="subtract their running mean as well"
    )


def add_prompt_source(group: argparse._ActionsContainer) -> None:
    """Where prompts come from. Also of evaluate.py."""
    group.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help='rows with "prompt" or "messages", or a data set (default: starts of the digit rule)',
    )
    add_feature_flags(group, ("prompt", "chat", "answer"))


def _add_rollout_flags(parser: Parser) -> None:
    group = parser.add_argument_group("rollout")
    add_prompt_source(group)
    group.add_argument("--batch-size", type=COUNT, help="completions a step")
    group.add_argument("--max-completion-length", "--max-new-tokens", type=COUNT, help="tokens")
    group.add_argument("--temperature", type=POSITIVE, help="of sampling and of every logprob")
    group.add_argument("--num-steps", type=COUNT, help="rollouts, each with its update; with --resume: extends the run")
    group.add_argument(
        "--steps-per-eval", type=NATURAL, help="steps between scores of held-out prompts; 0: none held out"
    )
    group.add_argument("--early-stopping", type=NATURAL, help="end after so many held-out scores without a better one")
    group.add_argument(
        "--steps-per-samples", type=NATURAL, default=10, help="steps between tables of sampled completions; 0: none"
    )


def _add_ppo_flags(parser: Parser) -> None:
    group = parser.add_argument_group("PPO")
    group.add_argument("--advantage", choices=ADVANTAGES, help="advantage estimator; see training/advantages.py")
    group.add_argument("--num-generations", type=COUNT, help="completions per prompt, for group and rloo")
    group.add_argument("--no-group-scale", action="store_true", help="group: don't divide by the group's std")
    group.add_argument("--mini-batch-size", type=COUNT, help="completions an optimizer step")
    group.add_argument("--gradient-accumulation-steps", type=COUNT, help="pieces a mini batch is cut into")
    add_logits_memory(group)
    group.add_argument("--ppo-epochs", "--ppo-epoch", "--num-ppo-epochs", type=COUNT, help="passes over a rollout")
    group.add_argument("--gamma", type=SHARE, help="discount per token")
    group.add_argument("--gae-lambda", "--lam", type=SHARE, help="GAE's λ")
    group.add_argument("--center-values", action=argparse.BooleanOptionalAction,
                       help="gae: add the batch's mean return to every value")  # fmt: skip
    group.add_argument("--clip-range", "--cliprange", type=NOT_NEGATIVE, help="of the ratio")
    group.add_argument(
        "--value-clip-range", "--cliprange-value", type=NOT_NEGATIVE, help="of the value, in score units"
    )
    group.add_argument("--vf-coef", type=NOT_NEGATIVE, help="weight of the value loss")
    group.add_argument("--entropy-coef", type=FINITE, help="weight of the entropy bonus")
    group.add_argument("--whiten-rewards", action="store_true", help="scale per-token rewards to unit variance")
    group.add_argument(
        "--target-kl", type=NOT_NEGATIVE, help="end a step's updates past 1.5 × this approx_kl; 0: never"
    )
    group.add_argument("--ratio-threshold", type=POSITIVE, help="skip a mini batch with a higher mean ratio")


def _add_kl_flags(parser: Parser) -> None:
    group = parser.add_argument_group("KL to the reference policy")
    group.add_argument("--init-kl-coef", type=NOT_NEGATIVE,
                       help=f"penalty per nat, in score units (default: {KL_COEF:g} standard deviations of the scores; "
                       f"group: {GROUP_KL_COEF:g}; with a reward model {MODEL_S_KL['init_kl_coef']:g})")  # fmt: skip
    group.add_argument("--adap-kl-ctrl", type=boolean, nargs="?", const=True,
                       help="adapt the coefficient to --target (True or False)")  # fmt: skip
    group.add_argument("--target", type=POSITIVE,
                       help=f"target KL, nats per completion (default: {MODEL_S_KL['target']:g} with a reward model; "
                       f"else {KL_TARGET:g}, and the coefficient never exceeds --init-kl-coef)")  # fmt: skip
    group.add_argument("--horizon", type=POSITIVE, help="completions over which the coefficient adapts")
    group.add_argument("--kl-penalty", choices=KL_KINDS, help="KL per token (default: k1; k3 with group and rloo)")


def check_reward(args: argparse.Namespace) -> None:
    """Raise UserError unless one reward is named, or several and the weight of each."""
    positive("multiple-of", args.multiple_of)
    positive("reward-timeout", args.reward_timeout, zero=True)
    reward_weights(args)
    if args.answer and not args.prompts:
        raise UserError('--answer needs the answers; give --prompts FILE.jsonl with rows of "prompt" and "answer"')
    if args.prompts and not os.path.exists(args.prompts) and not is_hub_name(str(args.prompts)):
        raise UserError(f"--prompts {args.prompts} does not exist; check the path")


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that cannot work together, before anything is loaded."""
    check_reward(args)
    check_settings(PPOSettings.from_flags(args))
    positive("save-every", args.save_every)
    positive("steps-per-samples", args.steps_per_samples, zero=True)
    for name in ("save_best", "early_stopping"):
        if getattr(args, name) and not args.steps_per_eval:
            raise UserError(f"--{_dashed(name)} goes by held-out scores; add --steps-per-eval, or leave it out")
    if args.lora_dropout:
        raise UserError(f"--lora-dropout is {args.lora_dropout}; PPO needs 0, or the first ratio is not 1")


def ppo_settings(args: argparse.Namespace) -> PPOSettings:
    """The settings that the flags say; sets in `args` what follows from others. Raises UserError as `check` does."""
    check(args)
    for name, value in MODEL_S_KL.items() if args.reward_model else ():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return PPOSettings.from_flags(args)


def _dashed(field: str) -> str:
    return field.replace("_", "-")


def digit_rule(args: argparse.Namespace) -> DigitRule:
    """The rule that --decreasing and --multiple-of name."""
    return DigitRule(not args.decreasing, args.multiple_of)


def hold_out(args: argparse.Namespace, prompts: list[str]) -> tuple[list[str], list[str]]:
    """The prompts to train on, and those that are held out where --steps-per-eval asks for their scores.

    Of the digit rule: its held-out starts, which are never trained on. Of --prompts: a tenth of the distinct ones, the
    same for every seed. Raises UserError where there is none to spare.
    """
    if not args.steps_per_eval:
        return prompts, []
    distinct = sorted(set(prompts))
    if not args.prompts:
        held_out = {str(start) for start in held_out_starts(digit_rule(args))}
    else:
        drawn = np.random.default_rng(0).permutation(len(distinct))[: math.ceil(len(distinct) / 10)]
        held_out = {distinct[i] for i in drawn} if len(distinct) > 1 else set()
    if not held_out:
        raise UserError("--steps-per-eval has no prompt to hold out; give more --prompts, or leave it out")
    return [prompt for prompt in prompts if prompt not in held_out], sorted(held_out)


def choose_prompts(args: argparse.Namespace, tokenizer: Any) -> list[str]:
    """The prompts that --prompts names, or else starts of the digit rule. tokenizer: renders prompts of messages."""
    if args.prompts:
        return read_prompts(args.prompts, tokenizer, feature_names(args))
    return digit_prompts(digit_rule(args))
