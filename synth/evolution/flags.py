"""The flags of synth.evolve: its parser, what a resumed run accepts anew, and the settings made of them."""

import argparse
from dataclasses import dataclass, replace

from common.errors import UserError
from common.parser import Parser, Repeated, positive
from common.ranges import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, SEED, SHARE, SHARE_BELOW_1
from rewards.answer_reward import answer_from_flag
from rewards.function import load_reward_function
from synth.evolution.features import size_of
from synth.evolution.files import KINDS, load_policy, make_policy
from synth.evolution.instructions import read_instructions
from synth.evolution.judge import EVOL_GATES, Difficulty, Gates, Weights
from synth.evolution.operators import OPERATORS, OWN, Operators, load_operators
from synth.evolution.policy import OperatorPolicy, PolicySettings, fixed, without_stop
from synth.evolution.responses import FORMATS
from synth.evolution.training import Training
from synth.offline.instructions import read_sum, starting
from synth.pipeline.flags import FREE_FLAGS, checked_teacher, resumed_args
from synth.teacher.flags import TeacherSettings, add_offline_teacher_flag, add_teacher_flags

LEARNERS = tuple(kind for kind, policy in KINDS.items() if policy.learns)
WITHOUT_POLICY = ("self", "evol")
POLICIES = (*LEARNERS, "uniform", *OPERATORS)
OFFLINE_ANSWERS = 4
FREE = [*FREE_FLAGS, "instructor_url", "reviewer_url"]
ROLES = ("instructor", "reviewer")  # beside the teacher, who is the expert


@dataclass(frozen=True)
class EvolveSettings:
    """All settings of a run.

    instructor, reviewer: None if the teacher (or the instructor) has that part too. policy: one of POLICIES;
    policy_path: a trained one, used as it is. rounds: most operators in a row; chains: per initial instruction, for
    the data. control: also evolve by even choice, to compare. format, held_out: of the dataset; sft: whether to train
    on it, base_model by sft.py with sft_flags.
    Raises UserError for invalid values.
    """

    teacher: TeacherSettings
    instructor: TeacherSettings | None
    reviewer: TeacherSettings | None
    gates: Gates
    weights: Weights
    difficulty: Difficulty
    training: Training
    learning: PolicySettings
    policy: str = "ppo"
    policy_path: str | None = None
    rounds: int = 3
    chains: int = 1
    control: bool = False
    format: str = "messages"
    held_out: float = 0.1
    sft: bool = False
    base_model: str = "tiny-digits"
    sft_flags: str = ""
    seed: int = 0
    operators: Operators = OWN
    reviewer_score: bool = False
    without_policy: str | None = None

    def __post_init__(self):
        for name in ("rounds", "chains"):
            positive(name, getattr(self, name))
        positive("learning-rate", self.learning.learning_rate)
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out is {self.held_out}; it is a share, at least 0 and below 1")

    def initial_policy(self) -> OperatorPolicy:
        """The policy before its training, or the trained one of policy_path."""
        actions = self.operators.actions
        if self.without_policy:
            return without_stop(actions)
        if self.policy_path:
            return load_policy(self.policy_path, actions)
        if self.policy not in actions[:-1]:
            return make_policy(self.policy, self.learning, actions)
        return fixed(actions.index(self.policy), len(actions), size_of(actions[:-1]), actions)


def evolve_parser(description: str | None) -> Parser:
    """All flags."""
    parser = Parser(description)
    group = parser.add_argument_group("instructions")
    group.add_argument("--instructions", metavar="FILE", help="initial ones: plain lines, Alpaca rows or messages rows")
    group.add_argument("--count", type=COUNT, default=24, help="initial ones made by rule, without a file")
    group = parser.add_argument_group("evolution")
    group.add_argument("--rounds", type=COUNT, default=3, help="most operators in a row")
    group.add_argument("--chains", type=COUNT, default=1, help="chains from each initial instruction, for the data")
    group.add_argument(
        "--operators", metavar="FILE", help="operators of your own, with limits; the published six: teams_rl.yaml"
    )
    group = parser.add_argument_group("policy")
    group.add_argument(
        "--policy",
        metavar="NAME",
        default="ppo",
        help=f"what chooses operators: {', '.join(POLICIES)} (or one of --operators)",
    )
    group.add_argument(
        "--without-policy",
        choices=WITHOUT_POLICY,
        help="self: Self-Instruct; evol: Evol-Instruct, operators drawn evenly; each with its published filters",
    )
    group.add_argument("--policy-path", metavar="DIR", help="a trained policy (RUN/policy), used as it is")
    group.add_argument("--iterations", type=NATURAL, default=Training.iterations, help="of the policy's training")
    group.add_argument("--starts", type=COUNT, default=Training.starts, help="initial instructions per iteration")
    group.add_argument("--group", type=COUNT, default=Training.group, help="chains per initial instruction")
    group.add_argument("--floor", type=SHARE, default=PolicySettings.floor, help="minimum probability of an action")
    group.add_argument(
        "--gamma", type=SHARE, default=PolicySettings.gamma, help="discount of later rewards (not linucb)"
    )
    group.add_argument(
        "--learning-rate", type=POSITIVE, default=PolicySettings.learning_rate, help="of the policy's MLP"
    )
    group.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        help="also evolve by even choice, and say which was better (default: when all is offline)",
    )
    group = parser.add_argument_group("reward")
    weights, gates = Weights(), Gates()
    group.add_argument(
        "--novelty-weight", type=NOT_NEGATIVE, default=weights.novelty, help="1 - highest ROUGE-L to the pool"
    )
    group.add_argument("--difficulty-weight", type=NOT_NEGATIVE, default=weights.difficulty, help="4p(1 - p)")
    group.add_argument(
        "--growth-weight", type=NOT_NEGATIVE, default=weights.growth, help="log of the length ratio, subtracted"
    )
    group.add_argument(
        "--reviewer-score",
        action="store_true",
        help="as published: the reward is a score by the reviewer of how much an instruction differs from its parent",
    )
    group.add_argument("--near-duplicates", type=SHARE, default=gates.near_duplicates, help="maximum ROUGE-L")
    group.add_argument("--shortest", type=NATURAL, default=gates.shortest, help="minimum words of an instruction")
    group.add_argument("--longest", type=COUNT, default=gates.longest, help="maximum words of an instruction")
    group.add_argument(
        "--answers",
        type=NATURAL,
        default=0,
        help=f"per instruction, for its pass rate (default when all is offline: {OFFLINE_ANSWERS})",
    )
    group.add_argument(
        "--answer",
        metavar="TYPE",
        help="how answers are compared: number, say, or {type: choice, ...}",
    )
    group.add_argument("--verifier", metavar="FILE.py:FUNCTION", help="scores answers: 1 or more is correct")
    group = parser.add_argument_group("instructor and reviewer (default: the teacher; the reviewer: the instructor)")
    for role, what in (
        ("instructor", "rewrites in training and solves"),
        ("reviewer", "says what is equal"),
    ):
        group.add_argument(
            f"--{role}-url", action=Repeated, help=f"the endpoint that {what}; has its own limits and no prices"
        )
        group.add_argument(f"--{role}-model", help="the model's name there")
    add_teacher_flags(parser, cache=None)
    group = parser.add_argument_group("data and training")
    group.add_argument("--format", choices=FORMATS, default="messages", help="of dataset.jsonl")
    group.add_argument(
        "--held-out", type=SHARE_BELOW_1, default=0.1, help="share of initial instructions to validate SFT on"
    )
    group.add_argument("--sft", action="store_true", help="then train with sft.py")
    group.add_argument("--base-model", default="tiny-digits", help="what --sft trains: a folder or a name")
    group.add_argument("--sft-flags", default="", metavar="TEXT", help="more flags of sft.py, as one string")
    group = parser.add_argument_group("run")
    add_offline_teacher_flag(group)
    group.add_argument("--output-dir", help="run folder (default: runs/evolve-TIME)")
    group.add_argument(
        "--resume", metavar="RUN_FOLDER", help="continue a stopped run with its own flags; others are refused or named"
    )
    group.add_argument("--dry-run", action="store_true", help="print upper bounds on calls and tokens; send nothing")
    group.add_argument("--seed", type=SEED, default=0, help="of everything random but the teachers")
    return parser


def parse_evolve_args(description: str | None) -> argparse.Namespace:
    """The flags of the command line, or of the run that --resume names."""
    parser = evolve_parser(description)
    args = parser.parse_args()
    args.endpoint = args.instructor_endpoint = args.reviewer_endpoint = None  # the cache's names of moved endpoints
    if args.resume:
        urls = {"endpoint": "teacher_url", **{f"{role}_endpoint": f"{role}_url" for role in ROLES}}
        return resumed_args(args, parser, FREE, urls)
    if args.control is None:
        args.control = not (args.teacher_url or args.instructor_url or args.reviewer_url)
    if not (
        args.teacher_url or args.instructions or args.answers or args.answer or args.verifier or args.reviewer_score
    ):
        args.answers, args.answer = OFFLINE_ANSWERS, "number"
    return args


def evolve_settings(args: argparse.Namespace) -> EvolveSettings:
    """The settings of the flags. Raises UserError for invalid values, before anything is started."""
    for role in ("teacher", *ROLES):
        url, model = getattr(args, f"{role}_url"), getattr(args, f"{role}_model")
        if bool(url) != bool(model):
            raise UserError(f"--{role}-url is {url} and --{role}-model {model}; give both or neither")
    teacher = checked_teacher(args)
    settings = EvolveSettings(
        teacher,
        role_settings(args, teacher, "instructor"),
        role_settings(args, teacher, "reviewer"),
        EVOL_GATES if args.without_policy == "evol" else Gates(args.near_duplicates, args.shortest, args.longest),
        Weights(args.novelty_weight, args.difficulty_weight, args.growth_weight),
        difficulty_settings(args),
        Training(args.iterations, args.starts, args.group, args.seed, args.chains),
        PolicySettings(floor=args.floor, gamma=args.gamma, learning_rate=args.learning_rate, seed=args.seed),
        args.policy,
        args.policy_path,
        args.rounds,
        args.chains,
        bool(args.control),
        args.format,
        args.held_out,
        args.sft,
        args.base_model,
        args.sft_flags,
        args.seed,
        load_operators(args.operators) if args.operators else OWN,
        args.reviewer_score,
        args.without_policy,
    )
    known = (*LEARNERS, "uniform", *settings.operators.actions[:-1])
    if args.policy not in known:
        raise UserError(f"--policy is {args.policy!r}; use one of {', '.join(known)}")
    settings.initial_policy()  # a policy_path that holds none is found now
    return settings


def role_settings(args: argparse.Namespace, teacher: TeacherSettings, role: str) -> TeacherSettings | None:
    """An endpoint of its own for a role, if it is given: with a cache of its own, and without the teacher's prices."""
    url = getattr(args, f"{role}_url")
    if not url:
        return None
    own = replace(teacher, cache=None, max_money=None, price_in=0.0, price_out=0.0)
    model, endpoint = getattr(args, f"{role}_model"), getattr(args, f"{role}_endpoint")
    own = replace(own, teacher_url=url, teacher_model=model, endpoint=endpoint)
    own.check()
    return own


def difficulty_settings(args: argparse.Namespace) -> Difficulty:
    """How pass rates are found. --answer is a type's name, or has options: {type: choice, choices: [A, B]}."""
    return Difficulty(
        args.answers,
        answer_from_flag(args.answer) if args.answer else None,
        load_reward_function(args.verifier) if args.verifier else None,
        args.answer_tokens,
        args.teacher_temperature,
    )


def instructions_from(args: argparse.Namespace) -> list[str]:
    """The initial instructions. Raises UserError if the offline teacher does not know one of them."""
    if args.instructions is None:
        if args.teacher_url:
            raise UserError("no instructions to start from; give --instructions FILE, one a line")
        return starting(args.count, args.seed)
    found = read_instructions(args.instructions)
    unknown = next((text for text in found if read_sum(text) is None), None)
    if not args.teacher_url and unknown is not None:
        raise UserError(
            f"the offline teacher knows sums in words only, not {unknown!r:.60}; give --teacher-url and --teacher-model"
        )
    return found
