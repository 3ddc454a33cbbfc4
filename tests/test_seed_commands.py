"""Each command of the walkthrough that this project follows, as written there, for a few iterations.

Written otherwise: tiny-digits stands for TinyLlama and for <path_to_model>, and the fused SFT model for the author's
even-digit model. Flags appended at the end shorten a run: of two equal flags the later counts.
"""

import importlib
import importlib.util
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import read_json
from data.digits import DigitRule
from data.records import read_rows
from models.adapter_config import HEAD_FILE
from models.adapters import read_adapter
from models.loading import load
from tests.scripts import ROOT, call, fails
from training.metrics import read_metrics

GENERATE = "python generate_digit_data.py --increasing --multiple-of 2 --num-samples 150 --noise 0.0"
SFT = """python sft.py --model <path_to_model> \\
               --train \\
               --iters 600 \\
               --save-file lora_weights.npz"""
REWARD_MODEL = """python sft.py --reward-model --train --data-base reward_function_increasing_mult_2_ --batch-size 16 \\
    --save-file reward_lora.npz --model TinyLlama/TinyLlama-1.1B-Chat-v1.0"""
FUSE = """python fuse.py --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --adapter-file lora_weights.npz \\
    --save-path ./sft_fine_tune/"""
PPO_GROUND_TRUTH = """python ppo_training.py --model ./sft_fine_tune/ \\
               --ground_truth_reward \\
               --log_with=wandb"""
PPO_REWARD_MODEL = """python ppo_training.py --model ./sft_fine_tune/ \\
               --reward_model ./reward_model/ \\
               --log_with=wandb"""
REPRODUCE_MLX = """python ppo_training.py --log_with=wandb --model andrewsilva/increasing_even_digit_fine_tune \\
    --batch_size 32 --mini_batch_size 32 --ppo_epoch 4 --ground_truth_reward --num_steps 500 --adap_kl_ctrl True \\
    --init_kl_coef 0.2 --seed 7"""
REPRODUCE_PYTORCH = """python pytorch_ppo_training.py --model andrewsilva/increasing_even_digit_fine_tune \\
    --batch_size 32 --mini_batch_size 32 --ppo_epoch 4 --log_with wandb --ground_truth_reward \\
    --tokenizer TinyLlama/TinyLlama-1.1B-Chat-v1.0 --num_steps 5550 --adap_kl_ctrl True --init_kl_coef 0.2 --seed 7"""
CHAT = """python talk_to_model.py --model <path_to_model> \\
               --resume-file <path_to_adapters.npz> \\
               --max-tokens 50 \\
               --temp 0.0"""
STAND_INS = {
    "<path_to_model>": "tiny-digits",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tiny-digits",
    "andrewsilva/increasing_even_digit_fine_tune": "./sft_fine_tune/",
    "<path_to_adapters.npz>": "lora_weights.npz",
}
# What the walkthrough's commands may have left in this tree, by its own names.
MADE = ("*.npz", "lora_weights.json", "reward_lora.json", "sft_fine_tune", "reward_model")
HAS_WANDB = importlib.util.find_spec("wandb") is not None


def words_of(command):
    """Script and flags of a command, with what stands in for the models."""
    for name, stand_in in STAND_INS.items():
        command = command.replace(name, stand_in)
    python, script, *flags = shlex.split(command.replace("\\\n", " "))
    assert python == "python"
    return script, flags


def run(command, *shorter):
    """The command in this process, in the current folder."""
    script, flags = words_of(command)
    if not HAS_WANDB:
        shorter = (*shorter, "--log_with", "none") if "wandb" in command else shorter
    call(importlib.import_module(script.removesuffix(".py")).main, *flags, *shorter)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, tiny_digits):
    """A copy of the tree, so that nothing is written into this one, under git, which says what changes it."""
    folder = tmp_path_factory.mktemp("walkthrough") / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "runs", "demo", *MADE)
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copy(ROOT / ".gitignore", folder)
    if shutil.which("git"):
        git(folder, "init", "-q")
        git(folder, "add", "-A")
    return folder


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def inside(checkout, monkeypatch):
    """Work in the copy, with wandb (where it is installed) kept off the network."""
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return checkout


@pytest.fixture(scope="module")
def fine_tuned(checkout):
    """The SFT adapter and the model fused from it, made by the walkthrough's commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        run(SFT, "--iters", 3)
        run(FUSE)
    return checkout


@pytest.fixture(scope="module")
def reward_model(checkout):
    """The reward model, fused as the walkthrough says ("You can do this to save a reward model")."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        run(REWARD_MODEL, "--iters", 3)
        run(FUSE, "--adapter-file", "reward_lora.npz", "--save-path", "./reward_model/")
    return checkout


def last_run(checkout):
    """The metrics of the newest run folder."""
    folder = max((checkout / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    tracked = read_json(folder / "config.json")["log_with"] == "wandb"
    assert (folder / "wandb").is_dir() is tracked
    return read_metrics(folder)


def test_generating_data(checkout):
    script, flags = words_of(GENERATE)
    before = {path.name for path in (checkout / "data").iterdir()}
    words, folder = [sys.executable, script, *flags], checkout / "data"
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (checkout / "data").iterdir()} - {"__pycache__"} == before
    rows = read_rows(checkout / "data" / "increasing_mult_2_train.jsonl", [("text", "reward")])
    assert len(rows) == 150 and {row["reward"] for row in rows} == {1.0}


def test_supervised_fine_tuning_and_fusing(fine_tuned):
    assert read_adapter(fine_tuned / "lora_weights.npz").config.fine_tune_type == "lora"
    assert load(str(fine_tuned / "sft_fine_tune")).config["model_type"] == "llama"


def test_learning_a_reward_model(reward_model):
    assert read_adapter(reward_model / "reward_lora.npz").value_head is not None
    assert (reward_model / "reward_model" / HEAD_FILE).is_file()


def test_ppo_on_the_ground_truth(inside, fine_tuned):
    run(PPO_GROUND_TRUTH, "--num_steps", 1)
    (row,) = last_run(inside)
    assert row["step"] == 1 and row["updates"] > 0


def test_ppo_on_the_learned_reward(inside, fine_tuned, reward_model):
    run(PPO_REWARD_MODEL, "--num_steps", 1)
    (row,) = last_run(inside)
    assert 0 <= row["true_score"] <= 1 != row["mean_score"]


def test_reproducing_with_mlx(inside, fine_tuned):
    run(REPRODUCE_MLX, "--num_steps", 2)
    rows = last_run(inside)
    assert [row["updates"] for row in rows] == [4, 4]
    assert rows[0]["kl_coef"] == 0.2 != rows[1]["kl_coef"]


def test_reproducing_with_pytorch(inside, fine_tuned):
    run(REPRODUCE_PYTORCH, "--num_steps", 2)
    rows = last_run(inside)
    assert [row["updates"] for row in rows] == [4, 4]
    assert rows[0]["kl_coef"] == 0.2 != rows[1]["kl_coef"]


def test_chatting(inside, fine_tuned, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("8 20 22\n\n30 36\n"))
    run(CHAT)
    replies = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(replies) == 2
    assert DigitRule(multiple_of=1).score("8 20 22 " + replies[0]) > 0.5


def test_continuing_with_an_adapter(inside, fine_tuned):
    run(SFT, "--iters", 3, "--resume-adapter-file", "lora_weights.npz", "--save-file", "more.npz", "--test")
    assert Path("more.npz").is_file()


@pytest.mark.parametrize("command", [PPO_GROUND_TRUTH, REPRODUCE_MLX, REPRODUCE_PYTORCH])
def test_without_wandb_its_flag_is_one_line_that_says_what_to_install(inside, fine_tuned, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "wandb", None)
    script, flags = words_of(command)
    assert "pip install wandb" in fails(capsys, importlib.import_module(script.removesuffix(".py")).main, *flags)


def test_custom_data_in_the_walkthrough_s_form(inside, fine_tuned):
    Path("my_data").mkdir()
    for split in ("train", "valid"):
        row = {"text": "8 20 22 30 36 38 50 60 68", "reward": "1.0"}
        Path(f"my_data/mine_{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    run(SFT, "--data=my_data", "--data-base=mine_", "--iters", 2)
    assert last_run(inside)[-1]["step"] == 2


def test_the_walkthrough_leaves_the_checkout_clean(fine_tuned, reward_model):
    """All that its commands made is ignored, the adapters' descriptions too; data generated anew are those of git."""
    for name in ("lora_weights.npz", "lora_weights.json", "reward_lora.npz", "reward_lora.json"):
        assert (fine_tuned / name).is_file()
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    status = [line for line in git(fine_tuned, "status", "--porcelain").splitlines() if line[:2] != "A "]
    assert [line for line in status if "my_data/" not in line] == []  # a user's own data are theirs to keep
