"""peft's format: the same output before and after conversion, by our code, transformers with peft, and mlx-lm."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fuse
from common.errors import UserError
from models import torch_adapters
from models.adapters import AdapterConfig, adapter_weights, attach_adapter, load_adapter, read_adapter, save_adapter
from models.loading import load
from models.peft_format import our_name, peft_name, peft_settings
from models.value_head import new_value_head
from tests.scripts import call, fails
from tests.torch_models import random_llama

TOKENS = [[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]]
KEYS = ["self_attn.q_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("models") / "llama")


def save_trained(path, folder, kind="lora", num_layers=-1, keys=None, with_head=False):
    """An adapter on the model in `folder`, with weights as if trained; returns the logits with it."""
    lora = {"rank": 4, "scale": 3.0, "dropout": 0.1, **({"keys": keys} if keys else {})}
    config = AdapterConfig(kind, num_layers, lora, model=str(folder))
    model = load(str(folder)).model
    attach_adapter(model, config)
    mx.random.seed(5)
    moved = [(name, w + 0.1 * mx.random.normal(w.shape)) for name, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    model.eval()
    save_adapter(path, model, config, new_value_head(model, std=None) if with_head else None)
    return logits_of(model)


def logits_of(model):
    return np.array(model(mx.array(TOKENS)))


def logits_in_torch(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    ("kind", "num_layers", "keys", "layers"),
    [("lora", -1, None, [0, 1, 2]), ("lora", 2, KEYS, [1, 2]), ("dora", 1, None, [2]), ("dora", -1, KEYS, [0, 1, 2]),
     ("lora", -1, ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"], None)],
)  # fmt: skip
def test_there_and_back(llama, tmp_path, kind, num_layers, keys, layers):
    expected = save_trained(tmp_path / "ours", llama, kind, num_layers, keys)
    assert np.abs(expected - logits_of(load(llama).model)).max() > 0.1 * np.abs(expected).max()
    call(fuse.main, "--adapter-file", tmp_path / "ours", "--export-peft", tmp_path / "peft")

    description = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert description["lora_alpha"] == 12.0 and description["r"] == 4  # scale 3
    assert description["layers_to_transform"] == layers and description["base_model_name_or_path"] == llama
    base = AutoModelForCausalLM.from_pretrained(llama)
    close(logits_in_torch(PeftModel.from_pretrained(base, tmp_path / "peft")), expected)

    # as it is, in both of our loaders
    model = load(llama).model
    load_adapter(model, tmp_path / "peft")
    model.eval()
    close(logits_of(model), expected)
    twin = AutoModelForCausalLM.from_pretrained(llama)
    torch_adapters.load_adapter(twin, tmp_path / "peft")
    close(logits_in_torch(twin.eval()), expected)

    # and as mlx-lm's folder again
    call(fuse.main, "--adapter-file", tmp_path / "peft", "--export-adapter", tmp_path / "back")
    close(logits_of(mlx_lm.load(llama, adapter_path=str(tmp_path / "back"))[0]), expected)
    ours, back = read_adapter(tmp_path / "ours").weights, read_adapter(tmp_path / "back").weights
    assert ours.keys() == back.keys() and all(mx.array_equal(ours[name], back[name]).item() for name in ours)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": "all-linear"}])
def test_what_peft_made_opens_here(llama, tmp_path, settings):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=6, **{"target_modules": ["q_proj", "up_proj"], **settings})
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), lora)
    for name, weight in made.named_parameters():
        if "lora_" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    made.eval().save_pretrained(tmp_path / "peft")
    expected = logits_in_torch(made)
    model = load(llama).model
    assert load_adapter(model, tmp_path / "peft").config.lora_parameters["scale"] == (
        3.0 if "use_rslora" in settings else 1.5
    )
    close(logits_of(model.eval()), expected)
    call(fuse.main, "--model", llama, "--adapter-file", tmp_path / "peft", "--save-path", tmp_path / "fused")
    close(logits_of(mlx_lm.load(str(tmp_path / "fused"))[0]), expected)


def test_a_single_file_becomes_the_folder_that_mlx_lm_opens(llama, tmp_path):
    expected = save_trained(tmp_path / "adapters.npz", llama)
    call(fuse.main, "--adapter-file", tmp_path / "adapters.npz", "--export-adapter", tmp_path / "folder")
    close(logits_of(mlx_lm.load(llama, adapter_path=str(tmp_path / "folder"))[0]), expected)


def test_names_go_there_and_back():
    name = "model.layers.3.self_attn.q_proj.lora_a"
    assert peft_name(name) == "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    for end in ("lora_a", "lora_b", "m"):
        assert our_name(peft_name(f"lm_head.{end}")) == f"lm_head.{end}"
    with pytest.raises(UserError, match="soft_prompt is not a LoRA"):
        peft_name("model.embed_tokens.soft_prompt")


def test_modules_outside_the_blocks_are_named_in_full():
    settings = peft_settings("lora", {"rank": 2, "scale": 0.5}, "m", ["lm_head.lora_a", "model.layers.0.mlp.up.lora_a"])
    assert settings["target_modules"] == ["lm_head", "model.layers.0.mlp.up"]
    assert settings["layers_to_transform"] is None and settings["lora_alpha"] == 1.0


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"peft_type": "IA3"}, "of type IA3"), ({"bias": "all"}, "bias 'all'"),
     ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
     ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
     ({"init_lora_weights": "pissa"}, "init_lora_weights")],
)  # fmt: skip
def test_what_mlx_lm_cannot_do_is_refused(llama, tmp_path, capsys, changes, words):
    save_trained(tmp_path / "ours", llama)
    call(fuse.main, "--adapter-file", tmp_path / "ours", "--export-peft", tmp_path / "peft")
    edit(tmp_path / "peft", **changes)
    message = fails(
        capsys, fuse.main, "--model", llama, "--adapter-file", tmp_path / "peft", "--save-path", tmp_path / "out"
    )
    assert words in message and not (tmp_path / "out").exists()


def test_a_damaged_folder_is_one_line(llama, tmp_path, capsys):
    save_trained(tmp_path / "ours", llama)
    call(fuse.main, "--adapter-file", tmp_path / "ours", "--export-peft", tmp_path / "peft")
    words = ("--model", llama, "--adapter-file", tmp_path / "peft", "--save-path", tmp_path / "out")
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    assert "base_model.model.lm_head.weight is unknown" in fails(capsys, fuse.main, *words)
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors cannot be read" in fails(capsys, fuse.main, *words)
    weights.unlink()
    assert "does not exist" in fails(capsys, fuse.main, *words)


@pytest.mark.parametrize(
    ("kind", "with_head", "words"),
    [("soft_prompt", False, "is of type soft_prompt"), ("full", False, "is of type full"),
     ("lora", True, "is a reward model")],
)  # fmt: skip
def test_what_peft_does_not_hold_is_refused(llama, tmp_path, capsys, kind, with_head, words):
    save_trained(tmp_path / "ours", llama, kind, with_head=with_head)
    assert words in fails(capsys, fuse.main, "--adapter-file", tmp_path / "ours", "--export-peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
