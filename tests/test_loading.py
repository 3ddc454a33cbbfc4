"""Opening a model by name, and sharing its weights."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

import models.folders
import models.loading
from common.errors import UserError
from models.adapters import AdapterConfig, adapter_weights, attach_adapter
from models.loading import load, resolve, twin
from tests.architectures import ARCHITECTURES, build

ROOT = Path(__file__).resolve().parent.parent
TOKENS = mx.array([[1, 2, 3, 4]])


def error_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A copy of a model folder, to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# names


def test_an_embedded_model_is_built_and_a_folder_taken_as_it_is(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(models.loading, "tiny_model_path", lambda name: Path("/cache") / name)
    assert resolve("tiny-digits") == Path("/cache/tiny-digits")
    assert resolve(str(tiny_folder)) == tiny_folder
    assert resolve(f"{tiny_folder}/") == tiny_folder
    monkeypatch.chdir(tiny_folder.parent)
    assert resolve(tiny_folder.name).samefile(tiny_folder)
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert resolve(f"~/{tiny_folder.name}") == tiny_folder


def test_a_folder_without_a_model_is_named(tmp_path):
    assert f"{tmp_path} contains no config.json" in error_of(resolve, str(tmp_path))


@pytest.mark.parametrize("name", ["./missing", "/missing/too", "~/missing-folder", "missing/", "../missing"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(models.folders, "snapshot_download", lambda name, **_: pytest.fail("asked the hub"))
    assert f"{name} is not a model folder" in error_of(resolve, name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model").write_text("")
    assert "is not a model folder" in error_of(resolve, str(tmp_path / "model"))


def test_a_hub_name_without_network_is_one_line(offline):
    message = error_of(resolve, "nobody-here/no-such-model")
    assert "nobody-here/no-such-model is not a local folder" in message and "--model tiny-digits" in message


@pytest.mark.parametrize("name", ["a/b/c", "bad name!", "-x/-y", "adapters"])
def test_what_is_no_name_at_all_is_one_line(offline, name):
    assert name in error_of(resolve, name)


@pytest.mark.parametrize("error", [OSError("proxy\nrefused"), LocalEntryNotFoundError("gone\nindeed"), OSError()])
def test_a_failing_download_is_one_line(monkeypatch, error):
    def fail(name, **_):
        raise error

    monkeypatch.setattr(models.folders, "snapshot_download", fail)
    assert "the Hugging Face hub did not give it" in error_of(resolve, "some/model")
    assert issubclass(HfHubHTTPError, OSError)  # so that every answer of the hub but 200 is caught


def test_a_downloaded_model_is_where_the_hub_put_it(monkeypatch, tiny_folder):
    monkeypatch.setattr(
        models.folders, "snapshot_download", lambda name, **_: tiny_folder if name == "some/model" else None
    )
    assert resolve("some/model") == tiny_folder


# opening


def test_a_model_is_opened_with_what_saving_it_needs(tiny_folder):
    loaded = load(str(tiny_folder))
    expected, _ = mlx_lm.load(str(tiny_folder))
    assert mx.array_equal(loaded.model(TOKENS), expected(TOKENS)).item()
    assert isinstance(loaded.tokenizer, TokenizerWrapper)
    assert loaded.config["model_type"] == "llama"
    assert (loaded.path, loaded.name) == (tiny_folder, str(tiny_folder))
    assert not any(module.training for _, module in loaded.model.named_modules())
    assert len(adapter_weights(loaded.model)) == len(tree_flatten(loaded.model.parameters()))  # nothing frozen


def change_config(folder, **entries):
    content = json.loads((folder / "config.json").read_text())
    content.update(entries)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


DAMAGES = {
    "malformed config": lambda folder: (folder / "config.json").write_text("{"),
    "config that is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "unknown family": lambda folder: change_config(folder, model_type="no_such_family"),
    "no family": lambda folder: change_config(folder, model_type=None),
    "missing setting": lambda folder: change_config(folder, hidden_size=None),
    "setting of a wrong kind": lambda folder: change_config(folder, hidden_size="large"),
    "other shapes": lambda folder: change_config(folder, intermediate_size=8),
    "missing layer": lambda folder: change_config(folder, num_hidden_layers=3),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": lambda folder: cut(folder / "model.safetensors"),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "layers without an end": lambda folder: change_config(folder, num_hidden_layers=10**9),
    "no heads": lambda folder: change_config(folder, num_attention_heads=0),
    "no EOS": lambda folder: without_eos(folder),
    "EOS that is no token": lambda folder: with_ends(folder, 10**12),
    "one of two EOS that is no token": lambda folder: with_ends(folder, [1, -1]),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "malformed tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "another tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'),
}


def with_ends(folder, ends):
    change_config(folder, eos_token_id=ends)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


def without_eos(folder):
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "eos_token"}))
    change_config(folder, eos_token_id=None)
    for name in ("generation_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_be_opened_is_one_line(copy, damage):
    load(str(copy))
    DAMAGES[damage](copy)
    assert str(copy) in error_of(load, str(copy))


# sharing


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_twin_has_the_same_arrays_and_the_same_output(name):
    model = build(name)
    other = twin(model)
    ours, theirs = dict(tree_flatten(model.parameters())), dict(tree_flatten(other.parameters()))
    assert list(ours) == list(theirs)
    assert all(theirs[key] is array for key, array in ours.items())
    assert mx.array_equal(other(TOKENS), model(TOKENS)).item()


def test_a_twin_takes_no_memory():
    model = build("llama-untied", hidden_size=256, vocab_size=2000)
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    other = twin(model)
    mx.eval(other.parameters())
    assert mx.get_active_memory() - before < 100_000 < sum(a.nbytes for _, a in tree_flatten(model.parameters()))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("train_twin", [False, True])
def test_training_one_leaves_the_other(kind, train_twin):
    model = build("llama-tied")
    before = model(TOKENS)
    model.freeze()
    other = twin(model)
    learner, still = (other, model) if train_twin else (model, other)
    attach_adapter(learner, AdapterConfig(kind, -1))
    optimizer = optim.Adam(0.1)
    for _ in range(2):  # a LoRA's first gradient reaches one of its two factors only
        _, gradients = nn.value_and_grad(learner, lambda: (learner(TOKENS) ** 2).sum())()
        optimizer.update(learner, gradients)
    assert not mx.array_equal(learner(TOKENS), before).item()
    assert mx.array_equal(still(TOKENS), before).item()
    assert not tree_flatten(still.trainable_parameters())  # freezing is each tree's own as well


def test_a_twin_of_a_quantized_model_and_of_one_with_an_adapter():
    model = build("llama-tied")
    nn.quantize(model, group_size=32, bits=4)
    attach_adapter(model, AdapterConfig("lora", -1))
    other = twin(model)
    assert mx.array_equal(other(TOKENS), model(TOKENS)).item()
    assert list(adapter_weights(other)) == list(adapter_weights(model))
