"""Every number that a flag takes has its range where the flag is defined, for YAML files and resumed runs, too.

python -m pytest tests/test_numbers.py
"""

import argparse
import math
from typing import Any

import pytest

from common.errors import UserError
from common.ranges import COUNT, NOT_NEGATIVE, SEED, SHARE, SHARE_BELOW_1, Numbers
from synth.teacher.flags import teacher_from_mapping
from tests.flag_tables import PARSERS

# Infinity stands for no limit.
UNLIMITED = {"max_fuse_kl"}
EVERYWHERE = ["nan", "inf", "-inf", "1e999", "-1e999", "18446744073709551616", "-18446744073709551617", "1" * 5000, "",
              "1,5", "0x10", "one", "None", "True"]  # fmt: skip
BUILT: dict[str, Any] = {script: make() for script, make in PARSERS.items()}
NUMERIC = [
    (script, action.dest)
    for script, parser in BUILT.items()
    for action in parser._actions
    if isinstance(action.type, Numbers)
]


def action_of(script, name):
    return next(action for action in BUILT[script]._actions if action.dest == name)


@pytest.mark.parametrize(
    ("numbers", "given", "kept"),
    [
        (COUNT, "0 -1 1.0 1 7 9007199254740993", "1 7"),
        (SEED, "-1 0 7 4294967295 4294967296", "0 7 4294967295"),
        (SHARE, "-1e-9 0 0.5 1 1.0001 nan", "0 0.5 1"),
        (SHARE_BELOW_1, "0 0.99 1", "0 0.99"),
        (NOT_NEGATIVE, "-0.1 0 1e9 1e16 inf nan", "0 1e9"),
        (Numbers(least=0, most=math.inf), "-1 0 inf nan", "0 inf"),
    ],
)
def test_a_range_keeps_what_is_in_it(numbers, given, kept):
    found: list[tuple[str, float]] = []
    said: set[str] = set()
    for text in given.split():
        try:
            found.append((text, numbers(text)))
        except argparse.ArgumentTypeError as error:
            said.add(str(error))
    assert said == {str(numbers)}
    assert [text for text, _ in found] == kept.split() and all(value == float(text) for text, value in found)


def test_a_range_says_what_it_is_and_knows_types():
    assert str(COUNT) == "a whole number above 0" and str(SHARE_BELOW_1) == "a number at least 0 and below 1"
    assert str(SEED) == "a whole number at least 0 and at most 4294967295"
    assert 3 in COUNT and not any(value in COUNT for value in (True, 3.0, "3", None, [3], 0))
    assert 1 in SHARE and 0.5 in SHARE and not any(value in SHARE for value in (True, "0.5", math.nan, None))


def test_no_flag_takes_any_number_whatever():
    bare = [(script, action.dest) for script, parser in BUILT.items() for action in parser._actions
            if action.type in (int, float)]  # fmt: skip
    assert bare == [] and len(NUMERIC) > 150


@pytest.mark.parametrize("script", PARSERS)
def test_what_is_no_number_in_range_is_refused_by_flag_and_in_yaml(script, tmp_path):
    parser, path = BUILT[script], tmp_path / "flags.yaml"
    for name in [name for owner, name in NUMERIC if owner == script]:
        action = action_of(script, name)
        flag = action.option_strings[0]
        for text in [text for text in EVERYWHERE if name not in UNLIMITED or text not in ("inf", "1e999", "1" * 5000)]:
            if name in UNLIMITED and text.startswith("18"):
                continue
            with pytest.raises(UserError, match=f"^{flag} is .*; it has to be ") as caught:
                parser.parse_args([f"{flag}={text}"])
            assert str(caught.value).endswith(f"it has to be {action.type}")
        for value in () if not parser.yaml_file else (".nan", "[[1]]", "{a: 1}", "true", "one", "-1e999"):
            path.write_text(f"{name}: {value}\n", encoding="utf-8")
            with pytest.raises(UserError, match=rf"flags\.yaml sets {name} to ") as caught:
                PARSERS[script]().parse_args(["-c", str(path)])


REFUSED = [
    ("ppo_training.py", "--max-grad-norm", "-1"), ("ppo_training.py", "--weight-decay", "-1"),
    ("ppo_training.py", "--gamma", "2"), ("ppo_training.py", "--lam", "5"), ("ppo_training.py", "--gae-lambda", "-0.1"),
    ("ppo_training.py", "--ratio-threshold", "0"), ("ppo_training.py", "--keep-checkpoints", "-1"),
    ("ppo_training.py", "--warmup-steps", "-1"), ("ppo_training.py", "--seed", "-1"),
    ("ppo_training.py", "--seed", str(2**64)), ("sft.py", "--max-grad-norm", "-1"), ("sft.py", "--warmup-steps", "-1"),
    ("sft.py", "--seed", "-1"), ("sft.py", "--keep-checkpoints", "-1"), ("sft.py", "--center-coef", "-1"),
    ("synth/run.py", "--answer-tokens", "0"), ("synth/run.py", "--max-calls", "0"),
    ("synth/run.py", "--price-in", "-1"),
    ("synth/evolve.py", "--answer-tokens", "0"), ("synth/evolve.py", "--gamma", "2"), ("demo.py", "--seed", "-1"),
    ("synth/offline/__main__.py", "--error-rate", "2"), ("data/generate_digit_data.py", "--noise", "nan"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "flag", "text"), REFUSED)
def test_what_was_taken_once_is_refused(script, flag, text, tmp_path):
    with pytest.raises(UserError, match="it has to be"):
        PARSERS[script]().parse_args([f"{flag}={text}"])
    if not BUILT[script].yaml_file or text == str(2**64):  # a YAML file holds no such number at all
        return
    path = tmp_path / "flags.yaml"
    path.write_text(f"{flag.lstrip('-').replace('-', '_')}: {text}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"flags\.yaml sets .* to .*; it has to be"):
        PARSERS[script]().parse_args(["-c", str(path)])


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("seed", "7"), ("seed", True), ("gamma", 2), ("gamma", math.nan), ("lora_rank", 1.5), ("model", 3),
     ("model", ["a"]), ("advantage", "none_such"), ("use_peft", 1), ("adap_kl_ctrl", "yes"), ("lora_keys", [3]),
     ("lora_keys", "q_proj"), ("save_every", [1]), ("save_file", "a\0b")],
)  # fmt: skip
def test_a_resumed_run_s_flags_are_those_that_a_flag_gives(name, value):
    parser = PARSERS["ppo_training.py"]()
    with pytest.raises(UserError, match=rf"run/config\.json sets {name} to "):
        parser.check_values({name: value}, "run/config.json")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("key", "value"),
    [("answer_tokens", 0), ("concurrency", 0), ("price_in", -1), ("timeout", math.inf), ("max_calls", 0)],
)
def test_a_teacher_in_a_yaml_file_has_the_ranges_of_its_flags(key, value):
    assert teacher_from_mapping({key: 3}, "t.yaml")
    with pytest.raises(UserError, match=rf"^t\.yaml sets {key} to {value}(\.0)?; it has to be"):
        teacher_from_mapping({key: value}, "t.yaml")


@pytest.mark.parametrize("script", PARSERS)
def test_every_default_is_one_that_its_flag_gives(script):
    for name in [name for owner, name in NUMERIC if owner == script]:
        action = action_of(script, name)
        for value in action.default if isinstance(action.default, list) else [action.default]:
            assert value is None or value in action.type, name
