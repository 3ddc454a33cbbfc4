"""The worked example of TeaMs-RL's README (photosynthesis, "add constraints"), from instruction to SFT row."""

import asyncio
import json
from pathlib import Path

from synth import prompts
from synth.evolution import operators as module
from synth.evolution.chains import Chain, Evolution, root_rows
from synth.evolution.features import SIZE
from synth.evolution.judge import Judge, Pool
from synth.evolution.operators import changed_words, load_operators
from synth.evolution.policy import fixed
from synth.evolution.responses import respond, write_data
from synth.stages import kept
from synth.teacher.asking import Asking
from tests.scripted_teacher import ScriptedTeacher, said, section

GIVEN = "Describe the process of photosynthesis."
EVOLVED = (
    "Describe the process of photosynthesis in plants and explain how it varies in different environmental conditions."
)
RESPONSE = "Plants turn light, water and carbon dioxide into sugar and oxygen; shade, drought and cold slow it down."
# The action prompt, sentence by sentence, as the README prints it.
PROMPT = """I want you to act as a Prompt Rewriter.
Your objective is to rewrite the given prompt into a more complex version to make it more challenging for AI systems like ChatGPT and GPT-4.
Ensure that the rewritten prompt remains reasonable, understandable, and suitable for human response.
Do not omit any non-text parts such as tables or code in the given prompt.
Do not repeat conditions or requirements in your response, and do not disclose your role.
Provide only the rewritten prompt without any introduction or explanation.
The new prompt should not exceed 2048 words.
You should complicate the given prompt by adding one more constraint or requirement.
Try not to make the rewritten prompt verbose; you can only add or replace 10 to 20 words in the given prompt.
Do not include phrases like 'Given Prompt' or 'Rewritten Prompt' in your response.
Given Prompt:""".splitlines()  # noqa: E501


def script(ask):
    if ask.schema is prompts.Instruction:
        return said("{}", parsed=prompts.Instruction(instruction=EVOLVED))
    if ask.schema is prompts.Verdict:
        return said("{}", parsed=prompts.Verdict(equal=False))
    return said("{}", parsed=prompts.Score(score=6)) if ask.schema is prompts.Score else said(RESPONSE)


def test_photosynthesis_from_the_instruction_to_the_row(tmp_path):
    operators = load_operators(Path(module.__file__).with_name("teams_rl.yaml"))
    chosen = operators.actions.index("constraints")
    policy = fixed(chosen, len(operators.actions), SIZE, operators.actions)
    teacher = ScriptedTeacher(script)
    judge = Judge(teacher, teacher, scores=True)
    evolution = Evolution(teacher, judge, rounds=1, operators=operators)

    async def made():
        (root,) = await root_rows([GIVEN], judge, "evolve")
        rows = await evolution.run([Chain(0, root, Pool([GIVEN]))], policy)
        return rows, await respond(kept(rows), teacher, Asking())

    (row,), answered = asyncio.run(made())
    (asked,) = [ask for ask in teacher.asked if ask.schema is prompts.Instruction]
    lines = [line for line in asked.messages[1]["content"].splitlines() if line.strip()]
    assert lines[: len(PROMPT)] == PROMPT and section(asked, "instruction") == GIVEN
    assert (row["operator"], row["input"], row["reward"]) == ("constraints", EVOLVED, 0.6)
    assert changed_words(EVOLVED, GIVEN) == 11  # "approximately 12", within 10 to 20
    write_data(answered, "messages", tmp_path, 0.0, 0)
    (written,) = (tmp_path / "sft" / "train.jsonl").read_text().splitlines()
    turns = [{"role": "user", "content": EVOLVED}, {"role": "assistant", "content": RESPONSE}]
    assert json.loads(written) == {"messages": turns}
