"""data.check: its counts, its output, and that it finds every bad line."""

import json
import re

import pytest

from data import check
from data.batching import Example
from tests.chat_tokenizers import CHATML, byte_tokenizer
from tests.scripts import call, fails


@pytest.fixture
def tokenizer(monkeypatch):
    """The tokenizer of every --model: one token per byte, so that lengths are easy to verify."""
    monkeypatch.setattr(check, "open_tokenizer", lambda name: byte_tokenizer(CHATML))


@pytest.fixture
def shown(tmp_path, capsys, monkeypatch, tokenizer):
    """Write files of rows (or verbatim lines). Return the output and the exit code of the check."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(files, *words):
        for name, rows in files.items():
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (tmp_path / name).write_text("\n".join(lines) + "\n")
        code: object = 0
        try:
            call(check.main, "--data", ".", "--data-base", "", *words)
        except SystemExit as stopped:
            code = stopped.code
        captured = capsys.readouterr()
        assert not captured.err and "\x1b" not in captured.out
        return captured.out, code

    return run


def test_lengths_and_what_is_trained_of_them(shown):
    rows = [{"prompt": "ab", "completion": "c" * n} for n in (1, 2, 4, 8)]
    out, code = shown({"train.jsonl": rows}, "--max-length", 7)
    assert code == 0 and out.endswith("no bad line in 4 rows\n")
    assert "prompts with completions: 4" in out
    # BOS, two bytes, the completion, EOS: 5, 6, 8 and 12 tokens. Of the two truncated ones, 4 trained tokens remain.
    assert "shortest 5, median 7, mean 7.8, 95th percentile 11, longest 12" in out
    assert "truncated, as longer than 7 tokens: 2\n" in out
    assert f"tokens in total: 31, {2 + 3 + 4 + 4} of them trained" in out
    assert re.findall(r"^    +(\d+)  (\d+)", out, re.MULTILINE) == [
        ("5", "1"), ("6", "1"), ("7", "0"), ("8", "1"), ("9", "0"), ("10", "0"), ("11", "0"), ("12", "1"),
    ]  # fmt: skip


def test_rows_of_which_nothing_is_left_to_train(shown):
    rows = [{"prompt": "a" * 9, "completion": "b"}, {"text": "a" * 9}]
    out, _ = shown({"train.jsonl": rows}, "--max-length", 10)
    assert "tokens: 2; with no trained token left: 1" in out


def test_the_first_rows_are_shown_as_the_model_sees_them(shown):
    talk = [("user", "hi\nyou"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in talk]},
        {"prompt": "2", "completion": " 4"},
        {"text": "2 4"},
    ]
    out, _ = shown({"train.jsonl": rows}, "--rows", 2)
    assert out.split("  train.jsonl:1, ")[1].split("\n", 1)[1].split("\n  train.jsonl:2")[0].split("\n") == [
        "    <|im_start|>user", "    hi", "    you<|im_end|>", "    <|im_start|>assistant", "    ⟦yes<|im_end|>⟧",
        "    <|im_start|>user", "    so<|im_end|>", "    <|im_start|>assistant", "    ⟦no<|im_end|>⟧",
    ]  # fmt: skip
    assert "  train.jsonl:2, 5 tokens\n    <s>2⟦ 4<|im_end|>⟧\n" in out
    assert "train.jsonl:3" not in out
    out, _ = shown({"train.jsonl": rows[1:2]}, "--no-mask-prompt")
    assert "<s>⟦2 4<|im_end|>⟧" in out
    out, _ = shown({"train.jsonl": rows[1:2]}, "--max-length", 4)
    assert "<s>2⟦ 4⟧" in out  # as it will be cut


def test_what_the_reader_of_the_other_rows_refuses_is_a_bad_line(shown):
    texts, alone, pair = [{"text": "a"}, {"text": "b"}], {"prompt": "c"}, {"chosen": "2 4", "rejected": "2 3"}
    out, code = shown({"train.jsonl": [*texts, alone, pair]})
    assert code == 2 and "checked for: sft.py\n" in out and out.splitlines()[-2:] == [
        "  train.jsonl:3: is one of prompts, which sft.py refuses",
        "  train.jsonl:4: is one of preference pairs, which sft.py refuses",
    ]  # fmt: skip
    out, code = shown({"train.jsonl": [alone]})
    assert code == 0 and "checked for: ppo_training.py --prompts\n" in out
    out, code = shown({"train.jsonl": [alone]}, "--for", "sft")
    assert code == 2 and "train.jsonl:1: is one of prompts, which sft.py refuses" in out
    out, code = shown({"train.jsonl": [pair, {"text": "a", "reward": 1}]})
    assert code == 0 and "checked for: sft.py --reward-model\n" in out


def test_the_tokens_of_a_pair_are_those_of_both_texts(shown):
    """With BOS and EOS: 3 + 2 and 1 + 2 tokens; nothing of a pair is masked."""
    out, _ = shown({"train.jsonl": [{"chosen": "abc", "rejected": "a"}]})
    assert "tokens per row (of a pair: its longer text): shortest 5, " in out
    assert "tokens in total: 8\n" in out


def test_a_split_without_a_row_is_bad(shown):
    out, code = shown({"train.jsonl": [{"text": "a"}], "valid.jsonl": [""]})
    assert code == 2 and out.endswith("bad lines\n  valid.jsonl: holds no row\n")


def test_rewards_and_answers_are_counted(shown):
    rewards = [{"text": str(n), "reward": n % 3 / 2} for n in range(9)]
    out, _ = shown({"train.jsonl": rewards})
    assert "texts with rewards: 9" in out and "rewards: mean 0.5, 3 different" in out
    assert re.findall(r"^ +(0|0\.5|1)  (\d)  █", out, re.MULTILINE) == [("0", "3"), ("0.5", "3"), ("1", "3")]
    answers = [{"prompt": str(n), "answer": "yes" if n else "no"} for n in range(4)]
    out, _ = shown({"train.jsonl": answers})
    assert "prompts with answers: 4" in out and re.findall(r"(yes|no)  (\d)", out) == [("yes", "3"), ("no", "1")]


@pytest.mark.parametrize("reader", [(), ("--for", "sft"), ("--for", "ppo")])
def test_conversations_with_answers_serve_sft_and_ppo(shown, reader):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}], "answer": "no"}
    out, code = shown({"train.jsonl": [row]}, *reader)
    assert code == 0 and "conversations with answers: 1" in out and "assistant\n    ⟦no<|im_end|>⟧" in out
    assert f"checked for: {'ppo_training.py --prompts' if 'ppo' in reader else 'sft.py'}\n" in out
    assert shown({"train.jsonl": [row]}, "--for", "dpo")[1] == 2


def test_duplicates_within_and_across_splits(shown):
    rows = {
        "train.jsonl": [{"text": "a", "reward": 1}, {"text": "b", "reward": 0}, {"text": "a", "reward": 0}],
        "valid.jsonl": [{"text": "c", "reward": 1}, {"text": "b", "reward": 1}],
    }
    out, code = shown(rows)
    assert code == 0  # a duplicate is not a bad line
    assert "repeated rows: 1\n    train.jsonl:3 repeats train.jsonl:1\n" in out
    assert "rows in several splits: 1\n    valid.jsonl:2 repeats train.jsonl:2\n" in out
    out, _ = shown({"train.jsonl": [{"prompt": "a", "completion": c} for c in "bcb"], "valid.jsonl": [{"text": "b"}]})
    assert out.count("repeats") == 1  # the completion counts, too


def test_every_bad_line_is_named_and_the_rest_is_counted(shown):
    bad = ['{"text": "a"', '{"txt": "a"}', '{"text": 3}', '{"text": "a", "reward": "x"}', "[]"]
    bad += ['{"messages": [{"role": "user", "content": "hi"}, {"content": "x"}]}']
    out, code = shown({"train.jsonl": ['{"text": "good"}', "", *bad], "valid.jsonl": ["nonsense"]})
    assert code == 2 and "texts: 1, bad lines: 6" in out and "no good row, bad lines: 1" in out
    listed = out.split("bad lines\n")[-1].splitlines()
    assert [line.split(":")[1] for line in listed] == [*map(str, range(3, 9)), "1"]
    assert listed[1] == "  train.jsonl:4: has the keys ['txt']" and listed[-1].startswith("  valid.jsonl:1: ")


def test_what_the_template_refuses_is_a_bad_line_too(shown, monkeypatch):
    monkeypatch.setattr(check, "open_tokenizer", lambda name: byte_tokenizer(None))
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]}
    out, code = shown({"train.jsonl": [{"text": "a"}, row]})
    assert code == 2 and "train.jsonl:2: the model's tokenizer has no chat template" in out


def test_one_file_and_keys_by_other_names(shown, tmp_path, capsys):
    out, code = shown({"mine.jsonl": [{"question": "2", "truth": 4}]}, "--data", tmp_path / "mine.jsonl",
                      "--prompt-feature", "question", "--answer-feature", "truth")  # fmt: skip
    assert code == 0 and "prompts with answers: 1" in out and "mine.jsonl:1, 2 tokens\n    <s>2\n" in out


def test_what_cannot_be_looked_at_is_one_line(tmp_path, capsys, tokenizer):
    assert "is not a folder" in fails(capsys, check.main, "--data", tmp_path / "missing")
    assert "nor for any other base" in fails(capsys, check.main, "--data", tmp_path)
    assert "--max-length is 0" in fails(capsys, check.main, "--max-length", 0)


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    words = ["--data", tmp_path, "--data-base", "", "--model", f"{tmp_path}/"]
    assert "contains no config.json" in fails(capsys, check.main, *words)


@pytest.mark.parametrize(
    ("values", "bins"),
    [
        ([3, 3, 4], [("3", 2), ("4", 1)]),
        ([7], [("7", 1)]),
        (list(range(16)), [(f"{n} to {n + 1}", 2) for n in range(0, 16, 2)]),
        ([0.0, 1.0], [("0 to 0.125", 1), *[(f"{n / 8:.3g} to {(n + 1) / 8:.3g}", 0) for n in range(1, 7)],
                      ("0.875 to 1", 1)]),
    ],
)  # fmt: skip
def test_a_histogram_counts_every_value_once(values, bins):
    assert check.binned(values) == bins


def test_long_rows_are_shown_in_part():
    text = check.marked(byte_tokenizer(None), Example(byte_tokenizer(None).encode("a" * 5000), 1))
    assert text.endswith("characters more") and len(text) < check.SHOWN + 60
