"""training/planning.py: --plan of the three scripts, the warning before a run, the figure in its summary; and
docs/recipes.md, whose commands and tables it makes."""

import json
import re
from dataclasses import astuple

import pytest

import evaluate
import ppo_training
import sft
from common.errors import UserError
from models import gpu, loading
from models.gpu import Machine
from models.loading import config_of
from models.smollm2 import SIZES
from tests.gguf_files import write_gguf_file
from tests.plan_tables import CONFIGS, PARSERS, RECIPE_MACS, RECIPES, planned, recipe_commands
from tests.scripts import call, parser_of, with_words
from training import planning
from training.planning import PLANNERS, plan_run, planned_peak, planned_with, verdict

SFT = "python sft.py --train --model mlx-community/Qwen2.5-7B-Instruct-4bit --batch-size 8"


def flags(script, *words):
    return with_words({**PARSERS, "evaluate.py": evaluate.parse_args}[script], *words)


@pytest.mark.parametrize(("main", "words", "rows"), [
    (sft.main, ["--plan-memory", 16], ["weights", "adapter", "optimizer", "kept activations", "logits", "training"]),
    (sft.main, ["--test", "--reward-model"], ["weights", "validation"]),
    (ppo_training.main, ["--ground-truth-reward"], ["reference", "KV cache", "sampling", "scoring", "update"]),
    (evaluate.main, ["--reference", "tiny-arithmetic"], ["other models", "KV cache", "scoring"]),
])  # fmt: skip
def test_plan_prints_a_table_and_loads_nothing(main, words, rows, capsys, monkeypatch):
    for name in ("sft", "ppo_training", "evaluate"):
        monkeypatch.setattr(f"{name}.load", lambda name: pytest.fail(f"{name} was opened"))
    call(main, "--plan", *words)
    printed = capsys.readouterr()
    assert all(re.search(rf"\b{row}\b", printed.out) for row in rows), printed.out
    assert printed.out.splitlines()[-1].startswith("fits: 0.0") and printed.err == ""
    assert ("a Mac with 16 GB" in printed.out) == ("--plan-memory" in words)


def test_the_config_of_a_name_is_that_of_its_folder(tiny_digits, tmp_path, monkeypatch):
    assert config_of("tiny-digits", on_gpu=False) == config_of(str(tiny_digits), on_gpu=False)
    monkeypatch.setattr(loading, "gguf_folder", lambda *_: pytest.fail("converted"))
    path = write_gguf_file(tmp_path / "model.gguf")
    assert config_of(str(path), on_gpu=True)["dtype"] == "bfloat16"
    assert config_of("smollm2-135m-instruct", on_gpu=False) == {**SIZES, "dtype": "float32"}
    assert config_of("smollm2-135m-instruct-4bit", on_gpu=False)["quantization"]["bits"] == 4
    with pytest.raises(UserError, match="is no file"):
        config_of(str(tmp_path / "none.gguf"), on_gpu=False)


def test_the_remedy_is_the_first_flag_that_is_enough_by_planning_again():
    found = planned(SFT, 512, 16)
    assert not found.fits
    remedy = re.fullmatch(r"(--[a-z-]+) (\d+) brings it to ([\d.]+) GB", found.remedy)
    assert remedy
    flag, number, brings = remedy.groups()
    assert flag == "--gradient-accumulation-steps"
    with_it = planned(f"{SFT} {flag} {number}", 512, 16)
    assert with_it.fits and planning.gigabytes(with_it.plan.peak) == brings
    assert not planned(f"{SFT} {flag} {int(number) // 2}", 512, 16).fits
    assert verdict(found).startswith("does not fit: ") and found.remedy in verdict(found)


def test_where_no_flag_is_enough_it_says_what_brings_most_and_what_a_4_bit_base_has():
    found = planned("python sft.py --train --model Qwen/Qwen2.5-7B-Instruct", 512, 8)
    assert re.search(r"brings most, [\d.]+ GB, and is not enough; a 4-bit base has 4\.28\d GB of weights", found.remedy)


@pytest.mark.parametrize(("script", "words", "names"), [
    ("sft.py", ["--train"], ["gradient_accumulation_steps", "grad_checkpoint", "lora_layers", "batch_size"]),
    ("sft.py", ["--train", "--fine-tune-type", "full"], ["fine_tune_type"]),
    ("ppo_training.py", [], ["gradient_accumulation_steps", "grad_checkpoint", "batch_size"]),
    ("evaluate.py", [], ["max_completion_length"]),
])  # fmt: skip
def test_remedies_are_flags_that_the_script_takes(script, words, names):
    args = flags(script, *words)
    offered = [name for flags in PLANNERS[script].remedies(args) for name in flags]
    assert set(names) <= set(offered) and all(hasattr(args, name) for name in offered)


def test_a_packed_run_is_not_sent_to_checkpointing():
    args = flags("sft.py", "--train", "--pack")
    assert {"grad_checkpoint": True} not in list(PLANNERS["sft.py"].remedies(args))


def test_the_length_is_that_of_the_longest_row(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "x" * 3 * n}]} for n in (10, 50)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = flags("sft.py", "--train", "--data", tmp_path, "--data-base", "", "--max-length", 400)
    config = CONFIGS["Qwen/Qwen3-0.6B"]
    assert PLANNERS["sft.py"].length(args, config) == (53, f"the longest of {tmp_path / 'train.jsonl'}")  # "user", EOS
    args.max_length = 20
    assert PLANNERS["sft.py"].length(args, config) == (20, "--max-length")
    asked = flags("ppo_training.py", "--prompts", tmp_path / "train.jsonl")
    assert PLANNERS["ppo_training.py"].length(asked, config)[0] == 53
    assert PLANNERS["ppo_training.py"].length(asked, {"vocab_size": 98})[0] == 155  # a token a character
    assert PLANNERS["ppo_training.py"].length(flags("ppo_training.py", "--prompts", "OWNER/NAME"), config)[0] == 256


def test_a_run_that_will_not_fit_is_warned_of_in_one_line_and_goes_on(monkeypatch, capsys):
    args = flags("sft.py", "--train", "--model", "tiny-digits", "--data-base", "increasing_mult_2_")
    assert planned_peak("sft.py", args) == plan_run("sft.py", args).plan.peak
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(planning, "this_machine", lambda: Machine("this machine", 1e6, on_gpu=False))
    assert (planned_peak("sft.py", args) or 0) > 1e6
    error = capsys.readouterr().err
    assert error.startswith("warning: by its plan the run does not fit: 0.00") and error.count("\n") == 1
    assert re.search(r"; --[a-z-]+ \d+ brings it to ", error)
    args.model = "/no/such/folder"
    assert planned_peak("sft.py", args) is None


def test_a_summary_has_the_planned_peak_beside_the_measured(tiny_digits, tmp_path, capsys):
    short = ["--model", tiny_digits, "--iters", 1, "--val-batches", 1]
    call(sft.main, "--train", *short, "--output-dir", tmp_path / "run", "--save-file", tmp_path / "a")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = list(summary)
    assert names[names.index("peak_memory_gb") + 1] == "planned_memory_gb" and summary["planned_memory_gb"] > 0
    assert re.search(r"peak GB +\d+\.\d{3}\n  planned GB +\d+\.\d{3}\n", capsys.readouterr().out)


def test_a_machine_has_what_its_device_says_else_a_share_of_its_memory(monkeypatch):
    assert astuple(gpu.a_mac(24)) == ("a Mac with 24 GB", pytest.approx(16e9), True)
    monkeypatch.setattr(gpu.mx, "device_info", lambda: {"max_recommended_working_set_size": 5e9, "memory_size": 8e9})
    assert gpu.this_machine().memory == 5e9
    monkeypatch.setattr(gpu.mx, "device_info", dict)
    monkeypatch.setattr(gpu, "system_memory", lambda: 9 * 10**9)
    assert astuple(gpu.this_machine()) == ("this machine", pytest.approx(6e9), gpu.on_gpu())


@pytest.mark.parametrize("model", RECIPES)
def test_a_recipe_s_commands_are_the_scripts_and_fit_together(model):
    commands = recipe_commands(model)
    assert [command.split()[1] for command in commands] == ["sft.py", "sft.py", "ppo_training.py"]
    parsed = [parser_of(PARSERS[command.split()[1]]).parse_args(command.split()[2:]) for command in commands]
    assert len({args.model for args in parsed}) == 1 and parsed[0].model in CONFIGS
    assert parsed[1].reward_model and parsed[2].resume_file == parsed[0].save_file
    assert RECIPE_MACS == (8, 16, 32)


def test_an_adapter_to_start_from_is_planned_by_its_configuration(tmp_path):
    args = flags("ppo_training.py")
    args.model = "here"
    small = planned_with("ppo_training.py", args, CONFIGS["Qwen/Qwen3-0.6B"], 8, "", gpu.a_mac(8))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"num_layers": 16, "lora_parameters": {
        "rank": 64, "scale": 1.0, "dropout": 0.0}}))  # fmt: skip
    (tmp_path / "adapters.safetensors").write_text("not read")
    args.resume_file = str(tmp_path)
    large = planned_with("ppo_training.py", args, CONFIGS["Qwen/Qwen3-0.6B"], 8, "", gpu.a_mac(8))
    rank_1 = (small.plan.held["adapter"] - 4 * 1024) / 8
    assert large.plan.held["adapter"] - 4 * 1024 == 64 * rank_1
