"""From conversations to token ids: rendered by the model's own chat template, trained on the assistant's turns.

Every assistant turn is trained, including the token that ends it; template text and the turns of system, user and
tools are not. The tokens are the same as at inference. Some templates render an earlier turn differently from the last
one (dropping its reasoning, for example). Such a conversation becomes one example per assistant turn, each with the
context that the model would see at inference.

    python -m pytest tests/test_chat.py
"""

import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from common.errors import UserError
from data.batching import Example, Rendered, encode_prompt

Message = dict[str, Any]
Tools = list[Any] | None
LONGEST_RENDERING = 10.0  # seconds; a conversation takes milliseconds
LONGEST_TEXT = 20_000_000  # characters
MOST_MEMORY = 4 * 2**30  # bytes that a rendering may add, on Linux


def render(tokenizer: Any, messages: Sequence[Message], tools: Tools = None, reply: bool = False) -> Rendered:
    """The text of a conversation. reply: append the generation prompt for the assistant's next turn.

    Raises UserError if the tokenizer has no chat template or the template rejects the messages.
    """
    if not has_template(tokenizer):
        raise UserError(
            "the model's tokenizer has no chat template, so messages cannot be rendered; use a chat model, or rows of "
            '"prompt" and "completion" as text'
        )
    try:
        with _time_limit(), _memory_limit():
            text = tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=reply, tokenize=False
            )
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"its text has {len(text):,} characters")
        return Rendered(text)
    except Exception as error:  # noqa: BLE001  (a template is a program of the model's, and fails as programs do)
        cause = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"the model's chat template cannot render the messages ({cause}); fix them") from None


def has_template(tokenizer: Any) -> bool:
    """Whether the model was made for conversations: its tokenizer has a chat template."""
    return bool(getattr(tokenizer, "has_chat_template", None) or getattr(tokenizer, "chat_template", None))


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError in the block after LONGEST_RENDERING; only in the main thread, which alone gets signals."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took longer than {LONGEST_RENDERING:g} s")

    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    # Again and again, as Jinja, which computes constants as it compiles, passes over what is raised there.
    signal.setitimer(signal.ITIMER_REAL, LONGEST_RENDERING, LONGEST_RENDERING / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Let a block that takes MOST_MEMORY more than there is raise MemoryError: `"x" * 10**11` takes no time."""
    statm = Path("/proc/self/statm")
    if threading.current_thread() is not threading.main_thread() or not statm.is_file():
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most if before == resource.RLIM_INFINITY else min(most, before), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def encode_messages(
    tokenizer: Any, messages: Sequence[Message], tools: Tools = None, prefix: Sequence[int] = (), first_turn: int = 0
) -> list[Example]:
    """Examples that train the assistant's turns of a conversation: a single one if possible, otherwise one per turn.

    first_turn: index of the first message whose turn is trained. Raises UserError as `render` does, and if there is no
    assistant turn.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first_turn]
    if not turns:
        raise UserError('no message has the role "assistant", so there is nothing to train; add the reply')
    whole = render(tokenizer, messages[: turns[-1] + 1], tools)
    prompts = [render(tokenizer, messages[:turn], tools, reply=True) for turn in turns]
    if all(whole.startswith(prompt) for prompt in prompts):
        return [_all_turns(tokenizer, whole, prompts, messages, turns, tools, prefix)]
    return [
        _one_turn(tokenizer, prompt, messages[: turn + 1], tools, prefix)
        for turn, prompt in zip(turns, prompts, strict=True)
    ]


def _one_turn(tokenizer, prompt: Rendered, messages: Sequence[Message], tools: Tools, prefix) -> Example:
    """The last message after its prompt: as the template renders it or, failing that, its plain content."""
    whole = render(tokenizer, messages, tools)
    if not whole.startswith(prompt):
        if not messages[-1].get("content") or messages[-1].get("tool_calls"):
            raise UserError(
                "the model's chat template does not continue its generation prompt, so empty turns and tool calls "
                "cannot be rendered; write their text as content"
            )
        whole = prompt + _spaced(prompt, str(messages[-1]["content"]))
    turn = len(messages) - 1
    return _all_turns(tokenizer, whole, [prompt], messages, [turn], tools, prefix)


def _spaced(prompt: str, content: str) -> str:
    """The content, after a space if neither it nor the prompt provides one."""
    return content if not prompt or prompt[-1].isspace() or content[:1].isspace() else f" {content}"


def _all_turns(
    tokenizer: Any,
    whole: Rendered,
    prompts: Sequence[Rendered],
    messages: Sequence[Message],
    turns: Sequence[int],
    tools: Tools,
    prefix: Sequence[int],
) -> Example:
    """One example of the whole text, in which each turn is trained from the end of its prompt to its end token."""
    tokens = encode_prompt(tokenizer, whole)
    named = getattr(tokenizer, "eos_token_ids", None)  # a set in mlx-lm's tokenizers, a single id in transformers'
    eos = {tokenizer.eos_token_id} | (named if isinstance(named, set) else set())
    starts = [_shared(encode_prompt(tokenizer, prompt), tokens) for prompt in prompts]
    spans = []
    for turn, start, following in zip(turns, starts, [*starts[1:], len(tokens)], strict=True):
        limit = following
        if turn != turns[-1]:
            # If the template renders the turn differently when it is the last, only the next prompt bounds it.
            alone = encode_prompt(tokenizer, render(tokenizer, messages[: turn + 1], tools))
            limit = _shared(alone, tokens)
            limit = limit if limit > start else following
        spans.append((start, next((i + 1 for i in range(start, limit) if tokens[i] in eos), limit)))
    # The model never writes what a template puts after the last end token, such as a newline.
    tokens = tokens[: spans[-1][1]]
    if tokens[-1] not in eos:
        tokens.append(tokenizer.eos_token_id)
    shift = len(prefix)
    gaps = tuple((shift + end, shift + start) for (_, end), (start, _) in pairwise(spans) if end < start)
    return Example([*prefix, *tokens], max(shift + spans[0][0], 1), gaps)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two token sequences."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
