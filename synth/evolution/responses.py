"""Fresh responses to evolved instructions, and the data set that sft.py is trained on.

Every instruction is asked as it will stand in the data; a parent's response is never taken over. Dropped are Evol-
Instruct's two: a short apology, and a response of nothing but stop words and signs (arXiv:2304.12244, section 3.2.3).
Leaves out whether a response is right.

    python -m pytest tests/test_evolve.py -k "response or data"
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synth import prompts
from synth.evolution.judge import STOP_WORDS
from synth.near_duplicates import tokens
from synth.stages import StageRow, drop, write_rows
from synth.teacher.asking import Asker, Asking, ask_all
from synth.teacher.completions import Ask
from synth.teacher.structured import is_refusal

FORMATS = ("messages", "alpaca", "prompt")
SHORT_APOLOGY = 80  # words, below which a response that says sorry counts as one


def response_fault(text: str) -> str:
    """Why a response is of no use; "" if it is."""
    words = tokens(text)
    if is_refusal(text) or ("sorry" in words and len(text.split()) < SHORT_APOLOGY):
        return "apology"
    if all(word in STOP_WORDS or not word.isalnum() for word in words):
        return "response of stop words"
    return ""


async def respond(rows: Sequence[StageRow], expert: Asker, asking: Asking, sample: int = 0) -> list[StageRow]:
    """The rows with the expert's response as "output", dropped where there is none of use.

    sample: the number of the draw, after those that a pass rate was found by where the same teacher gave them.
    """
    asks = [
        Ask(prompts.respond(row["input"]), None, asking.temperature, asking.max_tokens, sample, "respond")
        for row in rows
    ]
    answered = []
    for row, reply in zip(rows, await ask_all(expert, asks, "respond"), strict=True):
        reason = response_fault(reply.text) if reply.status == "ok" else f"no response: {reply.status}"
        row = {**row, "output": reply.text.strip()}
        answered.append(drop(row, reason, reply.reason) if reason else row)
    return answered


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

    What one initial instruction led to stands on one side of the split, as its rows are alike. Alpaca's rows are
    prompts and completions there. Returns the data set's path.
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
