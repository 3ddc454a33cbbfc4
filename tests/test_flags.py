"""Flags: their spelling, YAML behind them, every flag of the walkthrough, and what is refused before loading."""

import argparse
import ast
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import demo
import demo_real
import evaluate
import fuse
import ppo_training
import sft
import talk_to_model
from common.errors import UserError
from common.parser import Parser, boolean
from data import check, generate_digit_data
from data.sources import base_in
from synth.pipeline.flags import run_parser
from tests.scripts import ROOT, fails, with_words
from training import ppo_flags
from training.flags import adapter_settings, add_adapter_flags, default_output_dir, describe, parse_or_resume, resumed
from training.optimizer_groups import PPO_OPTIMIZERS, optimizer_and_rate, ppo_optimizer, sft_optimizer
from training.ppo_step import check_settings, kl_kind, make_controller, make_step_size
from training.settings import PPOSettings, SFTSettings
from training.sft_flags import sft_parser


def parser():
    built = Parser("A script.\n\nMore of it.")
    built.add_argument("--iters", type=int, default=10, help="steps")
    built.add_argument("--rate", type=float, default=None, help="step size")
    built.add_argument("--data-base", default="rows_", help="name")
    built.add_argument("--train", action="store_true", help="train")
    built.add_argument("--log-with", choices=("none", "wandb"), default="none", help="tracker")
    built.add_argument("--adapt", type=boolean, nargs="?", const=True, default=True, help="adapt")
    add_adapter_flags(built, dropout=0.0)
    return built


@pytest.fixture
def yaml_file(tmp_path):
    """Write a YAML file and return its path."""

    def write(text):
        path = tmp_path / "run_config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# --- spelling ---


@pytest.mark.parametrize("words", [["--data-base", "a"], ["--data_base", "a"], ["--data_base=a"], ["--data-base=a"]])
def test_hyphen_and_underscore_are_the_same_flag(words):
    assert parser().parse_args(words).data_base == "a"


@pytest.mark.parametrize("words", [["--data_base", "my_own_rows_"], ["--data_base=my_own_rows_"]])
def test_underscores_in_values_are_left_alone(words):
    assert parser().parse_args(words).data_base == "my_own_rows_"


def test_a_value_with_an_equals_sign_is_kept_whole():
    assert parser().parse_args(["--data_base=a_b=c_d"]).data_base == "a_b=c_d"


def test_a_negative_number_is_a_value():
    assert parser().parse_args(["--lora_layers", "-1"]).lora_layers == -1


def test_the_last_of_two_equal_flags_counts():
    assert parser().parse_args(["--iters", "3", "--iters", "4"]).iters == 4


@pytest.mark.parametrize("words", [["--iter", "3"], ["--unknown_flag"], ["--unknown-flag=3"], ["stray"]])
def test_an_unknown_flag_or_an_abbreviation_is_one_line(capsys, words):
    line = fails(capsys, parser().parse_args, *words)
    assert words[0].replace("_", "-") in line and "--help" in line


def test_an_unknown_flag_names_one_that_is_nearly_the_same(capsys):
    assert "; did you mean --iters? see " in fails(capsys, parser().parse_args, "--iter", 3)
    assert "did you mean" not in fails(capsys, parser().parse_args, "--zebra", 3)


@pytest.mark.parametrize("words", [["--iters", "2.5"], ["--rate", "fast"], ["--log-with", "paper"], ["--iters"]])
def test_a_value_of_the_wrong_type_is_one_line(capsys, words):
    assert words[0] in fails(capsys, parser().parse_args, *words)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], True),
        (["--adapt"], True),
        (["--adapt", "True"], True),
        (["--adapt", "true"], True),
        (["--adapt=False"], False),
        (["--adapt", "False"], False),
        (["--adapt", "0"], False),
        (["--adapt", "--train"], True),
    ],
)
def test_the_forms_of_a_boolean_flag(words, value):
    assert parser().parse_args(words).adapt is value


def test_a_boolean_that_is_neither_is_one_line(capsys):
    assert "maybe" in fails(capsys, parser().parse_args, "--adapt", "maybe")


# --- YAML ---


def test_yaml_gives_defaults_and_flags_override_them(yaml_file):
    path = yaml_file("iters: 600\ndata_base: from_yaml_\nlog-with: wandb\ntrain: true\nadapt: false\n")
    args = parser().parse_args(["-c", path])
    assert (args.iters, args.data_base, args.log_with, args.train, args.adapt) == (
        600,
        "from_yaml_",
        "wandb",
        True,
        False,
    )
    args = parser().parse_args(["-c", path, "--iters", "5", "--data_base", "from_flag_"])
    assert (args.iters, args.data_base, args.train) == (5, "from_flag_", True)
    assert parser().parse_args(["--iters", "5", "-c", path]).iters == 5


@pytest.mark.parametrize("form", ["-c {}", "-c{}", "--config {}", "--config={}", "-c missing.yaml --config {}"])
def test_every_form_of_naming_the_file_reads_it(yaml_file, form):
    words = form.format(yaml_file("iters: 600")).split()
    args = parser().parse_args(words)
    assert args.iters == 600
    assert args.config == yaml_file("iters: 600")


def test_lora_parameters_may_be_nested_as_in_mlx_lm(yaml_file):
    nested = "lora_parameters:\n  rank: 4\n  scale: 20\n  dropout: 0.1\n  keys: [self_attn.q_proj, self_attn.v_proj]\n"
    args = parser().parse_args(["-c", yaml_file(nested)])
    assert (args.lora_rank, args.lora_scale, args.lora_dropout) == (4, 20.0, 0.1)
    assert args.lora_keys == ["self_attn.q_proj", "self_attn.v_proj"]
    args.model = "some/model"
    assert adapter_settings(args)["lora_parameters"] == {
        "rank": 4,
        "scale": 20.0,
        "dropout": 0.1,
        "keys": ["self_attn.q_proj", "self_attn.v_proj"],
    }


def test_one_lora_key_may_stand_by_itself(yaml_file):
    assert parser().parse_args(["-c", yaml_file("lora_keys: self_attn.q_proj")]).lora_keys == ["self_attn.q_proj"]


def test_yaml_numbers_arrive_as_numbers(yaml_file):
    # YAML 1.1 takes 1e-3, without a point, for text.
    rate = parser().parse_args(["-c", yaml_file("rate: 1e-3")]).rate
    assert rate == 1e-3 and isinstance(rate, float)
    scale = parser().parse_args(["-c", yaml_file("lora_scale: 20")]).lora_scale
    assert scale == 20 and isinstance(scale, float)


def test_null_stands_for_a_default_of_none_only(yaml_file, capsys):
    assert parser().parse_args(["-c", yaml_file("rate: null")]).rate is None
    assert "iters" in fails(capsys, parser().parse_args, "-c", yaml_file("iters: null"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("iterations: 3", "unknown key 'iterations'"),
        ("lora_parameters: {alpha: 3}", "unknown key 'lora_alpha'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("iters: many", "iters to 'many'"),
        ("iters: 2.5", "iters to 2.5"),
        ("iters: true", "iters to True"),
        ("iters: [1, 2]", "one value"),
        ("iters: {a: 1}", "iters to {'a': 1}"),
        ("train: sometimes", "train to 'sometimes'"),
        ("rate: fast", "rate to 'fast'"),
        ("log_with: paper", "none, wandb"),
        ("lora_keys: [[a]]", "lora_keys to [['a']]"),
        ("lora_parameters: 3", "lora_parameters to 3"),
        ("- iters", "not a YAML mapping"),
        ("iters: [", "not valid YAML"),
        ("", "not a YAML mapping"),
    ],
)
def test_a_mistake_in_yaml_is_one_line_that_names_it(yaml_file, capsys, text, named):
    path = yaml_file(text)
    line = fails(capsys, parser().parse_args, "-c", path)
    assert named in line and path in line


def test_a_false_word_does_not_switch_a_flag_on(yaml_file):
    assert parser().parse_args(["-c", yaml_file("train: 'false'")]).train is False


def test_a_missing_yaml_file_is_one_line(capsys):
    assert "nowhere.yaml" in fails(capsys, parser().parse_args, "-c", "nowhere.yaml")


def test_a_key_may_be_any_spelling_of_its_flag_but_only_once(yaml_file, capsys):
    args = with_words(sft.parse_args, "-c", yaml_file("num_layers: 4\nreport-to: wandb\n"))
    assert (args.lora_layers, args.log_with) == (4, "wandb")
    line = fails(capsys, parser().parse_args, "-c", yaml_file("num_layers: 4\nlora-layers: 5\n"))
    assert "num_layers and lora-layers" in line
    nested = yaml_file("lora_rank: 4\nlora_parameters: {rank: 8}\n")
    assert "lora_rank and lora_rank" in fails(capsys, parser().parse_args, "-c", nested)


def test_a_flag_with_a_no_is_set_by_its_own_name_alone(yaml_file, capsys):
    assert with_words(sft.parse_args, "-c", yaml_file("mask_prompt: false")).mask_prompt is False
    assert with_words(sft.parse_args, "-c", yaml_file("mask_prompt: false"), "--mask-prompt").mask_prompt is True
    assert with_words(sft.parse_args, "--no_mask_prompt").mask_prompt is False
    assert "no_mask_prompt" in fails(capsys, sft.parse_args, "-c", yaml_file("no_mask_prompt: true"))
    # A flag whose own name begins so is no such spelling.
    assert ppo("-c", yaml_file("no_group_scale: true")).no_group_scale is True


# One flag of every script, its default, and two other values of it.
EVERY_SCRIPT: dict[str, tuple[Callable, str, Any, Any, Any]] = {
    "sft": (sft.parse_args, "iters", 1000, 5, 6),
    "ppo_training": (ppo_training.parse_args, "num_steps", 200, 5, 6),
    "pytorch_ppo_training": (lambda: pytorch().parse_args(), "device", "auto", "cpu", "cuda"),
    "evaluate": (evaluate.parse_args, "num_samples", 250, 5, 6),
    "fuse": (fuse.parse_args, "save_path", "fused_model", "a", "b"),
    "talk_to_model": (talk_to_model.parse_args, "max_tokens", 100, 5, 6),
    "data.check": (check.parse_args, "rows", 3, 5, 6),
    "generate_digit_data": (generate_digit_data.parse_args, "num_samples", 100, 5, 6),
    "synth.run": (lambda: run_parser("").parse_args(), "count", 500, 5, 6),
    "demo": (demo.parse_args, "output_dir", "demo", "a", "b"),
    "demo_real": (demo_real.parse_args, "output_dir", "demo_real", "a", "b"),
}


def pytorch():
    return pytest.importorskip("pytorch_ppo_training")


@pytest.mark.parametrize("script", EVERY_SCRIPT)
def test_every_script_takes_a_yaml_file_over_defaults_and_under_flags(script, yaml_file, capsys):
    parse, name, default, in_file, in_flag = EVERY_SCRIPT[script]
    path = yaml_file(f"{name}: {in_file}")

    def value(*words):
        return getattr(with_words(parse, *words), name)

    assert str(value()) == str(default)
    assert str(value("-c", path)) == str(in_file)
    assert str(value("-c", path, f"--{name}", in_flag)) == str(in_flag) == str(value(f"--{name}", in_flag, "-c", path))
    assert "unknown key 'nonsense'" in fails(capsys, parse, "-c", yaml_file("nonsense: 1"))


# --- names from mlx-lm and TRL ---

SAVES, LOADS = {"--adapter-path": "save_file"}, {"--adapter-path": "resume_file"}
ADAPTERS = {"--num-layers": "lora_layers", "--report-to": "log_with", "--fine-tune-type": "fine_tune_type"}
FROM_TRL = {
    "--cliprange": "clip_range", "--cliprange-value": "value_clip_range", "--lam": "gae_lambda", "--target": "target",
    "--horizon": "horizon", "--ppo-epochs": "ppo_epochs", "--num-ppo-epochs": "ppo_epochs",
    "--use-score-scaling": "scale_scores", "--use-score-norm": "normalize_scores", "--score-clip": "score_clip",
    "--init-kl-coef": "init_kl_coef", "--vf-coef": "vf_coef", "--ratio-threshold": "ratio_threshold",
    "--max-new-tokens": "max_completion_length", "--kl-penalty": "kl_penalty",
}  # fmt: skip
ALIASES = {
    "sft": (sft.parse_args, {**SAVES, **ADAPTERS, "--max-seq-length": "max_length", "--mask-prompt": "mask_prompt"}),
    "ppo": (ppo_training.parse_args, {**SAVES, **ADAPTERS, **FROM_TRL}),
    "evaluate": (evaluate.parse_args, {**LOADS, "--max-new-tokens": "max_completion_length"}),
    "talk": (talk_to_model.parse_args, LOADS),
    "fuse": (fuse.parse_args, {"--adapter-path": "adapter_file", "--dequantize": "de_quantize"}),
    "check": (check.parse_args, {"--max-seq-length": "max_length", "--mask-prompt": "mask_prompt"}),
}


@pytest.mark.parametrize(("script", "flag"), [(script, flag) for script, (_, f) in ALIASES.items() for flag in f])
def test_names_from_mlx_lm_and_trl_set_what_they_name(script, flag):
    parse, names = ALIASES[script]
    switch = flag in ("--use-score-scaling", "--use-score-norm", "--mask-prompt", "--dequantize")
    value = {"--report-to": "wandb", "--fine-tune-type": "dora", "--kl-penalty": "k3", "--lam": "0.7"}.get(flag, "7")
    args = with_words(parse, flag) if switch else with_words(parse, f"{flag}={value}")
    read = getattr(args, names[flag])
    assert read is True if switch else str(read) in (value, f"{value}.0")
    assert switch or getattr(with_words(parse), names[flag]) != read  # it did set it


# --- the walkthrough's flags ---

SFT_FLAGS = """--prompt-tuning --num-prompt-tokens=10 --lora-layers=16 --batch-size=4 --iters=1000 --val-batches=25
    --learning-rate=1e-6 --steps-per-report=10 --steps-per-eval=200 --save-every=100 --test --train --seed=0
    --data=data --data-base=increasing_mult_2_ --model=tiny-digits --save-file=a.npz --resume-adapter-file=b.npz
    --reward-model --reward_model"""
PPO_FLAGS = """--prompt_tuning --lora_layers=16 --model=tiny-digits --ground_truth_reward --reward_model=dir
    --save_file=a.npz --resume_file=b.npz --use_peft --log_with=wandb --batch_size=32 --mini_batch_size=32
    --ppo_epoch=4 --num_steps=500 --adap_kl_ctrl=True --init_kl_coef=0.2 --seed=7"""
GENERATE_FLAGS = """--num-samples=100 --min-length=5 --max-length=15 --noise=0.2 --increasing --decreasing
    --multiple-of=1"""
SEED_FLAGS = {
    "sft": (sft.parse_args, SFT_FLAGS),
    "ppo": (lambda: ppo_flags.ppo_parser("PPO.").parse_args(), PPO_FLAGS),
    "fuse": (fuse.parse_args, "--model=tiny-digits --adapter-file=a.npz --save-path=./sft_fine_tune/"),
    "talk": (talk_to_model.parse_args, "--model=tiny-digits --resume-file=a.npz --max-tokens=50 --temp=0.0"),
    "generate": (generate_digit_data.parse_args, GENERATE_FLAGS),
}


@pytest.mark.parametrize("script", SEED_FLAGS)
def test_every_flag_of_the_walkthrough_is_taken_in_both_spellings(script):
    parse, flags = SEED_FLAGS[script]
    for word in flags.split():
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        for spelling in {flag, f"--{name}", f"--{name.replace('_', '-')}"}:
            args = with_words(parse, spelling + equals + value)
            read = getattr(args, "ppo_epochs" if name == "ppo_epoch" else name)
            read = read[0] if isinstance(read, list) else read
            assert str(read) == value or float(read) == float(value or 1), word


def test_the_walkthrough_s_defaults_that_work_are_kept():
    args = with_words(sft.parse_args)
    assert (args.lora_layers, args.batch_size, args.iters, args.steps_per_report) == (16, 4, 1000, 10)
    assert (args.steps_per_eval, args.save_every, args.seed) == (200, 100, 0)
    assert base_in(args.data, args.data_base) == "increasing_mult_2_"
    args = with_words(generate_digit_data.parse_args)
    assert (args.num_samples, args.min_length, args.max_length, args.noise, args.multiple_of) == (100, 5, 15, 0.2, 1)


def test_ppo_s_dropout_is_off_by_default():
    assert ppo("--ground-truth-reward").lora_dropout == 0.0


# --- what is checked before anything is loaded ---


def ppo(*words):
    return ppo_flags.ppo_parser("PPO.").parse_args([str(word) for word in words])


def refused(*words):
    with pytest.raises(UserError) as caught:
        ppo_flags.check(ppo(*words))
    message = str(caught.value)
    assert "\n" not in message
    return message


REWARD_FLAGS = ("--ground-truth-reward", "--reward-model", "--reward-function")


def test_without_a_reward_flag_the_error_names_all_three():
    message = refused()
    assert message.startswith("none of ") and all(flag in message for flag in REWARD_FLAGS)


def test_two_reward_flags_without_weights_are_refused():
    message = refused("--ground-truth-reward", "--reward-model", "dir")
    assert message.startswith("2 rewards are given") and message.endswith("--reward-weights digit_rule=1 dir=1")


def test_the_flags_of_the_walkthrough_pass():
    ppo_flags.check(ppo("--ground_truth_reward", "--batch_size", 32, "--mini_batch_size", 32, "--ppo_epoch", 4))


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ({"batch-size": 32, "mini-batch-size": 5}, "mini-batch-size"),
        ({"batch-size": 31, "mini-batch-size": 8}, "mini-batch-size"),
        ({"batch-size": 32}, "mini-batch-size"),
        ({"batch-size": 32, "mini-batch-size": 16, "gradient-accumulation-steps": 3}, "gradient-accumulation-steps"),
        ({"batch-size": 32, "mini-batch-size": 32, "advantage": "group", "num-generations": 5}, "num-generations"),
        ({"batch-size": 14, "mini-batch-size": 14, "advantage": "rloo", "num-generations": 3}, "num-generations"),
        ({"batch-size": 2, "mini-batch-size": 2, "advantage": "group"}, "num-generations"),
    ],
)
def test_the_divisors_that_an_error_proposes_work(flags, changed):
    def words(settings):
        return ["--ground-truth-reward", *(word for name, value in settings.items() for word in (f"--{name}", value))]

    message = refused(*words(flags))
    assert (f"--{changed}" in message and f"--batch-size {flags['batch-size']}" in message) or "accumulation" in changed
    proposed = re.findall(r"\d+", message.rpartition("try ")[2])
    assert proposed
    for divisor in proposed:
        ppo_flags.check(ppo(*words({**flags, changed: int(divisor)})))


def test_a_batch_too_small_for_any_group_is_told_so():
    assert "raise --batch-size" in refused(
        "--ground-truth-reward", "--batch-size", 1, "--mini-batch-size", 1, "--advantage", "group"
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--batch-size", 0], "--batch-size is 0"),
        (["--temperature", 0], "--temperature is 0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--learning-rate", -1], "--learning-rate is -1"),
        (["--value-head-learning-rate", 0], "--value-head-learning-rate is 0"),
        (["--clip-range", -0.1], "--clip-range is -0.1"),
        (["--init-kl-coef", -1], "--init-kl-coef is -1"),
        (["--lora-dropout", 0.1], "--lora-dropout is 0.1"),
        (["--advantage", "rloo", "--num-generations", 1], "--num-generations is 1"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--advantage", "group", "--kl-penalty", "k1"], "use k3, abs, mse"),
        (["--advantage", "rloo", "--kl-penalty", "full"], "use k3, abs, mse"),
    ],
)
def test_ppo_s_impossible_values_are_refused(words, named):
    assert named in refused("--ground-truth-reward", *words)


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        ([], "lora", ("adam", 5e-4)),
        ([], "soft_prompt", ("muon", 0.4)),
        (["--learning-rate", 0.1], "soft_prompt", ("muon", 0.1)),
        (["--optimizer", "muon"], "soft_prompt", ("muon", 0.4)),
        (["--optimizer", "adam", "--learning-rate", 0.1], "soft_prompt", ("adam", 0.1)),
    ],
)
def test_the_optimizer_and_its_rate_by_the_kind_of_adapter(words, kind, expected):
    assert optimizer_and_rate(PPOSettings.from_flags(ppo(*words)), PPO_OPTIMIZERS, kind) == expected


@pytest.mark.parametrize(
    ("kind", "flags", "small", "large"),
    [
        ("lora", {}, 5e-4, 1e-4), ("dora", {}, 5e-4, 1e-4), ("full", {}, 3e-4, 1e-5), ("none", {}, 1e-3, 1e-4),
        ("soft_prompt", {}, 3e-2, 3e-2), ("lora", {"dpo": True}, 1e-4, 5e-6), ("full", {"dpo": True}, 6e-5, 5e-7),
        ("lora", {"dpo": True, "loss": "orpo"}, 5e-4, 1e-4), ("lora", {"learning_rate": 0.25}, 0.25, 0.25),
    ],
)  # fmt: skip
def test_sft_s_rate_by_the_model_s_size(kind, flags, small, large):
    settings = SFTSettings(**flags)
    assert sft_optimizer(settings, kind, 10_000_000) == ("adam", pytest.approx(small))
    assert sft_optimizer(settings, kind, 10_000_001) == ("adam", pytest.approx(large))


@pytest.mark.parametrize(
    ("kind", "small", "large"),
    [("lora", 5e-4, 5e-5), ("dora", 5e-4, 5e-5), ("full", 3e-4, 1e-6), ("soft_prompt", 0.4, 0.4)],
)
def test_ppo_s_rate_by_the_model_s_size(kind, small, large):
    assert [ppo_optimizer(PPOSettings(), kind, weights)[1] for weights in (75_000, 135_000_000)] == [small, large]
    assert ppo_optimizer(PPOSettings(learning_rate=0.25), kind, 135_000_000)[1] == 0.25


@pytest.mark.parametrize(
    ("kind", "given", "small", "large"),
    [("lora", None, 0.3, 0.02), ("full", None, 0.3, 0.02), ("soft_prompt", None, 0.3, 0.3), ("lora", 0.05, 0.05, 0.05),
     ("lora", 0.0, 0.0, 0.0)],
)  # fmt: skip
def test_whether_ppo_s_rate_adapts_by_the_model_s_size(kind, given, small, large):
    settings = PPOSettings(step_kl=given)
    for weights, wanted in ((10_000_000, small), (10_000_001, large)):
        assert make_step_size(settings, kind, weights).target == wanted


def test_a_rate_that_the_size_chose_is_said_to_be():
    said = "learning rate 0.0001 (chosen by the model's size; --learning-rate sets it)"
    used = ("adam", 1e-4)
    assert describe((9, 10_000_001), "lora", used, "cpu", rate_given=False).endswith(said)
    for sizes, kind, given in (((9, 10_000_000), "lora", False), ((9, 10_000_001), "lora", True),
                               ((9, 10_000_001), "soft_prompt", False)):  # fmt: skip
        assert describe(sizes, kind, used, "cpu", rate_given=given).endswith("learning rate 0.0001")


@pytest.mark.parametrize(("name", "kind"), [("muon", "lora"), ("adam", "soft_prompt")])
def test_another_optimizer_wants_a_rate(name, kind):
    with pytest.raises(UserError, match=f"--optimizer {name} has no default rate here; give --learning-rate"):
        optimizer_and_rate(PPOSettings(optimizer=name), PPO_OPTIMIZERS, kind)


@pytest.mark.parametrize(("parser", "settings"), [(ppo_flags.ppo_parser, PPOSettings), (sft_parser, SFTSettings)])
def test_the_settings_hold_every_default(parser, settings):
    assert settings.from_flags(parser("").parse_args([])) == settings()


def test_settings_written_down_are_checked_as_flags_are():
    with pytest.raises(UserError, match="--advantage is 'grpo'; use one of gae, group, rloo"):
        check_settings(PPOSettings(advantage="grpo"))
    with pytest.raises(UserError, match="--kl-penalty is 'k4'; use one of k1, kl, k3"):
        check_settings(PPOSettings(kl_penalty="k4"))


@pytest.mark.parametrize(
    ("advantage", "penalty", "kind"),
    [("gae", None, "k1"), ("gae", "full", "full"), ("group", None, "k3"), ("rloo", "mse", "mse")],
)
def test_the_kl_estimator_is_that_of_the_flag_or_what_suits_its_place(advantage, penalty, kind):
    assert kl_kind(PPOSettings(advantage=advantage, kl_penalty=penalty)) == kind


def test_a_score_clip_of_zero_means_none():
    ppo_flags.check(ppo("--ground-truth-reward", "--score-clip", 0, "--target-kl", 0, "--init-kl-coef", 0))


def test_adap_kl_ctrl_chooses_the_controller():
    words = ["--init_kl_coef", 0.2, "--target", 6, "--horizon", 10000, "--adap_kl_ctrl"]
    adaptive, fixed = (make_controller(PPOSettings.from_flags(ppo(*words, word))) for word in ("True", "False"))
    for controller in (adaptive, fixed):
        controller.update(100.0, 1000)
    assert fixed.value == 0.2
    assert adaptive.value == pytest.approx(0.2 * (1 + 0.2 * 1000 / 10000))


# --- resuming ---


def test_a_resumed_run_has_its_own_flags_and_its_own_folder():
    args = ppo("--resume", "runs/old", "--seed", 3)
    saved = {**vars(ppo("--ground_truth_reward", "--seed", 7)), "output_dir": "elsewhere"}
    args = resumed(ppo_flags.ppo_parser(None), args, saved)
    assert (args.seed, args.ground_truth_reward) == (7, True)
    assert args.resume == args.output_dir == "runs/old"


@pytest.fixture
def stopped(tmp_path):
    """f() -> the flags that a run has, which was begun with a few of its own; as the script would parse them."""
    own = ["--ground-truth-reward", "--num-steps", "60", "--target", "4", "--output-dir", str(tmp_path / "run")]
    parser = ppo_flags.ppo_parser("PPO")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(vars(parser.parse_args(own))))

    def resume(*words):
        return with_words(lambda: parse_or_resume(ppo_flags.ppo_parser("PPO"), "num_steps"),
                          "--resume", tmp_path / "run", *words)  # fmt: skip

    return resume


def test_a_resumed_run_says_what_it_takes_anew_and_keeps_it(stopped, tmp_path, capsys):
    args = stopped("--save-every", 5, "--target", 4, "--log-with", "tensorboard", "--num-steps", 60)
    assert (args.save_every, args.target, args.log_with, args.num_steps) == (5, 4.0, "tensorboard", 60)
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "--log-with is now tensorboard; the run had none", "--save-every is now 5; the run had 20",
    ]  # fmt: skip
    assert json.loads((tmp_path / "run" / "config.json").read_text())["save_every"] == 5
    assert stopped().save_every == 5 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ground-truth-reward"], (None, None)), (["--reward-model", "r"], (0.1, 4.0)),
        (["--reward-model", "r", "--target", 5], (0.1, 5.0)),
        (["--reward-model", "r", "--init-kl-coef", 0], (0.0, 4.0)),
    ],
)  # fmt: skip
def test_the_kl_is_held_at_a_target_where_a_reward_model_scores(words, expected):
    args = ppo(*words)
    settings = ppo_flags.ppo_settings(args)
    assert (settings.init_kl_coef, settings.target) == expected
    assert (args.init_kl_coef, args.target) == expected  # for config.json


@pytest.mark.parametrize("words", [["--learning-rate", "0.1"], ["--target", "6"], ["--reward-model", "a", "b"],
                                   ["--seed", "1"], ["--no-center-values"],
                                   ["--save-every", "5", "--gamma", "0.9"]])  # fmt: skip
def test_a_resumed_run_refuses_what_would_change_its_training(stopped, tmp_path, words):
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match=r"was begun with other flags: --.* \(the run: .*change only --num-steps"):
        stopped(*words)
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    names = []
    for _ in range(3):
        names.append(default_output_dir("sft"))
        Path(names[-1]).mkdir(parents=True)
    assert names == [f"runs/sft-20260102-030405{suffix}" for suffix in ("", "-2", "-3")]


def test_a_run_of_another_script_cannot_be_resumed():
    with pytest.raises(UserError, match="val_batches"):
        resumed(ppo_flags.ppo_parser(None), ppo("--resume", "runs/old"), {"val_batches": 25})


def test_prompts_of_too_long_a_name_are_said_to_be_missing():
    message = refused("--ground-truth-reward", "--prompts", "x" * 300 + ".jsonl")
    assert message.endswith("x.jsonl does not exist; check the path")


def test_help_shows_every_flag_with_its_default(capsys):
    for parse in (sft.parse_args, fuse.parse_args, talk_to_model.parse_args, SEED_FLAGS["ppo"][0]):
        with pytest.raises(SystemExit):
            with_words(parse, "--help")
        assert "--model" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_help_shows_the_main_flags_and_help_all_every_one(script, capsys):
    parse = {"sft": sft.parse_args, "ppo": SEED_FLAGS["ppo"][0]}[script]
    said = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stopped:
            with_words(parse, flag)
        assert stopped.value.code == 0
        said[flag] = capsys.readouterr().out
    shown = [line.split()[0].rstrip(",") for line in said["--help"].splitlines() if line.startswith("  -")]
    assert 10 <= len(shown) <= 12 and shown[0] == "--model" and "--max-grad-norm" not in said["--help"]
    assert "--help-all shows all" in said["--help"] and "usage: python " in said["--help"]
    assert "--max-grad-norm" in said["--help-all"] and "(default: 0.0)" in said["--help-all"]
    assert max(map(len, said["--help"].splitlines())) <= 100


def test_a_module_says_how_it_is_started():
    words = [sys.executable, "-m", "data.check", "--no-such-flag"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.endswith("see python -m data.check --help\n")


def test_pytorch_s_help_needs_no_torch():
    code = (
        "import sys\nsys.modules['torch'] = None\nsys.argv = ['pytorch_ppo_training.py', *sys.argv[1:]]\n"
        "import runpy\nrunpy.run_path('pytorch_ppo_training.py', run_name='__main__')"
    )
    done = [
        subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        for words in (["--help"], ["--ground-truth-reward"])
    ]
    assert (done[0].returncode, done[0].stderr) == (0, "") and "--device" not in done[0].stdout
    assert done[1].returncode == 2 and done[1].stderr.startswith("error: torch is not installed; run: pip install")


AT_IMPORT = """
import os, runpy, signal, sys

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
sys.path.insert(0, "")
runpy.run_path("sft.py", run_name="__main__")
"""


@pytest.mark.parametrize("moment", ["argparse", "mlx_lm"])  # soon after the start, and late
def test_ctrl_c_while_a_script_imports_leaves_no_traceback(moment):
    command = [sys.executable, "-c", AT_IMPORT, moment]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "\nstopped.\n")


TRIED = "try:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    "
SWALLOWED = {
    "by a library": f"{TRIED}pass\n",
    "by an extension": f"{TRIED}raise ImportError\n",
    "by a callback": "r = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))\ndel thing\n",
}


@pytest.mark.parametrize("swallow", SWALLOWED.values(), ids=SWALLOWED)
def test_ctrl_c_that_is_swallowed_while_a_script_imports_ends_it_before_it_begins(swallow):
    code = "import common, signal, weakref\nclass Thing: pass\nthing = Thing()\n"
    code += f"{swallow}from common.cli import run\nrun(lambda: print('went on'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped.\n")


def test_a_script_that_runs_has_python_s_own_handler():
    """asyncio lets a task end by it, and no other."""
    code = "import signal\nfrom common.cli import run\n"
    code += "run(lambda: print(signal.getsignal(signal.SIGINT) is signal.default_int_handler))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n"


def test_a_fault_while_a_script_imports_has_its_traceback():
    code = "import common\nraise ValueError('a fault')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr and "a fault" in done.stderr


def first_import(path):
    """The module that a file imports before any other."""
    node = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom))
    return node.module if isinstance(node, ast.ImportFrom) else node.names[0].name


def test_every_script_answers_ctrl_c_before_it_imports_anything_else():
    scripts = [path for path in ROOT.glob("*.py") if path.name != "conftest.py"]
    assert len(scripts) == 8
    assert {first_import(path).partition(".")[0] for path in scripts} == {"models", "common"}
    # A module run by its name is imported with its package.
    for package, first in {"data": "common", "models": "common.open_files", "synth": "common"}.items():
        assert first_import(ROOT / package / "__init__.py") == first
    assert "\nimport common " in (ROOT / "training" / "__init__.py").read_text()


def test_boolean_is_strict():
    with pytest.raises(argparse.ArgumentTypeError):
        boolean("")
