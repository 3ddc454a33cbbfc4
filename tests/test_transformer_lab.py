"""ppo_training.py as called by Transformer Lab: its flags, its parser of the output, and the model it expects."""

import json
import re
import subprocess
import sys
import threading

import mlx.core as mx
import mlx_lm
import pytest

import ppo_training
from data.batching import encode_prompt
from models.adapters import read_adapter
from models.export.fused import check_free
from models.loading import load
from rewards.build import build_reward
from tests.scripts import ROOT, fails, with_words
from training import ppo_flags
from training.metrics import read_metrics, resumed_config
from training.transformer_lab import own_flags, reader_line

# What its trainer searches for in every line of stdout and stderr.
STEP = re.compile(r"Step - (\d+)")
REWARD = re.compile(r"Reward: array\((.*?), dtype=float32\)")
FIGURES = re.compile(r"(policy_loss|value_loss|kl_div|entropy): ([-+]?\d*\.\d+|\d+)")


def its_reader(lines):
    """Steps, {name: values} and lists of rewards, as parsed by its trainer."""
    steps: list[int] = []
    figures: dict[str, list[float]] = {}
    rewards: list[list[float]] = []
    for line in lines:
        steps += [int(match[1]) for match in [STEP.search(line)] if match]
        for match in FIGURES.finditer(line):
            figures.setdefault(match[1], []).append(float(match[2]))
        if scores := REWARD.search(line):
            rewards.append([float(word) for word in scores[1].strip("[]").split(",")])
    return steps, figures, rewards


@pytest.fixture
def rows(tmp_path):
    """A data set in its users' format, one JSON object per line."""
    path = tmp_path / "ppo_custom_dataset.json"
    conversation = [{"from": "human", "value": "8 20"}]
    row = {"conversations": conversation, "chosen": {"from": "gpt", "value": "22"}, "rejected": {"value": "1"}}
    path.write_text("".join(json.dumps({**row, "id": n}) + "\n" for n in range(4)))
    return path


def its_flags(model, rows, folder):
    return [
        f"--model={model}", "--batch_size=4", "--mini_batch_size=4", "--ppo_epoch=1", "--num_steps=2",
        "--init_kl_coef=0.2", "--seed=42", f"--custom_hf_dataset={rows}", "--max_completion_length=4",
        f"--output_dir={folder}", "--ground_truth_reward", "--adap_kl_ctrl=True",
    ]  # fmt: skip


def test_its_reader_finds_steps_figures_and_a_model(tmp_path, tiny_folder):
    rows = tmp_path / "rows.json"
    starts = (2, 8, 21)  # an odd one too: equal scores teach nothing
    rows.write_text("".join(json.dumps({"prompt": str(start)}) + "\n" for start in starts))
    folder = tmp_path / "models" / "tiny_default_ppo"
    folder.mkdir(parents=True)  # as it does before the call
    process = subprocess.run(
        [sys.executable, str(ROOT / "ppo_training.py"), *its_flags(tiny_folder, rows, folder)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout
    steps, figures, rewards = its_reader(process.stdout.splitlines())
    assert sorted(set(steps)) == [1, 2]
    metrics = read_metrics(folder / "run")
    for name in ("policy_loss", "value_loss", "kl_div", "entropy"):
        wanted = [row["kl" if name == "kl_div" else name] for row in metrics]
        assert figures[name] == pytest.approx(wanted, rel=1e-3, abs=1e-12), name
    means = [sum(step) / len(step) for step in rewards]
    assert means == pytest.approx([row["mean_score"] for row in metrics], rel=1e-3) and len(rewards[0]) == 4

    model, tokenizer = mlx_lm.load(str(folder))
    ours, _ = mlx_lm.load(str(tiny_folder), adapter_path=str(folder / "run" / "adapters"))
    tokens = mx.array([tokenizer.encode("8 20")])
    fused, adapted, base = (each(tokens) for each in (model, ours, load(str(tiny_folder)).model))
    assert mx.abs(fused - adapted).max().item() < 1e-5 < mx.abs(fused - base).max().item()
    # Nothing is left in the working directory, and the run below the model is an ordinary run.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "rows.json"]
    assert resumed_config(folder / "run")["num_steps"] == 2 and (folder / "run" / "summary.json").is_file()
    assert read_adapter(folder / "run" / "adapters").config.fine_tune_type == "lora"


def test_its_conversations_are_prompts_and_what_was_chosen_their_answer(tiny_folder, rows):
    args = flags_of("--custom_hf_dataset", rows, "--ground_truth_reward")
    loaded = load(str(tiny_folder))
    (prompt,) = set(ppo_flags.choose_prompts(args, loaded.tokenizer))
    assert encode_prompt(loaded.tokenizer, prompt) == loaded.tokenizer.encode("8 20")  # one BOS, as in chat
    assert build_reward(args, loaded)([prompt] * 3, [" 22", " 22 24", ""]) == [1.0, 0.0, 0.0]


def flags_of(*words):
    return own_flags(with_words(ppo_training.parse_args, *words))


def test_prompts_without_answers_are_scored_by_the_digit_rule(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "8"}\n')
    args = flags_of("--custom_hf_dataset", path, "--ground_truth_reward")
    assert (args.ground_truth_reward, args.answer, args.prompts) == (True, None, str(path))
    assert args.fused_model is None and args.save_file == "ppo_adapters" and args.output_dir is None


@pytest.mark.parametrize("key", ["answer", "Output", "chosen"])
def test_answers_are_found_by_each_of_their_names(tmp_path, key):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 2 =", key: "4"}) + "\n")
    args = flags_of("--custom_hf_dataset", path, "--ground_truth_reward")
    assert (args.ground_truth_reward, args.answer, args.answer_feature) == (False, "exact", key)
    # Rewards other than the ground truth are unchanged.
    args = flags_of("--custom_hf_dataset", path, "--reward_model", "dir")
    assert (args.reward_model, args.answer) == (["dir"], None)


def test_other_calls_are_left_as_they_are():
    args = with_words(ppo_training.parse_args, "--ground_truth_reward", "--output_dir", "a")
    assert own_flags(args) is args


def test_figures_are_read_whole_however_small():
    line = reader_line(7, {"kl": 2.134567e-5}, [0.25, 1.0, -3e-6])
    assert its_reader([line]) == ([7], {"kl_div": [0.00002135]}, [[0.25, 1.0, -3e-6]])


def test_a_report_is_out_of_the_process_before_the_next_step(tmp_path):
    code = (
        "import sys\nfrom training.metrics import RunLog, start_run_folder\n"
        f"log = RunLog(start_run_folder({str(tmp_path / 'run')!r}, {{}}), 2)\n"
        "log.report(1, {'policy_loss': 0.5})\nsys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        killer = threading.Timer(20, process.kill)
        killer.start()
        try:
            assert process.stdout.readline() == "Step - 1 | policy_loss: 0.5\n"  # while it waits for its input
        finally:
            killer.cancel()
            process.stdin.close()


def test_what_cannot_work_is_one_line(tmp_path, tiny_folder, rows, capsys):
    out = tmp_path / "out"
    words = its_flags(tiny_folder, rows, out)
    assert "they mean the same" in fails(capsys, ppo_training.main, *words, "--prompts", rows)
    assert "soft prompt" in fails(capsys, ppo_training.main, *words, "--prompt_tuning")
    assert not out.exists()
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "already contains a model or a run" in fails(capsys, ppo_training.main, *words)
    check_free(out, again=True)
    rows.write_text('{"text": "8"}\n')
    assert f"{rows}:1 has the keys ['text']" in fails(capsys, ppo_training.main, *words, "--output-dir", tmp_path / "b")
