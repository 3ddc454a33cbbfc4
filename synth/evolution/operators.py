"""The six ways to evolve an instruction, and stop: what each one asks, and how the answer is read.

The six are those of Evol-Instruct and TeaMs-RL (arXiv:2304.12244, arXiv:2403.08694); the prompts are our own
(synth/prompts.py).
"""

from synth import prompts
from synth.teacher.asking import Asking
from synth.teacher.completions import Ask, Reply

OPERATORS = tuple(prompts.OPERATOR_DEMANDS)
STOP = "stop"
ACTIONS = (*OPERATORS, STOP)


def rewriting(operator: str, instruction: str, asking: Asking, sample: int, stage: str) -> Ask:
    """The question for `instruction` evolved by `operator`. sample: index of the draw; stage: the ledger's.

    Raises KeyError for STOP, which asks nothing.
    """
    messages = prompts.rewrite(operator, instruction)
    return Ask(messages, prompts.Instruction, asking.temperature, asking.max_tokens, sample, stage)


def read_rewriting(reply: Reply) -> tuple[str, str, str]:
    """(instruction, "", ""), or ("", reason, detail) if there is none."""
    if reply.status != "ok":
        return "", f"no instruction: {reply.status}", reply.reason
    return reply.parsed.instruction, "", ""
