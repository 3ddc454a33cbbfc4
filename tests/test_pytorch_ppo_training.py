"""pytorch_ppo_training.py from the command line: without mlx, resumed bit for bit, with the report of its twin."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ppo_training as mlx_script
import pytorch_ppo_training as script
from common import locate
from common.cli import Stopped
from common.errors import UserError
from models import torch_adapters, torch_loading, torch_token_stats, torch_value_head
from models.adapter_config import AdapterConfig
from models.torch_value_head import ValueHead
from tests.scripts import ROOT, call, fails, read_samples
from tests.torch_models import random_llama
from training import optimizer_groups, torch_ppo_learner
from training.metrics import read_metrics

SMALL = ("--batch-size", 8, "--mini-batch-size", 4, "--max-completion-length", 6, "--device", "cpu", "--save-every", 1)
RATE = ("--lr-schedule", "cosine", "--warmup-steps", 3)
KINDS = {"lora": [], "soft_prompt": ["--prompt-tuning"]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, and no pictures: each takes as long as all the rest. The runs in processes of their own draw them."""
    monkeypatch.setattr(script, "plot_run", lambda folder: folder / "curves.png")
    monkeypatch.setattr(mlx_script, "plot_run", lambda folder: folder / "curves.png")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("base"))


def process(folder, before, after, *words):
    """The script in a process of its own, in `folder`, with Python code before and after it."""
    program = (
        f"import runpy, sys\n{before}\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = ['pytorch_ppo_training.py', *{[str(word) for word in words]!r}]\n"
        f"runpy.run_path({str(ROOT / 'pytorch_ppo_training.py')!r}, run_name='__main__')\n{after}\n"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_walkthroughs_command_runs_and_never_imports_mlx(base, tmp_path):
    tracker = ["--log_with", "wandb"] if importlib.util.find_spec("wandb") else []
    done = process(
        tmp_path,
        "",
        "loaded = {name.partition('.')[0] for name in sys.modules} & {'mlx', 'mlx_lm'}\nassert not loaded, loaded",
        *("--model", base, "--batch_size", 32, "--mini_batch_size", 32, "--ppo_epoch", 4, *tracker),
        *("--ground_truth_reward", "--tokenizer", base, "--num_steps", 2, "--adap_kl_ctrl", "True"),
        *("--init_kl_coef", 0.2, "--seed", 7, "--max_completion_length", 12),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +2  +\d\.\d{3} ", done.stdout, flags=re.MULTILINE) and "Summary" in done.stdout
    assert (tmp_path / "ppo_adapters" / "adapters.safetensors").is_file()
    run = next((tmp_path / "runs").iterdir())
    assert [row["updates"] for row in read_metrics(run)] == [4, 4]
    assert (run / "curves.png").is_file()


def test_it_runs_where_mlx_cannot_be_imported(base, tmp_path):
    blocked = "sys.modules['mlx'] = sys.modules['mlx_lm'] = None"
    words = ("--model", base, "--ground-truth-reward", "--num-steps", 1, "--output-dir", "run", *SMALL)
    done = process(tmp_path, blocked, "", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "000001" / "optimizer.safetensors").is_file()


def test_a_pass_whose_attention_scores_would_be_too_large_is_split(base, tmp_path, monkeypatch):
    words = ("--model", base, "--ground-truth-reward", "--num-steps", 2, *SMALL)
    call(script.main, *words, "--output-dir", tmp_path / "whole", "--save-file", tmp_path / "whole-adapter")
    rows: list[int] = []
    hidden_states = torch_value_head.hidden_states

    def noted(model, tokens, positions):
        rows.append(len(tokens))
        return hidden_states(model, tokens, positions)

    monkeypatch.setattr(torch_value_head, "hidden_states", noted)
    # Two rows, four heads, L of 10 to 12: up to 2 · 4 · 12 · 12 scores of 4 bytes.
    monkeypatch.setitem(torch_token_stats.LARGEST_ARRAY, "cpu", 4 * (2 * 4 * 12 * 12))
    call(script.main, *words, "--output-dir", tmp_path / "split", "--save-file", tmp_path / "split-adapter")
    assert set(rows) == {2}, rows
    whole, split = (read_metrics(tmp_path / name)[-1] for name in ("whole", "split"))
    for name in ("mean_score", "kl", "policy_loss", "grad_norm", "ratio_max", "entropy"):
        assert split[name] == pytest.approx(whole[name], abs=1e-5)


# --- resuming ---


def contents(folder):
    """All that a run leaves, but for the seconds it took."""
    seconds = ("seconds", "rollout_seconds", "update_seconds", "tokens_per_second", "peak_memory_gb")
    rows = [{name: value for name, value in row.items() if name not in seconds} for row in read_metrics(folder)]
    last = sorted((folder / "checkpoints").iterdir())[-1]
    files = {str(path.relative_to(last)): path.read_bytes() for path in last.rglob("*.safetensors")}
    state = json.loads((last / "state.json").read_text(encoding="utf-8"))
    return rows, read_samples(folder), files, {name: value for name, value in state.items() if name != "seconds"}


def stop_by_signal(monkeypatch):
    """SIGTERM while the second rollout is sampled: the step is ended and saved."""
    calls, sample = [], torch_ppo_learner.sample

    def sample_and_stop(*args, **more):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **more)

    monkeypatch.setattr(torch_ppo_learner, "sample", sample_and_stop)


def kill(monkeypatch):
    """As if killed in the third update, long after the last checkpoint."""
    calls, take_step = [], torch_ppo_learner.take_step

    def step_and_die(*args):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return take_step(*args)

    monkeypatch.setattr(torch_ppo_learner, "take_step", step_and_die)


@pytest.mark.parametrize("stop", [stop_by_signal, kill])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_as_if_it_never_had(kind, stop, base, tmp_path, monkeypatch):
    words = ("--model", base, "--ground-truth-reward", "--num-steps", 4, "--scale-scores", *SMALL, *KINDS[kind], *RATE)
    words += ("--steps-per-samples", 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(script.main, *words, "--output-dir", whole, "--save-file", tmp_path / "whole-adapter")
    with monkeypatch.context() as patch:
        stop(patch)
        with pytest.raises((Stopped, KeyboardInterrupt)):
            call(script.main, *words, "--output-dir", parts, "--save-file", tmp_path / "parts-adapter")
    assert json.loads((parts / "checkpoints" / "000002" / "state.json").read_text(encoding="utf-8"))["step"] == 2
    assert not (parts / "checkpoints" / "000003").exists()
    torch.manual_seed(123)
    call(script.main, "--resume", parts)
    assert contents(parts) == contents(whole) and len(read_samples(whole)) == 4 * 8
    files = [tmp_path / name / "adapters.safetensors" for name in ("whole-adapter", "parts-adapter")]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- the same run as its twin's ---


def test_report_and_run_folder_are_those_of_the_mlx_script(base, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    reward = ("--ground-truth-reward", "--reward-function", tmp_path / "mine.py:short")
    weights = ("--reward-weights", "digit_rule=1", "short=0.1")
    words = ("--model", base, *reward, *weights, "--num-steps", 1, *SMALL)
    words_of = {script: words, mlx_script: [word for word in words if word not in ("--device", "cpu")]}
    rows, files, lines = [], [], []
    for number, (one, given) in enumerate(words_of.items()):
        folder = tmp_path / str(number)
        call(one.main, *given, "--output-dir", folder, "--save-file", tmp_path / f"adapter{number}")
        rows.append([*read_metrics(folder)[0], *read_samples(folder)[0]])
        means = read_metrics(folder)[0]
        assert means["mean_score"] == pytest.approx(means["score_digit_rule"] + 0.1 * means["score_short"])
        files.append(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
        printed = capsys.readouterr().out
        lines.append(next(line for line in printed.splitlines() if line.startswith("  step")).split())
        lines[-1] += [line.split("  ")[1] for line in printed.partition("Summary\n")[2].splitlines()]
    assert rows[0] == rows[1]
    assert "samples.jsonl" in files[0]
    assert files[0] == files[1]
    assert lines[0] == [word for word in lines[1] if word != "planned GB"]  # a plan is for MLX alone


def test_it_learns(base, tmp_path):
    """From a random model to one that writes the token it is paid for."""
    (tmp_path / "reward.py").write_text(
        "def score(prompts, completions):\n    return [c.count('7') / 6 for c in completions]\n", encoding="utf-8"
    )
    words = ("--model", base, "--reward-function", f"{tmp_path / 'reward.py'}:score", "--num-steps", 24)
    larger = (*SMALL, "--batch-size", 32, "--mini-batch-size", 16, "--learning-rate", 3e-3)
    call(script.main, *words, *larger, "--output-dir", tmp_path / "run", "--save-file", tmp_path / "adapter")
    rows = read_metrics(tmp_path / "run")
    first, last = (sum(row["mean_score"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.3
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    assert "true_score" in rows[0]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reward_model_on_the_same_base(kind, base, tmp_path):
    model = torch_loading.load(base, torch.device("cpu")).model
    adapter = AdapterConfig("lora", model=base)
    torch_adapters.attach_adapter(model, adapter)
    torch_adapters.save_adapter(tmp_path / "reward", model, adapter, ValueHead(32))
    words = ("--model", base, "--reward-model", tmp_path / "reward", "--num-steps", 1, "--fine-tune-type", kind, *SMALL)
    call(script.main, *words, "--output-dir", tmp_path / "run", "--save-file", tmp_path / "adapter.npz")
    assert read_metrics(tmp_path / "run")[0]["mean_score"] == 0  # its head is 0
    assert torch_adapters.read_adapter(tmp_path / "adapter.npz").config.fine_tune_type == kind


def test_dropout_is_off_though_the_resumed_adapter_has_one(base, tmp_path):
    model = torch_loading.load(base, torch.device("cpu")).model
    adapter = AdapterConfig("lora", lora_parameters={"rank": 4, "scale": 2.0, "dropout": 0.5}, model=base)
    torch_adapters.attach_adapter(model, adapter)
    assert not any(module.training for module in model.modules())
    for weight in model.parameters():
        weight.data += 0.1 * weight.requires_grad
    torch_adapters.save_adapter(tmp_path / "start", model, adapter)
    words = ("--model", base, "--ground-truth-reward", "--num-steps", 1, "--resume-file", tmp_path / "start", *SMALL)
    one_update = ("--mini-batch-size", 8, "--ppo-epochs", 1)
    call(script.main, *words, *one_update, "--output-dir", tmp_path / "run", "--save-file", tmp_path / "adapter")
    row = read_metrics(tmp_path / "run")[0]
    assert (row["kl"], row["approx_kl"], row["ratio_max"]) == (
        0,
        pytest.approx(0, abs=1e-10),
        pytest.approx(1, abs=1e-5),
    )


# --- a user's mistakes ---


def test_mistakes_are_one_line(base, tmp_path, capsys, monkeypatch):
    reward = "--ground-truth-reward"
    assert "give one, or several" in fails(capsys, script.main, "--model", base)
    assert "not a model folder" in fails(capsys, script.main, "--model", tmp_path / "no", reward)
    assert "no config.json" in fails(capsys, script.main, "--model", tmp_path, reward)
    assert "not a model folder" in fails(capsys, script.main, "--model", base, "--tokenizer", "./no", reward)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "is not available here" in fails(capsys, script.main, "--model", base, "--device", "cuda", reward)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert "cannot be opened" in fails(capsys, script.main, "--model", tmp_path, reward)
    adapter = tmp_path / "adapter"
    small = random_llama(tmp_path / "small", vocab_size=40)
    assert "has 98 tokens" in fails(capsys, script.main, "--model", small, "--tokenizer", base, reward)
    assert "does not exist" in fails(capsys, script.main, "--model", base, "--resume-file", adapter, reward)


def test_a_large_model_s_rate_is_that_of_the_mlx_script_and_kept(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optimizer_groups, "LARGE", 1000)
    words = ("--model", base, "--ground-truth-reward", "--num-steps", 1, *SMALL)
    call(script.main, *words, "--output-dir", tmp_path / "run", "--save-file", tmp_path / "adapter")
    assert "by Adam, learning rate 5e-05 (chosen by the model's size; " in capsys.readouterr().out
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert (config["learning_rate"], config["step_kl"]) == (5e-5, 0.02)


def test_a_run_of_one_script_is_not_resumed_by_the_other(base, tmp_path, capsys):
    words = ("--model", base, "--ground-truth-reward", "--num-steps", 1, *SMALL)
    call(script.main, *words, "--output-dir", tmp_path / "run", "--save-file", tmp_path / "adapter")
    assert "(flags device, tokenizer)" in fails(capsys, mlx_script.main, "--resume", tmp_path / "run")


# --- loading ---


def test_the_embedded_model_is_the_last_line_of_the_program_that_builds_it(monkeypatch, tmp_path):
    def program(code):
        monkeypatch.setattr(locate, "COMMAND", (sys.executable, "-c", f"import sys; {code}"))

    program("print('notes'); print(sys.argv[1] + '/folder')")
    assert torch_loading.resolve("tiny-digits") == Path("tiny-digits/folder")
    program("print('no room'); sys.exit(2)")
    with pytest.raises(UserError, match=r"^no room$"):
        torch_loading.resolve("tiny-digits")
    program("sys.exit('a bug')")
    with pytest.raises(UserError, match="could not be located"):
        torch_loading.resolve("tiny-digits")


def test_devices(monkeypatch):
    there = {"cuda": False, "mps": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert torch_loading.choose_device("auto").type == "cpu"
    there["mps"] = True
    assert torch_loading.choose_device("auto").type == "mps"
    there["cuda"] = True
    assert torch_loading.choose_device("auto").type == "cuda"
    assert torch_loading.choose_device("cpu").type == "cpu"


def test_a_twin_shares_what_is_frozen_and_copies_what_is_trained(base):
    model = torch_loading.load(base, torch.device("cpu")).model
    torch_adapters.attach_adapter(model, AdapterConfig("lora", num_layers=1))
    other = dict(torch_loading.twin(model).named_parameters())
    for name, weight in model.named_parameters():
        assert (other[name] is weight) == (not weight.requires_grad)
        assert torch.equal(other[name], weight)
