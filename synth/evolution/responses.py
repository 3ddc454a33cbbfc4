"""Fresh responses to evolved instructions, and the dataset that sft.py is trained on.

Every instruction is asked exactly as it appears in the data; a parent's response is never reused. Dropped are, as in
Evol-Instruct, short apologies and responses of only stop words and punctuation (arXiv:2304.12244, section 3.2.3).
Whether a response is correct is not checked.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synth import prompts
from synth.evolution.judge import STOP_WORDS
from synth.near_duplicates import tokens
from synth.stages import StageRow, drop, write_rows
from synth.teacher.asking import Asker, Asking, ask_each
from synth.teacher.completions import Ask, Reply
from synth.teacher.structured import is_refusal

FORMATS = ("messages", "alpaca", "prompt")
SHORT_APOLOGY = 80  # words; a shorter response that says sorry counts as an apology


def response_fault(text: str) -> str:
    """Why a response is unusable; "" if it is usable."""
    words = tokens(text)
    if is_refusal(text) or ("sorry" in words and len(text.split()) < SHORT_APOLOGY):
        return "apology"
    if all(word in STOP_WORDS or not word.isalnum() for word in words):
        return "response of stop words"
    return ""


async def respond(rows: Sequence[StageRow], expert: Asker, asking: Asking, sample: int = 0) -> list[StageRow]:
    """The rows with the expert's response as "output"; dropped if there is no usable one.

    sample: index of the draw, after the answers for pass rates, which the same teacher may have given.
    """
    asks = (
        Ask(prompts.respond(row["input"]), None, asking.temperature, asking.max_tokens, sample, "respond")
        for row in rows
    )
    answered: dict[int, StageRow] = {}

    def take(number: int, reply: Reply) -> None:
        reason = response_fault(reply.text) if reply.status == "ok" else f"no response: {reply.status}"
        row = {**rows[number], "output": reply.text.strip()}
        answered[number] = drop(row, reason, reply.reason) if reason else row

    await ask_each(expert, asks, len(rows), "respond", take)
    return [answered[number] for number in range(len(rows))]


def data_row(row: StageRow, form: str) -> dict[str, Any]:
    """A kept row in one of FORMATS: {"messages"}, Alpaca's three keys, or {"prompt", "completion"}."""
    if form == "messages":
        turns = (("user", row["input"]), ("assistant", row["output"]))
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    if form == "alpaca":
        return {"instruction": row["input"], "input": "", "output": row["output"]}
    space = "" if row["input"][-1:].isspace() else " "
    return {"prompt": row["input"], "completion": space + row["output"]}


def write_data(rows: Sequence[StageRow], form: str, folder: Path, held_out: float, seed: int) -> Path:
    """Write FOLDER/dataset.jsonl, and for sft.py FOLDER/sft/train.jsonl and valid.jsonl, by initial instruction.

    All rows from one initial instruction are on the same side of the split, as they are alike. For sft.py Alpaca rows
    become prompts and completions. Returns the dataset's path.
    """
    roots = sorted({row["root"] for row in rows})
    drawn = set(random.Random(f"{seed} held out").sample(roots, round(held_out * len(roots))))
    for_sft = "prompt" if form == "alpaca" else form
    train, valid = (
        [data_row(row, for_sft) for row in rows if (row["root"] in drawn) == side] for side in (False, True)
    )
    write_rows(folder / "dataset.jsonl", [data_row(row, form) for row in rows])
    write_rows(folder / "sft" / "train.jsonl", train)
    write_rows(folder / "sft" / "valid.jsonl", valid or train)
    return folder / "dataset.jsonl"
