"""Fusing: the folder gives the same output as the adapter, is standalone, and opens in other libraries."""

import json
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import AutoModelForCausalLM, AutoTokenizer

import fuse
from models.adapters import AdapterConfig, adapter_weights, attach_adapter, load_adapter, save_adapter
from models.export.fused import save_fused
from models.loading import load
from models.value_head import HEAD_FILE, new_value_head
from rewards.reward_model import load_reward_model
from tests.scripts import ROOT, call, fails

TOKENS = [[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]]
TEXTS = (["2 4", "2 4", "10"], [" 6 8", "", " 12 13 14 15"])


def logits_of(model):
    return np.array(model(mx.array(TOKENS)))


def close(got, expected, tolerance=1e-4):
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.fixture(scope="module")
def quantized_folder(tiny_folder, tmp_path_factory):
    """The tiny model in 4 bits."""
    loaded = load(str(tiny_folder))
    model, config = mlx_lm.utils.quantize_model(loaded.model, loaded.config, group_size=32, bits=4)
    folder = tmp_path_factory.mktemp("models") / "tiny-4bit"
    mlx_lm.utils.save(folder, tiny_folder, model, loaded.tokenizer, config)
    return folder


def save_trained(path, folder, kind="lora", with_head=False, scale=3.0):
    """An adapter on the model in `folder`, with weights as if trained; returns the model with the adapter on it."""
    config = AdapterConfig(kind, -1, {"rank": 4, "scale": scale, "dropout": 0.1}, 3, model=str(folder))
    model = load(str(folder)).model
    attach_adapter(model, config)
    mx.random.seed(5)
    moved = [(name, w + 0.1 * mx.random.normal(w.shape)) for name, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    model.eval()
    save_adapter(path, model, config, new_value_head(model, std=None) if with_head else None)
    return model


def fused(folder, adapter, target, *flags):
    """Run the script; returns the model as mlx-lm opens it, and its config."""
    call(fuse.main, "--model", folder, "--adapter-file", adapter, "--save-path", target, *flags)
    model, _ = mlx_lm.load(str(target))
    return model, json.loads((target / "config.json").read_text())


def is_quantized(model):
    return any(isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) for _, module in model.named_modules())


@pytest.mark.parametrize(("kind", "scale"), [("lora", 3.0), ("lora", 0.5), ("dora", 3.0), ("full", 3.0), ("none", 3.0)])
def test_the_fused_model_says_what_the_adapter_said(tiny_folder, tmp_path, kind, scale):
    """At the scale of training."""
    adapted = save_trained(tmp_path / "adapters", tiny_folder, kind, scale=scale)
    model, _ = fused(tiny_folder, tmp_path / "adapters", tmp_path / "out")
    close(logits_of(model), logits_of(adapted))
    assert list(dict(tree_flatten(model.parameters()))) == list(
        dict(tree_flatten(load(str(tiny_folder)).model.parameters()))
    )
    if kind != "none":  # the comparison is sensitive: the base, and the adapter at twice the scale, differ
        base = logits_of(load(str(tiny_folder)).model)
        assert np.abs(logits_of(model) - base).max() > 0.05 * np.abs(base).max()
    if kind == "lora":
        for _, module in adapted.named_modules():
            if hasattr(module, "lora_a"):
                module.scale *= 2
        assert np.abs(logits_of(model) - logits_of(adapted)).max() > 0.05 * np.abs(base).max()


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("by", ["fuse.py", "--fused-model"])
def test_the_fused_model_has_the_precision_of_its_base(tiny_folder, tmp_path, kind, by):
    loaded = load(str(tiny_folder))
    loaded.model.set_dtype(mx.bfloat16)
    mlx_lm.utils.save(tmp_path / "base", tiny_folder, loaded.model, loaded.tokenizer, loaded.config)
    save_trained(tmp_path / "adapters", tmp_path / "base", kind)
    if by == "fuse.py":
        fused(tmp_path / "base", tmp_path / "adapters", tmp_path / "out")
    else:
        base = load(str(tmp_path / "base"))
        load_adapter(base.model, tmp_path / "adapters")
        save_fused(base, tmp_path / "out")
    assert {weight.dtype for weight in mx.load(str(tmp_path / "out/model.safetensors")).values()} == {mx.bfloat16}


@pytest.mark.parametrize("form", ["adapters.npz", "adapters.safetensors"])
def test_a_single_file_is_fused_as_well(tiny_folder, tmp_path, form):
    adapted = save_trained(tmp_path / form, tiny_folder)
    close(logits_of(fused(tiny_folder, tmp_path / form, tmp_path / "out")[0]), logits_of(adapted))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_quantized_base_stays_quantized_or_is_written_in_full(tiny_folder, quantized_folder, tmp_path, kind):
    adapted = save_trained(tmp_path / "adapters", quantized_folder, kind)
    expected = logits_of(adapted)
    moved = np.abs(expected - logits_of(load(str(quantized_folder)).model)).mean()

    model, config = fused(quantized_folder, tmp_path / "adapters", tmp_path / "small")
    assert is_quantized(model) and config["quantization"]["bits"] == 4
    # Quantizing again loses something, but less than what was learned.
    assert 0 < np.abs(logits_of(model) - expected).mean() < 0.5 * moved

    model, config = fused(quantized_folder, tmp_path / "adapters", tmp_path / "large", "--de-quantize")
    assert not is_quantized(model) and not {"quantization", "quantization_config"} & config.keys()
    names = {name for name, _ in tree_flatten(load(str(tiny_folder)).model.parameters())}
    assert {name for name, _ in tree_flatten(model.parameters())} == names
    close(logits_of(model), expected)


def test_the_value_head_goes_along(tiny_folder, tmp_path):
    """An adapter on a shared base and the fused folder give the same scores."""
    save_trained(tmp_path / "reward", tiny_folder, with_head=True)
    _, config = fused(tiny_folder, tmp_path / "reward", tmp_path / "out")
    assert config["value_head"] == {"file": HEAD_FILE, "hidden_size": 64}
    base = load(str(tiny_folder))
    by_adapter = load_reward_model(str(tmp_path / "reward"), base).reward(*TEXTS)
    by_folder = load_reward_model(str(tmp_path / "out"), base).reward(*TEXTS)
    assert by_folder == pytest.approx(by_adapter, abs=1e-4)
    assert len({round(score, 3) for score in by_folder}) == 3


def test_a_head_alone_makes_a_reward_model_of_the_base(tiny_folder, tmp_path):
    save_trained(tmp_path / "reward", tiny_folder, "none", with_head=True)
    model, _ = fused(tiny_folder, tmp_path / "reward", tmp_path / "out")
    assert np.array_equal(logits_of(model), logits_of(load(str(tiny_folder)).model))
    expected = load_reward_model(str(tmp_path / "reward")).reward(*TEXTS)
    assert load_reward_model(str(tmp_path / "out")).reward(*TEXTS) == pytest.approx(expected, abs=1e-5)


def test_a_quantized_reward_model_keeps_its_head(quantized_folder, tmp_path):
    save_trained(tmp_path / "reward", quantized_folder, with_head=True)
    expected = load_reward_model(str(tmp_path / "reward")).reward(*TEXTS)
    fused(quantized_folder, tmp_path / "reward", tmp_path / "out", "-d")
    assert load_reward_model(str(tmp_path / "out")).reward(*TEXTS) == pytest.approx(expected, abs=1e-3)


def test_a_policy_fused_over_a_reward_model_leaves_no_head_behind(tiny_folder, tmp_path):
    save_trained(tmp_path / "reward", tiny_folder, with_head=True)
    fused(tiny_folder, tmp_path / "reward", tmp_path / "out")
    save_trained(tmp_path / "policy", tiny_folder)
    _, config = fused(tiny_folder, tmp_path / "policy", tmp_path / "out")
    assert "value_head" not in config and not (tmp_path / "out" / HEAD_FILE).exists()
    # and a policy trained from a fused reward model is not a reward model
    fused(tiny_folder, tmp_path / "reward", tmp_path / "base")
    save_trained(tmp_path / "policy", tmp_path / "base")
    _, config = fused(tmp_path / "base", tmp_path / "policy", tmp_path / "out")
    assert "value_head" not in config and not (tmp_path / "out" / HEAD_FILE).exists()


@pytest.mark.parametrize("with_head", [False, True])
def test_transformers_opens_the_folder_and_says_the_same(tiny_folder, tmp_path, with_head):
    adapted = save_trained(tmp_path / "adapters", tiny_folder, with_head=with_head)
    fused(tiny_folder, tmp_path / "adapters", tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        close(model(torch.tensor(TOKENS)).logits.numpy(), logits_of(adapted))
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny_folder)]
    assert tokenizers[0]("12 -4 x").input_ids == tokenizers[1]("12 -4 x").input_ids
    assert (
        tokenizers[0].eos_token_id == tokenizers[1].eos_token_id == load(str(tmp_path / "out")).tokenizer.eos_token_id
    )


def test_the_base_and_the_adapter_are_left_as_they_were(tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    save_trained(tmp_path / "adapters", base, with_head=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fused(base, tmp_path / "adapters", tmp_path / "out")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_fused_model_takes_another_adapter(tiny_folder, tmp_path):
    save_trained(tmp_path / "first", tiny_folder)
    fused(tiny_folder, tmp_path / "first", tmp_path / "out")
    adapted = save_trained(tmp_path / "second", tmp_path / "out")
    model = load(str(tmp_path / "out")).model
    load_adapter(model, tmp_path / "second")
    close(logits_of(model), logits_of(adapted), 1e-6)


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../base", "{}/./"])
def test_the_base_is_never_overwritten(tiny_folder, tmp_path, capsys, spelling):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "provenance.json").write_text("[]")  # a model of ours, which may be replaced otherwise
    save_trained(tmp_path / "adapters", base)
    before = (base / "model.safetensors").read_bytes()
    words = ("--model", base, "--adapter-file", tmp_path / "adapters", "--save-path", spelling.format(base))
    assert "is the base model itself" in fails(capsys, fuse.main, *words)
    assert (base / "model.safetensors").read_bytes() == before


def test_a_folder_of_other_things_is_not_replaced(tiny_folder, tmp_path, capsys, monkeypatch):
    """The error comes before a large model is opened."""
    save_trained(tmp_path / "adapters", tiny_folder)
    monkeypatch.setattr(fuse, "load", lambda name: pytest.fail("the base was opened"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for target in ("mine", "adapters", "adapters/adapter_config.json"):
        words = ("--model", tiny_folder, "--adapter-file", tmp_path / "adapters", "--save-path", tmp_path / target)
        assert "choose another name" in fails(capsys, fuse.main, *words)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "adapters" / "adapters.safetensors").is_file()


def test_what_does_not_fit_is_one_line(tiny_folder, tmp_path, capsys):
    words = ("--model", tiny_folder, "--save-path", tmp_path / "out", "--adapter-file")
    assert "does not exist" in fails(capsys, fuse.main, *words, tmp_path / "missing")
    save_trained(tmp_path / "adapters", tiny_folder)
    path = tmp_path / "adapters" / "adapter_config.json"
    path.write_text(path.read_text().replace('"num_layers": -1', '"num_layers": 1'))
    assert fails(capsys, fuse.main, *words, tmp_path / "adapters").count("is unknown") == 14
    assert not (tmp_path / "out").exists()


def test_a_stop_while_writing_leaves_the_old_folder(tiny_folder, tmp_path, monkeypatch):
    save_trained(tmp_path / "adapters", tiny_folder)
    fused(tiny_folder, tmp_path / "adapters", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    save_trained(tmp_path / "adapters", tiny_folder, scale=1.0)
    write = mlx_lm.utils.save_config

    def stopped(*args, **kwargs):
        write(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(mlx_lm.utils, "save_config", stopped)
    with pytest.raises(KeyboardInterrupt):
        fused(tiny_folder, tmp_path / "adapters", tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "out"]


def test_the_script_as_a_user_runs_it(tiny_folder, tmp_path):
    save_trained(tmp_path / "adapters.npz", tiny_folder)
    command = [sys.executable, "fuse.py", "--model", str(tiny_folder), "--save_path", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--adapter_file", str(tmp_path / "adapters.npz")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    measured, written = done.stdout.splitlines()
    assert measured == (
        "fused in full precision: KL to the adapter 0.0000 nats a token on 8 texts that it sampled; "
        "100% of a layer's change is kept (median)"
    )
    assert written == f"fused {tmp_path}/adapters.npz into {tiny_folder}: the model is in {tmp_path}/out"
