"""Write rows of instructions with constraints that a program can check, and replies that satisfy them.

    python -m data.generate_constraint_data --output-dir data/constraints
    python -m data.generate_constraint_data --output-dir data/short --kinds sentence count lower upper

    train.jsonl, valid.jsonl, test.jsonl                {"messages": [user, assistant], "answer": constraints as JSON}
    pairs_train.jsonl, pairs_valid.jsonl, pairs_test.jsonl     {"messages": [user], "chosen", "rejected"}

The first serve SFT as they are and PPO as `--prompts FILE --answer constraints`, the pairs reward models and DPO. No
subject and no wording is in two of the three splits. The rule is data/constraints.py.
"""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # When this file is run as a script, Python searches its folder; the packages are one level up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import common  # noqa: F401  so that Ctrl-C while numpy is imported is one line

import numpy as np

from common import ranges
from common.cli import run
from common.errors import UserError
from common.files import atomic_file
from common.parser import Parser
from data.constraints import Constraints
from data.subjects import SUBJECTS, Subject

SPLITS = ("train", "valid", "test")
SHARES = {"train": slice(0, 32), "valid": slice(32, 38), "test": slice(38, 48)}  # of SUBJECTS
ASKING = {
    "train": (
        "Tell me about {}.",
        "Describe {}.",
        "What is {}?",
        "Write something about {}.",
        "What do you know about {}?",
        "Define {}.",
        "Inform me about {}.",
        "What can be said about {}?",
    ),
    "valid": ("Say what {} is.", "I would like to know about {}."),
    "test": ("Explain to a child what {} is.", "Give me a few facts about {}."),
}


class Kind(NamedTuple):
    """One kind of constraint: how it is asked for in each split, and what it is for a subject."""

    wordings: dict[str, tuple[str, ...]]
    draw: Callable[[np.random.Generator, Subject], dict[str, Any]]  # → fields of Constraints


def _words(*train: str, valid: tuple[str, ...], test: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {"train": train, "valid": valid, "test": test}


def _included(rng: np.random.Generator, subject: Subject) -> dict[str, Any]:
    """A word of one fact, and one of another that must not occur."""
    first, second = rng.permutation(3)[:2]
    return {"include": (subject.facts[first].split()[-1],), "exclude": (subject.facts[second].split()[-1],)}


NAMES, NOTES = ["name", "subject", "topic"], ["fact", "note"]  # keys of JSON objects
ENDINGS = ["That is all.", "I hope this helps.", "Thank you for asking."]
KINDS = {
    "sentence": Kind(
        _words(
            "Answer in one sentence of at most {max_words} words.",
            "Use a single sentence, {max_words} words or fewer.",
            "Write one sentence and no more than {max_words} words.",
            "A single sentence with up to {max_words} words will do.",
            "Your answer is one sentence; it may have {max_words} words at most.",
            "Give me just one sentence, not over {max_words} words.",
            valid=("One sentence only, no longer than {max_words} words.",),
            test=(
                "Keep it to one sentence with a maximum of {max_words} words.",
                "Stay within one sentence and {max_words} words.",
            ),
        ),
        lambda rng, subject: {"sentences": 1, "max_words": int(rng.integers(14, 20))},
    ),
    "count": Kind(
        _words(
            "Answer in exactly {sentences} sentences.",
            "Use {sentences} sentences, no more and no fewer.",
            "Your answer is {sentences} sentences long.",
            "Reply with {sentences} sentences.",
            "I want {sentences} sentences, not one more.",
            "Make it {sentences} sentences in all.",
            valid=("Your reply has to have {sentences} sentences.",),
            test=("Write precisely {sentences} sentences.", "Take {sentences} sentences for it."),
        ),
        lambda rng, subject: {"sentences": int(rng.integers(2, 4))},
    ),
    "lower": Kind(
        _words(
            "Use only lowercase letters.",
            "Write everything in lowercase.",
            "Your answer has no uppercase letters.",
            "All of it is in small letters.",
            "Do not capitalize anything.",
            "Reply in lowercase, from the first letter on.",
            valid=("No capital letters at all.",),
            test=("Every letter must be small.", "Avoid capital letters."),
        ),
        lambda rng, subject: {"case": "lower"},
    ),
    "upper": Kind(
        _words(
            "Use only capital letters.",
            "Write everything in uppercase.",
            "Your answer has no lowercase letters.",
            "All of it is in capitals.",
            "Capitalize every letter of every word.",
            "Reply in uppercase, to the last letter.",
            valid=("No lowercase letters at all.",),
            test=("Every letter must be a capital.", "Avoid small letters."),
        ),
        lambda rng, subject: {"case": "upper"},
    ),
    "words": Kind(
        _words(
            'Mention "{include}" and do not mention "{exclude}".',
            'Use the word "{include}" but not "{exclude}".',
            'Your answer contains "{include}"; it does not contain "{exclude}".',
            'Say "{include}", and never say "{exclude}".',
            'Include "{include}" and leave out "{exclude}".',
            'Do not write "{exclude}", but do write "{include}".',
            valid=('It has to contain "{include}" and must not contain "{exclude}".',),
            test=(
                'The word "{include}" should appear, while "{exclude}" should not.',
                'Work "{include}" in, and avoid "{exclude}".',
            ),
        ),
        _included,
    ),
    "bullets": Kind(
        _words(
            "Answer as a list of {bullets} bullet points.",
            "Give {bullets} bullet points and nothing else.",
            "Your answer is a list with {bullets} bullets.",
            "Use {bullets} bullet points.",
            "Put it into {bullets} points, each after a dash.",
            "Write a bulleted list of {bullets} items.",
            valid=("Format your reply as {bullets} bullets.",),
            test=("List {bullets} points, one bullet each.", "Break it into {bullets} bulleted points."),
        ),
        lambda rng, subject: {"bullets": int(rng.integers(2, 4))},
    ),
    "json": Kind(
        _words(
            "Answer in JSON with the keys {json_keys}.",
            "Reply with a JSON object that has the keys {json_keys}.",
            "Give a JSON object; its two keys are {json_keys}.",
            "Use JSON, and the keys {json_keys}.",
            "Your answer is one JSON object with {json_keys} as its keys.",
            "Write it as JSON whose fields are {json_keys}.",
            valid=("Your reply is a JSON object; its keys are {json_keys}.",),
            test=("Return JSON whose keys are {json_keys}.", "Format it as a JSON object of {json_keys}."),
        ),
        lambda rng, subject: {"json_keys": (str(rng.choice(NAMES)), str(rng.choice(NOTES)))},
    ),
    "ending": Kind(
        _words(
            'End with "{ending}"',
            'Your last words must be "{ending}"',
            'The final words are "{ending}"',
            'At the end, write "{ending}"',
            'After your answer, add "{ending}"',
            'Your answer stops after the words "{ending}"',
            valid=('Finish your reply by saying "{ending}"',),
            test=('Close with the words "{ending}"', 'Let it end in "{ending}"'),
        ),
        lambda rng, subject: {"ending": str(rng.choice(ENDINGS))},
    ),
}
# Kinds that go together.
COMBINATIONS = [
    *(("sentence",), ("count",), ("words",), ("bullets",), ("json",), ("sentence", "lower"), ("sentence", "upper")),
    *(("count", "lower"), ("words", "sentence"), ("bullets", "lower"), ("count", "ending"), ("words", "ending")),
]
ALONE = [combination[0] for combination in COMBINATIONS if len(combination) == 1]
MISSES = 1000  # instructions in a row that were there already, until it is thought that there are no more


class Row(NamedTuple):
    """An instruction, its constraints, a reply that satisfies them and one that does not."""

    prompt: str
    constraints: Constraints
    chosen: str
    rejected: str


def combinations_of(kinds: Collection[str]) -> list[tuple[str, ...]]:
    """Those that have no other kinds. Raises UserError where there are none."""
    found = [combination for combination in COMBINATIONS if set(kinds).issuperset(combination)]
    if not found:
        raise UserError(f"--kinds {' '.join(kinds)} asks for nothing by itself; add {' or '.join(ALONE)}")
    return found


def draw_row(rng: np.random.Generator, split: str, combinations: Sequence[tuple[str, ...]] = COMBINATIONS) -> Row:
    """One row of a split, of one of the combinations of kinds."""
    subject = SUBJECTS[SHARES[split]][int(rng.integers(len(SUBJECTS[SHARES[split]])))]
    asking = str(rng.choice(ASKING[split])).format(subject.name)
    constraints, wordings = draw_constraints(rng, split, subject, combinations)
    chosen = reply(rng, subject, constraints)
    return Row(" ".join([asking, *wordings]), constraints, chosen, spoilt(rng, subject, constraints))


def draw_constraints(
    rng: np.random.Generator, split: str, subject: Subject, combinations: Sequence[tuple[str, ...]] = COMBINATIONS
) -> tuple[Constraints, list[str]]:
    """One combination of constraints for a subject, and how a split asks for them."""
    given: dict[str, Any] = {}
    wordings = []
    for name in combinations[int(rng.integers(len(combinations)))]:
        kind = KINDS[name]
        fields = kind.draw(rng, subject)
        named = {field: " and ".join(f"{v}" for v in value) if isinstance(value, tuple) else value
                 for field, value in fields.items()}  # fmt: skip
        wordings.append(str(rng.choice(kind.wordings[split])).format(**named))
        given |= fields
    return Constraints(**given), wordings


def reply(rng: np.random.Generator, subject: Subject, constraints: Constraints) -> str:
    """A reply that satisfies the constraints, put together from the subject's facts."""
    facts = [subject.facts[i] for i in rng.permutation(3)]
    if constraints.include:  # the fact with the word first; the one with the other word not at all
        facts = [f for f in facts if f.split()[-1] not in constraints.exclude]
        facts.sort(key=lambda fact: fact.split()[-1] not in constraints.include)
    opening = f"{subject.name.capitalize()} is {subject.kind} that {facts[0]}."
    if constraints.json_keys:
        first, second = constraints.json_keys
        return json.dumps({first: subject.word, second: f"It {facts[0]}."})
    if constraints.bullets:
        text = "\n".join(f"- It {fact}." for fact in facts[: constraints.bullets])
    else:
        more = [f"It {fact}." for fact in facts[1:]]
        count = (constraints.sentences or 2) - 1 - bool(constraints.ending)
        text = " ".join([opening, *more[: max(count, 0)], *([constraints.ending] if constraints.ending else [])])
    return {"lower": text.lower(), "upper": text.upper()}.get(constraints.case or "", text)


def spoilt(rng: np.random.Generator, subject: Subject, constraints: Constraints) -> str:
    """A reply about the same subject that misses some of the constraints: one to others, or one to none."""
    other = reply(rng, subject, draw_constraints(rng, "train", subject)[0])
    if rng.random() < 0.5 and constraints.score(other) < 1:
        return other
    facts = [subject.facts[i] for i in rng.permutation(3)]
    opening = f"{subject.name.capitalize()} is {subject.kind}."
    return " ".join([opening, *(f"It {fact}." for fact in facts), "There is more to say about it, of course."])


def draw_split(split: str, count: int, seed: int, kinds: Collection[str] = KINDS) -> list[Row]:
    """`count` rows of a split, or as many as there are, without the same instruction twice."""
    combinations = combinations_of(kinds)
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    rows: dict[str, Row] = {}
    misses = 0
    while len(rows) < count and misses <= MISSES:
        row = draw_row(rng, split, combinations)
        misses = misses + 1 if row.prompt in rows else 0
        rows.setdefault(row.prompt, row)
    return list(rows.values())


def write_split(folder: Path, split: str, rows: Sequence[Row]) -> None:
    """Write the two files of a split."""
    turns = [[{"role": "user", "content": row.prompt}] for row in rows]
    replies = [[{"role": "assistant", "content": row.chosen}] for row in rows]
    write_rows(folder / f"{split}.jsonl", [
        {"messages": asked + said, "answer": row.constraints.to_json()}
        for asked, said, row in zip(turns, replies, rows, strict=True)
    ])  # fmt: skip
    write_rows(folder / f"pairs_{split}.jsonl", [
        {"messages": asked, "chosen": row.chosen, "rejected": row.rejected}
        for asked, row in zip(turns, rows, strict=True)
    ])  # fmt: skip


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--num-samples",
        type=ranges.COUNT,
        default=600,
        help="rows of train; valid and test have a sixth, if there are so many",
    )
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), help="only these kinds of constraints")
    parser.add_argument("--output-dir", type=Path, default=Path("data/constraints"), help="folder to write to")
    parser.add_argument("--seed", type=ranges.SEED, default=0, help="random seed")
    args = parser.parse_args()
    return args


def main() -> None:
    args = parse_args()
    kinds, fewer = args.kinds or KINDS, -(-args.num_samples // 6)
    counts = {"train": args.num_samples, "valid": fewer, "test": fewer}
    drawn = {split: draw_split(split, count, args.seed, kinds) for split, count in counts.items()}
    if len(drawn["train"]) < args.num_samples:
        what = f"--kinds {' '.join(kinds)} have about {len(drawn['train']):,} instructions in train"
        raise UserError(f"{what}; ask for fewer --num-samples, or for more kinds")
    for split, rows in drawn.items():
        write_split(args.output_dir, split, rows)
    written = ", ".join(f"{len(rows)} rows of {split}" for split, rows in drawn.items())
    print(f"{args.output_dir}: {written}, and as many pairs")


if __name__ == "__main__":
    run(main)
