"""From conversations to tokens: what is trained, for various kinds of chat templates."""

import copy
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

import data.chat
from common.errors import UserError
from data.batching import Example, Rendered, collate, encode_prompt, encode_text
from data.chat import encode_messages, render
from data.prompts import PromptPlan
from data.tokenizer import open_tokenizer
from tests.chat_tokenizers import BRACKETS, CHATML, REWRITING, THINKING, byte_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 1?"},
    {"role": "assistant", "content": "Five."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def trained(tokenizer, example):
    """The trained spans of text, according to the batch."""
    targets = [0, *collate([example], 0, multiple=1).targets[0]]
    stretches, open_ = [], []
    for token, target in [*zip(example.tokens, targets, strict=True), (None, 0)]:
        if target:
            open_.append(token)
        elif open_:
            stretches.append(tokenizer.decode(open_))
            open_ = []
    return stretches


@pytest.mark.parametrize("wrapped", [False, True], ids=["transformers", "mlx-lm"])
def test_every_turn_of_the_assistant_is_trained_with_its_end(wrapped):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer = TokenizerWrapper(tokenizer) if wrapped else tokenizer
    (example,) = encode_messages(tokenizer, TALK)
    assert trained(tokenizer, example) == ["4<|im_end|>", "Five.<|im_end|>"]
    # Everything after the last end token is dropped; the rest is the template's own text, token by token.
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert example.tokens == tokenizer.encode(text.removesuffix("\n"), add_special_tokens=False)


def test_a_single_turn_begins_where_the_model_would_go_on():
    tokenizer = byte_tokenizer(CHATML)
    (example,) = encode_messages(tokenizer, TALK[1:3])
    prompt = tokenizer.apply_chat_template(TALK[1:2], add_generation_prompt=True, tokenize=False)
    assert example.first_target == len(tokenizer.encode(prompt, add_special_tokens=False)) and not example.gaps


def test_only_turns_from_the_first_asked_for_are_trained_and_later_messages_are_left_off():
    tokenizer = byte_tokenizer(CHATML)
    (example,) = encode_messages(tokenizer, TALK, first_turn=4)
    assert trained(tokenizer, example) == ["Five.<|im_end|>"]
    (example,) = encode_messages(tokenizer, TALK[:4])
    assert trained(tokenizer, example) == ["4<|im_end|>"]
    assert "And 1?" not in tokenizer.decode(example.tokens)


def test_a_prefix_shifts_what_is_trained():
    tokenizer = byte_tokenizer(CHATML)
    (example,), (shifted,) = (encode_messages(tokenizer, TALK, prefix=prefix) for prefix in ([], [900, 901]))
    assert shifted.tokens == [900, 901, *example.tokens]
    assert trained(tokenizer, shifted) == trained(tokenizer, example)


def test_tools_are_shown_and_calls_are_trained_but_not_their_results():
    tokenizer = byte_tokenizer(CHATML)
    call: Any = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    messages = [TALK[1], call, {"role": "tool", "content": "4"}, TALK[4]]
    (example,) = encode_messages(tokenizer, messages, TOOLS)
    assert '"name": "add", "parameters"' in tokenizer.decode(example.tokens)
    assert trained(tokenizer, example) == [
        '<tool_call>{"name": "add"}</tool_call><|im_end|>', "Five.<|im_end|>",
    ]  # fmt: skip


def test_a_thought_that_only_the_last_turn_shows():
    """Like Qwen3: the whole text shows earlier replies without the empty thought that they had as last reply."""
    tokenizer = byte_tokenizer(THINKING)
    (example,) = encode_messages(tokenizer, TALK)
    assert trained(tokenizer, example) == ["4<|im_end|>", "<think>\n\n</think>\n\nFive.<|im_end|>"]


def test_a_template_without_headers():
    tokenizer = byte_tokenizer(BRACKETS, eos="</s>")
    (example,) = encode_messages(tokenizer, TALK[1:])
    assert tokenizer.decode(example.tokens) == "<s>[INST] 2 + 2? [/INST] 4</s>[INST] And 1? [/INST] Five.</s>"
    assert trained(tokenizer, example) == [" 4</s>", " Five.</s>"]


def test_a_template_that_ends_no_turn_gets_an_end_after_the_last():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}", eos="</s>")  # fmt: skip
    (example,) = encode_messages(tokenizer, TALK[1:])
    assert trained(tokenizer, example) == ["4\n", "Five.\n</s>"]


def test_a_template_that_rewrites_earlier_turns_gives_an_example_per_turn():
    tokenizer = byte_tokenizer(REWRITING)
    examples = encode_messages(tokenizer, TALK[1:])
    assert [trained(tokenizer, example) for example in examples] == [["4<|im_end|>"], ["Five.<|im_end|>"]]
    # Each prompt is the one that the model would get at inference.
    for example, count in zip(examples, (1, 3), strict=True):
        prompt = render(tokenizer, TALK[1 : 1 + count], reply=True)
        assert example.tokens[: example.first_target] == encode_prompt(tokenizer, prompt)


def test_the_embedded_model_s_template_goes_on_from_the_last_message(tiny_digits):
    tokenizer = open_tokenizer(str(tiny_digits))
    messages = [{"role": "user", "content": "8 20"}, {"role": "assistant", "content": "22 30"}]
    (example,) = encode_messages(tokenizer, messages)
    assert example == Example([*tokenizer.encode("8 20 22 30"), tokenizer.eos_token_id], len(tokenizer.encode("8 20")))
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    with pytest.raises(UserError, match="tool call"):
        encode_messages(tokenizer, [messages[0], call])


def test_what_cannot_be_rendered_is_one_line():
    with pytest.raises(UserError, match=r'no chat template.*"prompt" and "completion"'):
        encode_messages(byte_tokenizer(None), TALK)
    with pytest.raises(UserError, match="roles must alternate"):
        encode_messages(byte_tokenizer(BRACKETS), TALK)
    with pytest.raises(UserError, match='no message has the role "assistant"'):
        encode_messages(byte_tokenizer(CHATML), TALK[:2])


def test_a_rendered_text_is_encoded_without_a_second_bos():
    tokenizer = byte_tokenizer(BRACKETS, eos="</s>")
    prompt = render(tokenizer, TALK[1:2], reply=True)
    assert encode_prompt(tokenizer, prompt).count(tokenizer.bos_token_id) == 1
    assert encode_prompt(tokenizer, str(prompt)).count(tokenizer.bos_token_id) == 2
    # That also holds after appending a completion, in a batch, and for a copy.
    for same in (prompt + " 4", copy.copy(prompt), PromptPlan([prompt], 0).batch(0, 1)[0]):
        assert isinstance(same, Rendered) and encode_prompt(tokenizer, same).count(tokenizer.bos_token_id) == 1
    (example,) = encode_messages(tokenizer, TALK[1:3])
    assert encode_text(tokenizer, prompt + " 4").tokens == example.tokens  # what a reward model reads in PPO


RANGE = "{% for i in range(99999) %}"
TEMPLATES = {
    "a range too big": "{% for i in range(10 ** 9) %}{% endfor %}",
    "loops in loops": RANGE * 4 + "{% endfor %}" * 4,
    "no end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a division": "{{ 1 / 0 }}",
    "an overflow": "{{ 1e308 ** 9 }}",
    "a number without end": "{{ 9 ** (9 ** 9) }}",
    "no such thing": "{{ messages[7].a.b }}",
    "an escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a syntax error": "{% for %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails_as_programs_do_is_one_line(template, monkeypatch):
    monkeypatch.setattr(data.chat, "LONGEST_RENDERING", 0.3)
    tokenizer = byte_tokenizer(TEMPLATES[template])
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match="the model's chat template cannot render the messages") as caught:
        render(tokenizer, [{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize(("times", "said"), [("21 * 10**6", "21,000,000 characters"), ("10**11", "MemoryError")])
def test_a_template_whose_text_has_no_end_is_one_line(times, said):
    before = resource.getrlimit(resource.RLIMIT_AS)
    if said == "MemoryError" and not Path("/proc/self/statm").is_file():
        pytest.skip("the system holds no process to its memory")
    tokenizer = byte_tokenizer("{{ 'x' * " + times + " }}")
    with pytest.raises(UserError, match=said):
        render(tokenizer, [{"role": "user", "content": "hi"}])
    assert resource.getrlimit(resource.RLIMIT_AS) == before
