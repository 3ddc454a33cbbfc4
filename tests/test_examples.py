"""From rows to examples: every kind of row, its trained tokens, and agreement between messages and text."""

import json
from typing import Any

import pytest

from common.errors import UserError
from data.batching import Rendered, num_targets
from data.examples import (
    LANGUAGE_ROWS,
    PREFERENCE_ROWS,
    PROMPT_ROWS,
    language_examples,
    preference_examples,
    row_prompt,
)
from data.records import read_rows
from tests.chat_tokenizers import CHATML, REWRITING, byte_tokenizer
from tests.test_chat import trained

TOKENIZER = byte_tokenizer(CHATML)
USER, REPLY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


@pytest.fixture
def read(tmp_path):
    """One row, as read from a file."""

    def one(row, kinds, **features):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        return read_rows(path, kinds, features, chat=True)[0]

    return one


def stretches(row, **settings):
    return [trained(TOKENIZER, example) for example in language_examples(TOKENIZER, row, **settings)]


CHATS = [
    {"messages": [USER, REPLY]},
    {"prompt": [USER], "completion": [REPLY]},
    {"prompt": "2 + 2?", "completion": [REPLY]},
    {"prompt": [USER], "completion": "4"},
    {"prompt": USER, "completion": REPLY},
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
]


@pytest.mark.parametrize("row", CHATS)
def test_a_chat_is_the_same_however_it_is_written(row, read):
    examples = [language_examples(TOKENIZER, read(each, LANGUAGE_ROWS)) for each in (CHATS[0], row)]
    assert examples[0] == examples[1]
    assert stretches(read(row, LANGUAGE_ROWS)) == [["4<|im_end|>"]]


def test_text_is_taken_as_it_is(read):
    assert stretches(read({"text": "2 4"}, LANGUAGE_ROWS)) == [["2 4<|im_end|>"]]
    assert stretches(read({"prompt": "2", "completion": " 4"}, LANGUAGE_ROWS)) == [[" 4<|im_end|>"]]
    assert stretches(read({"Input": "2", "Output": " 4"}, LANGUAGE_ROWS)) == [[" 4<|im_end|>"]]


def test_without_the_mask_all_is_trained_but_bos(read):
    rows: list[Any] = [{"text": "2"}, {"prompt": "2", "completion": " 4"}, {"messages": [USER, REPLY]}]
    texts = [stretches(read(row, LANGUAGE_ROWS), mask_prompt=False) for row in rows]
    chat = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    assert texts == [[["2<|im_end|>"]], [["2 4<|im_end|>"]], [[chat.removeprefix("<|im_start|>")]]]
    (example,) = language_examples(TOKENIZER, rows[0], prefix=[900, 901], mask_prompt=False)
    assert example.first_target == 3  # after the soft prompt and BOS


def test_prompts_of_several_turns_train_the_completion_alone(read):
    row = {"prompt": [USER, REPLY, USER], "completion": [REPLY]}
    assert stretches(read(row, LANGUAGE_ROWS)) == [["4<|im_end|>"]]


def test_of_a_row_that_serves_for_several_the_prompted_one_is_taken_or_what_is_named(read):
    row = {"text": "all", "prompt": "2", "completion": " 4", "messages": [USER, REPLY], "body": "b"}
    assert stretches(read(row, LANGUAGE_ROWS)) == [[" 4<|im_end|>"]]
    assert stretches(read(row, LANGUAGE_ROWS, text="body")) == [["b<|im_end|>"]]


WRONG = [{"role": "assistant", "content": "5"}]
PREFERENCES = [
    {"prompt": [USER], "chosen": [REPLY], "rejected": WRONG},
    {"prompt": "2 + 2?", "chosen": [REPLY], "rejected": "5"},
    {"chosen": [USER, REPLY], "rejected": [USER, *WRONG]},
    {"messages": [USER], "chosen": REPLY, "rejected": WRONG},
    {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"}, "rejected": "5"},
]


@pytest.mark.parametrize("row", PREFERENCES)
def test_chosen_and_rejected_follow_the_prompt_up_to_their_end(row, read):
    texts = [TOKENIZER.decode(e.tokens) for e in preference_examples(TOKENIZER, read(row, PREFERENCE_ROWS))]
    start = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [f"{start}4<|im_end|>", f"{start}5<|im_end|>"]


def test_chosen_and_rejected_of_several_turns_are_read_up_to_the_last(read):
    tokenizer = byte_tokenizer(REWRITING)  # by which every turn is an example of its own
    row = read({"chosen": [USER, REPLY, USER, REPLY], "rejected": [USER, REPLY, USER, *WRONG]}, PREFERENCE_ROWS)
    texts = [tokenizer.decode(example.tokens) for example in preference_examples(tokenizer, row)]
    assert [text.count("2 + 2?") for text in texts] == [2, 2]
    assert [text[-11:] for text in texts] == ["4<|im_end|>", "5<|im_end|>"]


def test_chosen_and_rejected_as_text(read):
    row = read({"prompt": "2", "chosen": " 4", "rejected": " 3"}, PREFERENCE_ROWS)
    assert [TOKENIZER.decode(e.tokens) for e in preference_examples(TOKENIZER, row)] == [
        "<s>2 4<|im_end|>",
        "<s>2 3<|im_end|>",
    ]
    (example,) = preference_examples(TOKENIZER, read({"text": "2", "reward": 1}, PREFERENCE_ROWS))
    assert TOKENIZER.decode(example.tokens) == "<s>2<|im_end|>"


@pytest.mark.parametrize("rejected", [" 4", [{"role": "assistant", "content": " 4"}]])
def test_a_pair_of_equal_texts_is_refused(read, rejected):
    row = read({"prompt": [USER], "chosen": " 4", "rejected": rejected}, PREFERENCE_ROWS)
    with pytest.raises(UserError, match=r"^chosen and rejected are the same; take the row out"):
        preference_examples(TOKENIZER, row)


def test_a_prompt_is_all_before_the_last_reply(read):
    asked = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    for row in ({"messages": [USER]}, {"messages": [USER, REPLY]}, {"prompt": [USER]}, {"prompt": USER, "answer": 4}):
        prompt = row_prompt(TOKENIZER, read(row, PROMPT_ROWS))
        assert prompt == asked and isinstance(prompt, Rendered)
    prompt = row_prompt(TOKENIZER, read({"prompt": "2 + 2?", "answer": "4"}, PROMPT_ROWS))
    assert prompt == "2 + 2?" and not isinstance(prompt, Rendered)


@pytest.mark.parametrize(
    ("answer", "read_as"), [("4", "4"), (4, "4"), (0.5, "0.5"), ([REPLY], "4"), ({"from": "gpt", "value": "4"}, "4")]
)
def test_an_answer_is_text_however_it_is_given(answer, read_as, read):
    assert read({"prompt": "p", "answer": answer}, PROMPT_ROWS)["answer"] == read_as
    assert read({"prompt": "p", "truth": answer}, PROMPT_ROWS, answer="truth")["answer"] == read_as


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ({"messages": []}, "no message in 'messages'"),
        ({"messages": "hi"}, "'messages' of type str"),
        ({"messages": ["hi"]}, "message 1 in 'messages': 'hi'"),
        ({"messages": [USER, {"content": "x"}]}, "message 2 in 'messages': one without a \"role\""),
        ({"messages": [{"role": "user"}]}, '"content" is None'),
        ({"messages": [{"role": "user", "content": 3}]}, '"content" is 3'),
        ({"messages": [USER, REPLY], "tools": "{"}, "tools '{'"),
        ({"prompt": [USER], "completion": 4}, "'completion' of type int"),
    ],
)
def test_a_message_that_is_none_is_refused_with_its_line(row, fact, read, tmp_path):
    with pytest.raises(UserError) as caught:
        read(row, LANGUAGE_ROWS)
    assert f"{tmp_path}/rows.jsonl:1 " in str(caught.value) and fact in str(caught.value)


def test_messages_are_refused_where_only_text_serves(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": [USER]}))
    with pytest.raises(UserError, match="'prompt' of type list; it must be a string"):
        read_rows(path, [("prompt",)])


def test_keys_by_other_names(read):
    row = {"question": "2", "reply": " 4", "prompt": "not this"}
    named = read(row, LANGUAGE_ROWS, prompt="question", completion="reply")
    assert stretches(named) == [[" 4<|im_end|>"]]
    swapped = read({"prompt": " 4", "completion": "2"}, LANGUAGE_ROWS, prompt="completion", completion="prompt")
    assert (swapped["prompt"], swapped["completion"]) == ("2", " 4")
    with pytest.raises(UserError, match=r'\{"question": "...", "completion": "..."\}'):
        read({"prompt": "2", "completion": "4"}, LANGUAGE_ROWS[:1], prompt="question")
    scored = read({"body": "2", "score": "0.5"}, PREFERENCE_ROWS, text="body", reward="score")
    assert (scored["text"], scored["reward"]) == ("2", 0.5)


@pytest.mark.parametrize("length", range(1, 60))
def test_the_number_of_targets_is_that_of_the_batch_wherever_it_is_cut(length):
    (example,) = language_examples(TOKENIZER, {"messages": [USER, REPLY, USER, REPLY]})
    cut = example._replace(tokens=example.tokens[:length])
    assert num_targets(cut) == sum(len(TOKENIZER.encode(s, add_special_tokens=False)) for s in trained(TOKENIZER, cut))
