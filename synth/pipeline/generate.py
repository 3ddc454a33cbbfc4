"""Stages 1 and 2: keywords and passages, the pattern of the demos, and new samples written by the teacher.

Each sample is drawn from one passage and records its id; without a library there is none. Outputs that the task's
reader cannot read are dropped, as are answers that hold no sample. A task with its own source takes its rows from
there. Whether outputs are right is for synth/pipeline/verify.py.

    python -m synth.pipeline.generate --task my_task.yaml --count 500 --teacher-url URL --teacher-model NAME \\
        --out new.jsonl
    python -m synth.pipeline.generate --only-passages ...       stage 1 alone
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import run
from common.errors import UserError
from common.files import check_file
from common.parser import Parser, positive
from common.ranges import COUNT, SEED
from rewards.answers import AnswerType
from synth import prompts
from synth.pipeline.retrieval import Index, Passage, build_index
from synth.pipeline.tasks import open_task
from synth.stages import StageRow, drop, kept, new_row, summary, write_rows
from synth.task import Task
from synth.teacher.asking import DEFAULT, Asker, Asking, ask_all, ask_each
from synth.teacher.completions import Ask, Reply
from synth.teacher.connect import open_teacher
from synth.teacher.flags import add_teacher_flags, teacher_settings


def open_library(task: Task, folder: str | Path, extra: Sequence[str | Path] = ()) -> Index | None:
    """The index of the task's library, its passages and `extra` paths, kept in FOLDER/index; None if there are none."""
    library = [*task.write_library(folder), *map(Path, extra)]
    return build_index(library, Path(folder) / "index") if library else None


def passage_texts(rows: Iterable[StageRow], index: Index | None) -> dict[str, str]:
    """Passage id → text, for the passages that the rows were drawn from. Raises UserError for a missing one."""
    ids = {row["passage"] for row in rows if row["passage"] is not None}
    return {row_id: index.passage(row_id).text for row_id in ids} if index is not None else {}


async def find_passages(
    task: Task, teacher: Asker, index: Index, count: int, asking: Asking = DEFAULT
) -> tuple[list[str], list[Passage]]:
    """The teacher's keywords, and the `count` best passages for them.

    If the teacher names none, or none that occurs in the library, the instruction is the query.
    """
    ask = Ask(prompts.keywords(task), prompts.Keywords, asking.temperature, asking.max_tokens, stage="keywords")
    reply = (await ask_all(teacher, [ask], "keywords"))[0]
    keywords = list(reply.parsed.keywords) if reply.status == "ok" else []
    passages = index.search(keywords, top_k=count) if keywords else []
    if not passages:
        why = reply.reason or reply.status if not keywords else "none of them occurs in the library"
        print(f"keywords: not usable ({why}); searching for the task's instruction", flush=True)
        keywords = [task.instruction]
        passages = index.search(keywords, top_k=count)
    if not passages:
        raise UserError(f"no passage of the library has a word of the task {task.name}; give another, or --no-library")
    repeated = f" ({index.repeated} near-duplicates skipped)" if index.repeated else ""
    print(f"passages: {len(passages)} of {len(index)}{repeated} for {', '.join(keywords):.200}", flush=True)
    return keywords, passages


async def summarise_pattern(task: Task, teacher: Asker, asking: Asking = DEFAULT) -> str | None:
    """What the task's demos have in common; None without demos, or if the teacher gives no answer."""
    if not task.demos:
        return None
    ask = Ask(prompts.pattern(task), prompts.Pattern, asking.temperature, asking.max_tokens, stage="pattern")
    reply = (await ask_all(teacher, [ask], "pattern"))[0]
    if reply.status != "ok":
        print(f"pattern: none ({reply.reason or reply.status}); the teacher sees the demos only", flush=True)
        return None
    return reply.parsed.summary


async def generate(
    task: Task, teacher: Asker, count: int, index: Index | None = None, asking: Asking = DEFAULT
) -> list[StageRow]:
    """`count` rows, dropped ones included. Passages are used in turn, best first; index None: no library."""
    passages: list[Passage] = []
    if index is not None:
        _, passages = await find_passages(task, teacher, index, count, asking)
    pattern = await summarise_pattern(task, teacher, asking)
    drawn = [passages[n % len(passages)] if passages else None for n in range(count)]
    asks = (
        Ask(
            prompts.new_sample(task, pattern, passage.text if passage else None, number),
            prompts.NewSample,
            asking.temperature,
            asking.max_tokens,
            sample=number,
            stage="generate",
        )
        for number, passage in enumerate(drawn, 1)
    )
    rows: dict[int, StageRow] = {}

    def take(index: int, reply: Reply) -> None:
        passage = drawn[index]
        row = new_row(f"g{index + 1}", "", "", "generated", passage=passage.id if passage else None)
        rows[index] = read_sample(row, reply, task)

    await ask_each(teacher, asks, count, "generate", take)
    return [rows[index] for index in range(count)]


def source_rows(task: Task, count: int, seed: int) -> list[StageRow]:
    """`count` rows of the task's own source, which needs no teacher. Raises UserError if it has fewer."""
    assert task.source is not None, "a task without a source is generated"
    rows = task.source(count, seed)
    return [new_row(f"g{number}", row["input"], row["output"], "generated") for number, row in enumerate(rows, 1)]


def read_sample(row: StageRow, reply: Reply, task: Task) -> StageRow:
    """The row with input and output of a NewSample; dropped if there is none, or its output cannot be read.

    If a reward scores the task, the output is only an example and is kept as it is.
    """
    if reply.status != "ok":
        return drop(row, f"no sample: {reply.status}", reply.reason)
    row = {**row, "input": reply.parsed.input, "output": reply.parsed.output}
    if task.answer is None:
        return row
    found = read_output(task.answer, row["output"])
    return drop(row, "unreadable output", row["output"][:200]) if found is None else {**row, "output": found}


def read_output(answer: AnswerType, text: str) -> str | None:
    """The answer in a teacher's output, normalised as votes are; None if unreadable.

    The output may be a bare answer or a whole completion.
    """
    found = answer.extract(text)
    if found is None and answer.readable(text):  # a bare answer, where the reader expects more around it
        found = answer.normalise(text)
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--task", required=True, help="a task's YAML file, or reasoning_gym:NAME")
    parser.add_argument("--out", required=True, metavar="FILE", help="the rows, dropped ones included")
    parser.add_argument("--count", type=COUNT, default=500, help="samples to ask for")
    parser.add_argument("--library", nargs="+", default=[], metavar="PATH", help="more files or folders to search")
    parser.add_argument("--no-library", action="store_true", help="use no passages")
    parser.add_argument("--only-passages", action="store_true", help="write the passages, not samples")
    parser.add_argument("--seed", type=SEED, default=0, help="of a task's own source")
    add_teacher_flags(parser)
    args = parser.parse_args()
    positive("count", args.count)
    task, settings = open_task(args.task), teacher_settings(args)
    settings.check()
    check_file(args.out)

    async def made() -> list[StageRow]:
        if task.source is not None:
            return source_rows(task, args.count, args.seed)
        index = None if args.no_library else open_library(task, Path(args.out).parent, args.library)
        if args.only_passages and index is None:
            raise UserError("--only-passages needs a library; give --library, or a task that names one")
        async with open_teacher(settings) as teacher:
            if index is not None and args.only_passages:
                keywords, passages = await find_passages(task, teacher, index, args.count, settings.asking)
                return [{**passage._asdict(), "keywords": keywords} for passage in passages]
            return await generate(task, teacher, args.count, index, settings.asking)

    rows = asyncio.run(made())
    write_rows(args.out, rows)
    print(f"{summary('passages' if args.only_passages else 'generate', rows)}\n{args.out}")
    if rows and not kept(rows):
        reason = Counter(row["detail"] for row in rows).most_common(1)[0][0]
        raise UserError(f"no sample came of {len(rows)} requests ({reason}); {args.out} says why for each")


if __name__ == "__main__":
    run(main)
