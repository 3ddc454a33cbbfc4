"""The flags of PPO, shared by ppo_training.py and pytorch_ppo_training.py, and what can be checked before loading."""

import argparse
from pathlib import Path

from common.errors import UserError
from common.parser import Collect, Parser, boolean, positive
from data.flags import add_feature_flags
from data.sources import is_hub_name
from rewards.combined import reward_weights
from training.flags import PPO_OPTIMIZERS, add_adapter_flags, add_optimizer_flags, add_run_flags, optimizer_and_rate
from training.optimizer_groups import HEAD_RATE
from training.ppo import KL_KINDS

ADVANTAGES = ("gae", "group", "rloo")


def ppo_parser(description: str | None) -> Parser:
    """The parser of both PPO scripts. Its page in docs/ says where a default is not the walkthrough's."""
    parser = Parser(description)
    parser.add_argument("--model", default="tiny-digits", help="tiny-digits, a folder, or a Hugging Face name")
    add_reward_flags(parser)
    _add_score_flags(parser)
    _add_prompt_flags(parser)
    _add_ppo_flags(parser)
    _add_kl_flags(parser)
    add_adapter_flags(parser, dropout=0.0)
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--save-file",
        "--adapter-path",
        default="adapters",
        help="folder for the adapter, or .npz or .safetensors file",
    )
    group.add_argument("--resume-file", help="start from this adapter, which is then the reference too")
    group.add_argument("--use-peft", action="store_true", help="the reference is the base with the adapter off")
    group.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    optimizer = add_optimizer_flags(parser, PPO_OPTIMIZERS, schedule="linear")
    optimizer.add_argument(
        "--value-head-learning-rate",
        "--critic-learning-rate",
        type=float,
        help=f"of the value head (default: --learning-rate, but at most {HEAD_RATE:g})",
    )
    add_run_flags(parser)
    return parser


def add_reward_flags(parser: Parser) -> None:
    """Where scores come from."""
    group = parser.add_argument_group("reward (one of the first four, or several with --reward-weights)")
    group.add_argument("--ground-truth-reward", action="store_true", help="score by the digit rule")
    group.add_argument("--reward-model", metavar="DIR", nargs="+", action=Collect,
                       help="score by a reward model: a fused folder, or an adapter; or by several")  # fmt: skip
    group.add_argument("--reward-function", metavar="FILE.py:NAME", nargs="+", action=Collect,
                       help="score by your own f(prompts, completions), or by several")  # fmt: skip
    group.add_argument(
        "--answer", metavar="TYPE", help='score 1 for the "answer" of the prompt\'s row; number, say, or {type: ...}'
    )
    group.add_argument(
        "--reward-weights",
        metavar="NAME=WEIGHT",
        nargs="+",
        action=Collect,
        help="score by the weighted sum of the rewards given: digit_rule, answer, a function's or folder's name",
    )
    group.add_argument("--decreasing", action="store_true", help="digit rule: strictly decreasing, not increasing")
    group.add_argument("--multiple-of", type=int, default=2, help="digit rule: every number is a multiple of this")


def _add_score_flags(parser: Parser) -> None:
    group = parser.add_argument_group("score")
    group.add_argument("--missing-eos-penalty", type=float, default=0.0, help="taken off a score without an EOS")
    group.add_argument("--score-clip", type=float, default=0.0, help="hold scores within ± this; 0: don't")
    group.add_argument(
        "--scale-scores", "--use-score-scaling", action="store_true", help="divide scores by their running std"
    )
    group.add_argument(
        "--normalize-scores", "--use-score-norm", action="store_true", help="take their running mean off them as well"
    )


def add_prompt_source(group: argparse._ActionsContainer) -> None:
    """Where prompts come from. Also of evaluate.py."""
    group.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help='rows with "prompt" or "messages", or a data set (default: starts of the digit rule)',
    )
    add_feature_flags(group, ("prompt", "chat", "answer"))


def _add_prompt_flags(parser: Parser) -> None:
    group = parser.add_argument_group("rollout")
    add_prompt_source(group)
    group.add_argument("--batch-size", type=int, default=128, help="completions a step")
    group.add_argument("--max-completion-length", "--max-new-tokens", type=int, default=48, help="tokens")
    group.add_argument("--temperature", type=float, default=1.0, help="of sampling and of every logprob")
    group.add_argument("--num-steps", type=int, default=200, help="rollouts, each with its update")
    group.add_argument(
        "--steps-per-samples", type=int, default=10, help="steps between tables of sampled completions; 0: none"
    )


def _add_ppo_flags(parser: Parser) -> None:
    group = parser.add_argument_group("PPO")
    group.add_argument("--advantage", choices=ADVANTAGES, default="gae", help="gae (value head), group (GRPO) or rloo")
    group.add_argument("--num-generations", type=int, default=8, help="completions a prompt, for group and rloo")
    group.add_argument("--no-group-scale", action="store_true", help="group: don't divide by the group's std")
    group.add_argument("--mini-batch-size", type=int, default=64, help="completions an optimizer step")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, help="pieces a mini batch is cut into")
    group.add_argument(
        "--ppo-epochs", "--ppo-epoch", "--num-ppo-epochs", type=int, default=2, help="passes over a rollout"
    )
    group.add_argument("--gamma", type=float, default=1.0, help="discount per token")
    group.add_argument("--gae-lambda", "--lam", type=float, default=1.0, help="GAE's λ")
    group.add_argument("--clip-range", "--cliprange", type=float, default=0.2, help="of the ratio")
    group.add_argument(
        "--value-clip-range", "--cliprange-value", type=float, default=0.2, help="of the value, in score units"
    )
    group.add_argument("--vf-coef", type=float, default=0.5, help="weight of the value loss")
    group.add_argument("--entropy-coef", type=float, default=0.0, help="entropy bonus")
    group.add_argument("--whiten-rewards", action="store_true", help="scale per-token rewards to unit variance")
    group.add_argument("--target-kl", type=float, default=0.0, help="end a step's updates past 1.5 × this; 0: don't")
    group.add_argument("--ratio-threshold", type=float, default=10.0, help="skip a mini batch of a higher mean ratio")


def _add_kl_flags(parser: Parser) -> None:
    group = parser.add_argument_group("KL to the reference policy")
    group.add_argument("--init-kl-coef", type=float, default=0.01, help="penalty per nat, in score units")
    group.add_argument("--adap-kl-ctrl", type=boolean, default=True, nargs="?", const=True,
                       help="adapt the coefficient to --target (True or False)")  # fmt: skip
    group.add_argument("--target", type=float, default=6.0, help="KL aimed at, nats per completion")
    group.add_argument("--horizon", type=float, default=2000, help="completions over which it adapts")
    group.add_argument("--kl-penalty", choices=KL_KINDS, default="k1", help="KL per token; with gae k1 pulls best")


def check_reward(args: argparse.Namespace) -> None:
    """Raise UserError unless one reward is named, or several and the weight of each."""
    positive("multiple-of", args.multiple_of)
    reward_weights(args)
    if args.answer and not args.prompts:
        raise UserError('--answer needs the answers; give --prompts FILE.jsonl with rows of "prompt" and "answer"')
    if args.prompts and not Path(args.prompts).exists() and not is_hub_name(str(args.prompts)):
        raise UserError(f"--prompts {args.prompts} does not exist; check the path")


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that cannot work together, before anything is loaded."""
    check_reward(args)
    for name in ("batch-size", "mini-batch-size", "gradient-accumulation-steps", "ppo-epochs", "num-steps",
                 "max-completion-length", "temperature", "save-every", "horizon", "target"):  # fmt: skip
        positive(name, getattr(args, name.replace("-", "_")))
    for name in ("init-kl-coef", "clip-range", "value-clip-range", "vf-coef", "target-kl", "score-clip",
                 "steps-per-samples"):  # fmt: skip
        positive(name, getattr(args, name.replace("-", "_")), zero=True)
    pieces = args.gradient_accumulation_steps
    _check_divides("batch-size", args.batch_size, "mini-batch-size", args.mini_batch_size)
    _check_divides("mini-batch-size", args.mini_batch_size, "gradient-accumulation-steps", pieces)
    if args.advantage != "gae":
        if args.num_generations < 2:
            raise UserError(f"--num-generations is {args.num_generations}; {args.advantage} needs 2 or more")
        _check_divides("batch-size", args.batch_size, "num-generations", args.num_generations, least=2)
    for name in ("learning-rate", "value-head-learning-rate"):
        if getattr(args, name.replace("-", "_")) is not None:
            positive(name, getattr(args, name.replace("-", "_")))
    if args.lora_dropout:
        raise UserError(f"--lora-dropout is {args.lora_dropout}; PPO needs 0, or the first ratio is not 1")


def optimizer_of(args: argparse.Namespace, kind: str) -> tuple[str, float]:
    """The optimizer and its rate: by the flags, or what suits the kind of adapter.

    Raises UserError for an adapter that has nothing to train.
    """
    if kind not in PPO_OPTIMIZERS:
        remedy = "give it as --reward-model, or leave it out"
        raise UserError(f"--resume-file {args.resume_file} is a value head alone, with no weight for PPO; {remedy}")
    return optimizer_and_rate(args, PPO_OPTIMIZERS[kind])


def _check_divides(name: str, value: int, divisor_name: str, divisor: int, least: int = 1) -> None:
    if value % divisor:
        divisors = [d for d in range(least, value + 1) if value % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - divisor))[:2]
        remedy = f"try {' or '.join(map(str, sorted(near)))}" if near else f"raise --{name}"
        raise UserError(f"--{name} {value} is not divisible by --{divisor_name} {divisor}; {remedy}")
