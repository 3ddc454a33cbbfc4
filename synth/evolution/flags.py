"""The flags of synth.evolve: its parser, what a resumed run takes anew, and the settings that they describe.

python -m pytest tests/test_evolve.py -k "flags or mistake"
"""

import argparse

from common.errors import UserError
from common.parser import Parser, positive
from rewards.answers import answer_type
from rewards.function import load_reward_function
from synth.evolution.files import KINDS, load_policy, make_policy
from synth.evolution.instructions import read_instructions
from synth.evolution.judge import Difficulty, Gates, Weights
from synth.evolution.operators import ACTIONS, OPERATORS
from synth.evolution.policy import Learning, Policy, fixed
from synth.evolution.responses import FORMATS
from synth.evolution.training import Training
from synth.offline.instructions import read_sum, starting
from synth.pipeline.flags import FREE_FLAGS
from synth.teacher.flags import add_teacher_flags, limits_from
from training.flags import resumed
from training.metrics import resumed_config

LEARNERS = tuple(kind for kind, policy in KINDS.items() if policy.learns)
POLICIES = (*LEARNERS, "uniform", *OPERATORS)
OFFLINE_ANSWERS = 4
FREE = [*FREE_FLAGS, "instructor_url", "reviewer_url"]


def evolve_parser(description: str | None) -> Parser:
    """All flags."""
    parser = Parser(description)
    group = parser.add_argument_group("instructions")
    group.add_argument("--instructions", metavar="FILE", help="initial ones: plain lines, Alpaca's or messages' rows")
    group.add_argument("--count", type=int, default=24, help="initial ones without a file, for the offline teacher")
    group = parser.add_argument_group("evolution")
    group.add_argument("--rounds", type=int, default=3, help="operators in a row, at most")
    group.add_argument("--chains", type=int, default=1, help="chains from each initial instruction, for the data")
    group = parser.add_argument_group("policy")
    group.add_argument("--policy", choices=POLICIES, default="ppo", help="what chooses; an operator: always that one")
    group.add_argument("--policy-path", metavar="DIR", help="a trained policy (RUN/policy), to be used as it is")
    group.add_argument("--iterations", type=int, default=Training.iterations, help="of the policy's training")
    group.add_argument("--starts", type=int, default=Training.starts, help="initial instructions an iteration")
    group.add_argument("--group", type=int, default=Training.group, help="chains from each of them")
    group.add_argument("--floor", type=float, default=Learning.floor, help="least propensity of an action")
    group.add_argument("--gamma", type=float, default=Learning.gamma, help="discount of later rewards; linucb: 0")
    group.add_argument("--learning-rate", type=float, default=Learning.learning_rate, help="of the policy's MLP")
    group = parser.add_argument_group("reward")
    weights, gates = Weights(), Gates()
    group.add_argument("--novelty-weight", type=float, default=weights.novelty, help="1 - highest ROUGE-L to the pool")
    group.add_argument("--difficulty-weight", type=float, default=weights.difficulty, help="4p(1 - p)")
    group.add_argument("--growth-weight", type=float, default=weights.growth, help="subtracted: ln of the length ratio")
    group.add_argument("--near-duplicates", type=float, default=gates.near_duplicates, help="highest ROUGE-L to pass")
    group.add_argument("--shortest", type=int, default=gates.shortest, help="words of an instruction")
    group.add_argument("--longest", type=int, default=gates.longest, help="words of an instruction")
    group.add_argument(
        "--answers",
        type=int,
        default=0,
        help=f"to each instruction, for its pass rate (all offline: {OFFLINE_ANSWERS})",
    )
    group.add_argument("--answer", metavar="TYPE", help="by which answers agree: number, math, exact, choice, json ...")
    group.add_argument("--verifier", metavar="FILE.py:FUNCTION", help="scores answers: 1 or more is right")
    group = parser.add_argument_group("instructor and reviewer (default: the teacher; the reviewer: the instructor)")
    for role, what in (("instructor", "rewrites in training and solves"), ("reviewer", "says what is equal")):
        group.add_argument(f"--{role}-url", help=f"the endpoint that {what}; limits count apart, prices do not apply")
        group.add_argument(f"--{role}-model", help="the model's name there")
    add_teacher_flags(parser)
    parser.set_defaults(cache=None)
    group = parser.add_argument_group("data and training")
    group.add_argument("--format", choices=FORMATS, default="messages", help="of dataset.jsonl")
    group.add_argument("--held-out", type=float, default=0.1, help="share of initial instructions for sft's validation")
    group.add_argument("--sft", action="store_true", help="then train by sft.py")
    group.add_argument("--base-model", default="tiny-digits", help="what --sft trains: a folder or a name")
    group.add_argument("--sft-flags", default="", metavar="TEXT", help="more flags of sft.py, as one text")
    group = parser.add_argument_group("run")
    group.add_argument(
        "--offline-teacher", default="", metavar="TEXT", help="without --teacher-url: flags of that teacher"
    )
    group.add_argument("--output-dir", help="run folder (default: runs/evolve-TIME)")
    group.add_argument("--resume", metavar="RUN_FOLDER", help="go on with a stopped run, by its own flags")
    group.add_argument("--dry-run", action="store_true", help="print upper bounds of calls and tokens; send nothing")
    group.add_argument("--seed", type=int, default=0, help="of everything random but the teachers")
    return parser


def parse_evolve_args(description: str | None) -> argparse.Namespace:
    """The flags of the command line, or of the run that --resume names."""
    flags = evolve_parser(description)
    args = flags.parse_args()
    args.endpoint = args.instructor_endpoint = args.reviewer_endpoint = None  # the cache's names of moved endpoints
    if not args.resume:
        if not (args.teacher_url or args.instructions or args.answers or args.answer or args.verifier):
            args.answers, args.answer = OFFLINE_ANSWERS, "number"
        return args
    saved = resumed_config(args.resume)
    given = {name: getattr(args, name) for name in FREE if getattr(args, name) != flags.get_default(name)}
    names = {"endpoint": "teacher_url", "instructor_endpoint": "instructor_url", "reviewer_endpoint": "reviewer_url"}
    endpoints = {name: saved.get(url) for name, url in names.items()}
    return argparse.Namespace(**{**vars(resumed(args, saved)), **endpoints, **given})


def check(args: argparse.Namespace) -> None:
    """Raise UserError for settings that cannot be, before anything is started."""
    for name in ("count", "rounds", "chains", "learning_rate"):
        positive(name.replace("_", "-"), getattr(args, name))
    for role in ("teacher", "instructor", "reviewer"):
        url, model = getattr(args, f"{role}_url"), getattr(args, f"{role}_model")
        if bool(url) != bool(model):
            raise UserError(f"--{role}-url is {url} and --{role}-model {model}; give both or neither")
    if not 0 <= args.held_out < 1:
        raise UserError(f"--held-out is {args.held_out}; it is a share, from 0 to below 1")
    gates_from(args), difficulty_from(args), training_from(args), policy_from(args), limits_from(args)


def instructions_from(args: argparse.Namespace) -> list[str]:
    """The initial instructions. Raises UserError where the offline teacher could do nothing with one."""
    if args.instructions is None:
        if args.teacher_url:
            raise UserError("no instructions to begin with; give --instructions FILE, one a line")
        return starting(args.count, args.seed)
    found = read_instructions(args.instructions)
    unknown = next((text for text in found if read_sum(text) is None), None)
    if not args.teacher_url and unknown is not None:
        raise UserError(
            f"the offline teacher knows sums in words only, not {unknown!r:.60}; give --teacher-url and --teacher-model"
        )
    return found


def gates_from(args: argparse.Namespace) -> Gates:
    return Gates(args.near_duplicates, args.shortest, args.longest)


def weights_from(args: argparse.Namespace) -> Weights:
    return Weights(args.novelty_weight, args.difficulty_weight, args.growth_weight)


def difficulty_from(args: argparse.Namespace) -> Difficulty:
    return Difficulty(
        args.answers,
        answer_type(args.answer) if args.answer else None,
        load_reward_function(args.verifier) if args.verifier else None,
        args.answer_tokens,
        args.teacher_temperature,
    )


def training_from(args: argparse.Namespace) -> Training:
    return Training(args.iterations, args.starts, args.group, args.seed)


def policy_from(args: argparse.Namespace) -> Policy:
    """The policy before its training, or the trained one of --policy-path."""
    if args.policy_path:
        return load_policy(args.policy_path)
    learning = Learning(floor=args.floor, gamma=args.gamma, learning_rate=args.learning_rate, seed=args.seed)
    return fixed(ACTIONS.index(args.policy)) if args.policy in OPERATORS else make_policy(args.policy, learning)
