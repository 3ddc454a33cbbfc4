"""Stages 1 and 2: keywords and passages, the pattern of the demos, and new samples written by the teacher.

Each sample is drawn from one passage, which it remembers; without a library there is none. An output that the task's
reader cannot read is dropped, and so is every answer that is no sample. A task with a source of its own takes its
rows from there. Leaves out whether the outputs are right (synth/pipeline/verify.py).

    python -m synth.pipeline.generate --task my_task.yaml --count 500 --teacher-url URL --teacher-model NAME --out
    new.jsonl python -m synth.pipeline.generate --only-passages ...                    stage 1 alone
"""

import asyncio
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import run
from common.errors import UserError
from common.parser import Parser, positive
from rewards.answers import AnswerType
from synth import prompts
from synth.pipeline.retrieval import Index, Passage, build_index
from synth.stages import Asker, Row, ask_all, drop, new_row, summary, write_rows
from synth.task import Task, load_task
from synth.teacher.completions import Ask, Reply
from synth.teacher.flags import add_teacher_flags, open_teacher


@dataclass(frozen=True)
class Asking:
    """How a teacher is asked for samples. max_tokens: of one answer."""

    temperature: float = 1.0
    max_tokens: int = 1024


def open_library(task: Task, folder: str | Path, extra: Sequence[str | Path] = ()) -> Index | None:
    """The index of the task's library, its passages and `extra` paths, kept in FOLDER/index; None if there are none."""
    library = [*task.write_library(folder), *map(Path, extra)]
    return build_index(library, Path(folder) / "index", progress=sys.stderr.isatty()) if library else None


def passage_texts(rows: Iterable[Row], index: Index | None) -> dict[str, str]:
    """Passage id → text, of those that the rows were drawn from. Raises UserError where the library lacks one."""
    ids = {row["passage"] for row in rows if row["passage"] is not None}
    return {row_id: index.passage(row_id).text for row_id in ids} if index is not None else {}


async def find_passages(
    task: Task, teacher: Asker, index: Index, count: int, asking: Asking = Asking()
) -> tuple[list[str], list[Passage]]:
    """The teacher's keywords, and the `count` best passages for them.

    Where the teacher names none, or none that the library knows, the instruction is the query.
    """
    ask = Ask(prompts.keywords(task), prompts.Keywords, asking.temperature, asking.max_tokens, stage="keywords")
    reply = (await ask_all(teacher, [ask], "keywords"))[0]
    keywords = list(reply.parsed.keywords) if reply.status == "ok" else []
    passages = index.search(keywords, top_k=count) if keywords else []
    if not passages:
        why = reply.reason or reply.status if not keywords else "the library has none of its words"
        print(f"keywords: none that serve ({why}); the task's instruction is searched for", flush=True)
        keywords = [task.instruction]
        passages = index.search(keywords, top_k=count)
    if not passages:
        raise UserError(f"no passage of the library has a word of the task {task.name}; give another, or --no-library")
    repeated = f" ({index.repeated} near-duplicates left out)" if index.repeated else ""
    print(f"passages: {len(passages)} of {len(index)}{repeated} for {', '.join(keywords):.200}", flush=True)
    return keywords, passages


async def summarise_pattern(task: Task, teacher: Asker, asking: Asking = Asking()) -> str | None:
    """What the task's demos have in common, or None: without demos, and where the teacher does not say."""
    if not task.demos:
        return None
    ask = Ask(prompts.pattern(task), prompts.Pattern, asking.temperature, asking.max_tokens, stage="pattern")
    reply = (await ask_all(teacher, [ask], "pattern"))[0]
    if reply.status != "ok":
        print(f"pattern: none ({reply.reason or reply.status}); the demos stand alone", flush=True)
        return None
    return reply.parsed.summary


async def generate(
    task: Task, teacher: Asker, count: int, index: Index | None = None, asking: Asking = Asking()
) -> list[Row]:
    """`count` rows, dropped ones included; the passages are used in turn, the best first. index: None, no library."""
    passages: list[Passage] = []
    if index is not None:
        _, passages = await find_passages(task, teacher, index, count, asking)
    pattern = await summarise_pattern(task, teacher, asking)
    drawn = [passages[n % len(passages)] if passages else None for n in range(count)]
    asks = [
        Ask(
            prompts.new_sample(task, pattern, passage.text if passage else None, number),
            prompts.NewSample,
            asking.temperature,
            asking.max_tokens,
            sample=number,
            stage="generate",
        )
        for number, passage in enumerate(drawn, 1)
    ]
    replies = await ask_all(teacher, asks, "generate")
    return [
        read_sample(new_row(f"g{number}", "", "", "generated", passage=passage.id if passage else None), reply, task)
        for number, (passage, reply) in enumerate(zip(drawn, replies, strict=True), 1)
    ]


def source_rows(task: Task, count: int, seed: int) -> list[Row]:
    """`count` rows of the task's own source, which needs no teacher. Raises UserError where it has fewer."""
    assert task.source is not None, "a task without a source is generated"
    rows = task.source(count, seed)
    return [new_row(f"g{number}", row["input"], row["output"], "generated") for number, row in enumerate(rows, 1)]


def read_sample(row: Row, reply: Reply, task: Task) -> Row:
    """The row with input and output of a NewSample; dropped where there is none, or its output cannot be read.

    Where a reward scores the task, its output is only an example and is kept as it is.
    """
    if reply.status != "ok":
        return drop(row, f"no sample: {reply.status}", reply.reason)
    row = {**row, "input": reply.parsed.input, "output": reply.parsed.output}
    if task.answer is None:
        return row
    found = read_output(task.answer, row["output"])
    return drop(row, "unreadable output", row["output"][:200]) if found is None else {**row, "output": found}


def read_output(answer: AnswerType, text: str) -> str | None:
    """The answer in a teacher's output as the vote's key: a bare answer or a whole completion. None: unreadable."""
    found = answer.extract(text)
    if found is None and answer.readable(text):  # a bare answer, where the reader looks for more than that
        found = answer.normalise(text)
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--task", required=True, help="a task's YAML file, or reasoning_gym:NAME")
    parser.add_argument("--out", required=True, metavar="FILE", help="the rows, dropped ones included")
    parser.add_argument("--count", type=int, default=500, help="samples to ask for")
    parser.add_argument("--library", nargs="+", default=[], metavar="PATH", help="more files or folders to search")
    parser.add_argument("--no-library", action="store_true", help="draw samples from no passages")
    parser.add_argument("--only-passages", action="store_true", help="write the passages that would be drawn from")
    parser.add_argument("--seed", type=int, default=0, help="of a task's own source")
    add_teacher_flags(parser)
    args = parser.parse_args()
    positive("count", args.count)
    task = load_task(args.task)
    asking = Asking(args.teacher_temperature, args.answer_tokens)

    async def made() -> list[Row]:
        if task.source is not None:
            return source_rows(task, args.count, args.seed)
        index = None if args.no_library else open_library(task, Path(args.out).parent, args.library)
        if args.only_passages and index is None:
            raise UserError("--only-passages needs a library; give --library, or a task that names one")
        async with open_teacher(args) as teacher:
            if index is not None and args.only_passages:
                keywords, passages = await find_passages(task, teacher, index, args.count, asking)
                return [{**passage._asdict(), "keywords": keywords} for passage in passages]
            return await generate(task, teacher, args.count, index, asking)

    rows = asyncio.run(made())
    write_rows(args.out, rows)
    print(f"{summary('passages' if args.only_passages else 'generate', rows)}\n{args.out}")


if __name__ == "__main__":
    run(main)
