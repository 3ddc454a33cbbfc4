"""Models by their names on a hub: a local server implements its protocol. No network."""

import os
import shutil
import socket
import subprocess
import sys
import time

import huggingface_hub.constants
import mlx.core as mx
import pytest

import evaluate
import pytorch_ppo_training
from models.adapters import AdapterConfig, attach_adapter
from models.loading import config_of, load, resolve
from models.torch_loading import resolve as torch_resolve
from models.value_head import HEAD_FILE, ScoringModel, new_value_head, save_value_head
from rewards.reward_model import load_reward_model
from tests.hub_server import COMMIT, HubServer
from tests.scripts import ROOT, call, fails

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
WORDS = ["--ground-truth-reward", "--num-samples", 2, "--max-completion-length", 2]


@pytest.fixture(scope="module")
def reward_folder(tiny_folder, tmp_path_factory):
    """A fused reward model with its value head, and files that no model needs."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("hub") / "reward")
    mx.random.seed(3)
    save_value_head(folder, new_value_head(load(str(folder)).model, std=None))
    (folder / "pytorch_model.bin").write_bytes(b"a large file that nobody asks for")
    (folder / "README.md").write_text("a model card")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def hub(tiny_folder, reward_folder, tmp_path, monkeypatch):
    """A hub with two models, as if set by HF_ENDPOINT, and an empty cache."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "no_model").mkdir()
    (tmp_path / "no_model" / "data.json").write_text("{}")
    served = {TINYLLAMA: tiny_folder, "someone/reward": reward_folder, "someone/data": tmp_path / "no_model"}
    with HubServer(served, gated=("meta/gated",)) as server:
        use(server.url, tmp_path / "cache", monkeypatch)
        yield server


def use(url, cache, monkeypatch):
    """Set what HF_ENDPOINT and HF_HOME set when huggingface-hub is imported."""
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    old = huggingface_hub.constants.ENDPOINT
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(old, url))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def test_a_model_is_opened_by_its_name_and_then_without_the_hub(hub, tiny_folder, tmp_path, monkeypatch):
    loaded = load(TINYLLAMA)
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(loaded.model(tokens), load(str(tiny_folder)).model(tokens)).item()
    assert loaded.name == TINYLLAMA and loaded.path.is_relative_to(tmp_path / "cache") and COMMIT in str(loaded.path)
    files = {path.name for path in loaded.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert torch_resolve(TINYLLAMA) == loaded.path  # both frameworks share the download
    fetched = [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]
    assert len(fetched) == len(set(fetched)) == len(files)
    use(closed_port(), tmp_path / "cache", monkeypatch)
    assert resolve(TINYLLAMA) == loaded.path


def test_a_plan_fetches_config_json_alone(hub, tiny_folder, capsys):
    call(evaluate.main, "--plan", "--model", TINYLLAMA)
    assert capsys.readouterr().out.splitlines()[-1].startswith("fits: ")
    assert {path.rpartition("/")[2] for _, path in hub.asked if "/resolve/" in path} == {"config.json"}
    assert config_of(TINYLLAMA, on_gpu=False) == config_of(str(tiny_folder), on_gpu=False)


def test_a_reward_model_comes_with_its_head_and_without_what_no_one_needs(hub, reward_folder):
    """mlx-lm's own download omits the head."""
    folder = resolve("someone/reward")
    files = {path.name for path in folder.iterdir()}
    assert HEAD_FILE in files and not {"pytorch_model.bin", "README.md", "modeling.py"} & files
    texts = (["2 4", "10"], [" 6", " 1 x"])
    assert load_reward_model("someone/reward").reward(*texts) == load_reward_model(str(reward_folder)).reward(*texts)


def test_the_hub_s_own_model_takes_an_adapter_and_a_head(hub):
    loaded = load(TINYLLAMA)
    attach_adapter(loaded.model, AdapterConfig("lora"))
    scoring = ScoringModel(loaded.model, new_value_head(loaded.model, std=None))
    assert scoring(mx.array([[1, 2, 3]]), mx.array([3])).shape == (1,)


@pytest.mark.parametrize("script", [evaluate, pytorch_ppo_training])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nobody/nothing", "neither a folder here nor a model on the Hugging Face hub; check its spelling"),
        ("meta/gated", "is gated on the Hugging Face hub; accept its terms"),
        ("someone/data", "contains no config.json, so it is not a model"),
    ],
)
def test_a_name_that_gives_no_model_is_one_line(hub, script, name, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = WORDS if script is evaluate else ["--ground-truth-reward"]
    line = fails(capsys, script.main, "--model", name, *words)
    assert line.startswith(name) and says in line
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["no_model"]


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("offline", [False, True])
def test_without_the_hub_a_name_is_one_line_at_once(offline, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    use(closed_port(), tmp_path / "cache", monkeypatch)
    started = time.perf_counter()
    line = fails(capsys, evaluate.main, "--model", TINYLLAMA, *WORDS)
    assert line.startswith(f"{TINYLLAMA} is not a local folder, and the Hugging Face hub did not give it")
    assert "check the network, or use --model tiny-digits" in line
    assert time.perf_counter() - started < 3


def test_the_script_as_a_user_runs_it(hub, tmp_path):
    """HF_ENDPOINT is read when huggingface-hub is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "evaluate.py", "--model", TINYLLAMA, *map(str, WORDS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "  score  " in done.stdout
    assert any(path == f"/api/models/{TINYLLAMA}/revision/main" for _, path in hub.asked)
