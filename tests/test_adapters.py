"""Adapters: what they train, that a fresh one changes nothing, and that saving and loading are inverse."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

import models.adapter_config
import models.adapters
from common.errors import UserError
from models.adapter_config import HEAD_FILE
from models.adapters import (
    AdapterConfig,
    adapter_weights,
    attach_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    set_adapter_weights,
)
from models.loading import load
from models.value_head import ScoringModel, ValueHead, new_value_head
from tests.architectures import build

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7, 8]])
PARAMETERS = {"rank": 4, "scale": 3.0, "dropout": 0.0}
TYPES = ["lora", "dora", "full", "soft_prompt", "none"]
FORMS = ["adapters", "adapters.npz", "adapters.safetensors"]


def config_of(kind, **changes):
    return AdapterConfig(kind, -1, {**PARAMETERS, **changes}, num_prompt_tokens=3, model="base")


def fresh(kind, quantized=False, **changes):
    """A small model with a fresh adapter."""
    model = build("llama-tied")
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
    attach_adapter(model, config_of(kind, **changes))
    return model


def trained(kind, quantized=False, model=None, **changes):
    """Like `fresh`, with weights as if it had been trained."""
    model = model or fresh(kind, quantized, **changes)
    mx.random.seed(7)
    moved = [(name, w + 0.1 * mx.random.normal(w.shape)) for name, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    return model


def base(quantized=False):
    model = build("llama-tied")
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
    return model


def logits_of(model, kind):
    """Logits at the words' positions, after the soft prompt, if any."""
    soft = [list(range(50, 53))] if kind == "soft_prompt" else [[]]
    return model(mx.concatenate([mx.array(soft, dtype=mx.int32), TOKENS], axis=1))[:, -8:]


def same(one, other):
    return mx.array_equal(one, other).item()


def error_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# attaching


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("kind", "leaves"), [("lora", {"lora_a", "lora_b"}), ("dora", {"lora_a", "lora_b", "m"})])
def test_only_the_adapter_is_trainable(kind, leaves, quantized):
    model = fresh(kind, quantized)
    names = set(adapter_weights(model))
    assert {name.rpartition(".")[2] for name in names} == leaves
    # seven linear layers in each of two blocks
    assert len(names) == 2 * 7 * len(leaves)


def test_the_other_kinds_train_all_one_or_nothing():
    everything = {name for name, _ in tree_flatten(base().parameters())}
    assert set(adapter_weights(fresh("full"))) == everything
    assert set(adapter_weights(fresh("soft_prompt"))) == {"model.embed_tokens.soft_prompt"}
    assert adapter_weights(fresh("none")) == {}


@pytest.mark.parametrize(
    ("kind", "quantized"), [*((kind, False) for kind in TYPES), ("lora", True), ("dora", True), ("soft_prompt", True)]
)
def test_a_fresh_adapter_leaves_the_model_as_it_was(kind, quantized):
    expected = base(quantized)(TOKENS)
    got = fresh(kind, quantized)(TOKENS)
    if kind == "dora":  # it divides by the norm and multiplies by it
        np.testing.assert_allclose(np.array(got), np.array(expected), atol=1e-5)
    else:
        assert same(got, expected)


@pytest.mark.parametrize("kind", ["lora", "dora", "soft_prompt"])
def test_an_update_moves_the_adapter_and_not_the_base(kind):
    model = trained(kind)
    before = dict(tree_flatten(model.parameters()))
    trainable = set(adapter_weights(model))
    optimizer = optim.SGD(0.1)
    loss = nn.value_and_grad(model, lambda: (logits_of(model, kind)[:, -1, :5] ** 2).sum())
    optimizer.update(model, loss()[1])
    after = dict(tree_flatten(model.parameters()))
    assert {name for name, weight in after.items() if not same(weight, before[name])} == trainable


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_new_layers_take_the_mode_of_the_model(kind, mode):
    """New LoRA layers are created in training mode: dropout would be on during rollouts."""
    model = base()
    model.train(mode)
    attach_adapter(model, config_of(kind, dropout=0.5))
    assert {module.training for _, module in model.named_modules()} == {mode}


def test_the_number_of_layers_counts_from_the_last():
    model = base()
    attach_adapter(model, AdapterConfig("lora", 1, PARAMETERS))
    assert {name.split(".")[2] for name in adapter_weights(model)} == {"1"}
    for count in (2, 16, -1):
        model = base()
        attach_adapter(model, AdapterConfig("lora", count, PARAMETERS))
        assert {name.split(".")[2] for name in adapter_weights(model)} == {"0", "1"}


def test_keys_choose_the_layers():
    names = set(adapter_weights(fresh("lora", keys=["self_attn.q_proj", "mlp.up_proj"])))
    assert {".".join(name.split(".")[3:5]) for name in names} == {"self_attn.q_proj", "mlp.up_proj"}


def test_the_seed_decides_the_first_weights():
    def first(seed):
        model = base()
        attach_adapter(model, config_of("lora"), seed)
        return adapter_weights(model)["model.layers.0.self_attn.q_proj.lora_a"]

    assert same(first(1), first(1)) and not same(first(1), first(2))


def test_a_second_adapter_is_refused():
    """It would be nested in the first."""
    for kind in ("lora", "dora"):
        with pytest.raises(ValueError, match="already has a LoRA"):
            attach_adapter(fresh(kind), config_of("lora"))
    with pytest.raises(ValueError, match="already has a soft prompt"):
        attach_adapter(fresh("soft_prompt"), config_of("soft_prompt"))


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        (AdapterConfig("lora", -1, {**PARAMETERS, "rank": 0}), "rank is 0"),
        (AdapterConfig("dora", -1, {**PARAMETERS, "rank": -3}), "rank is -3"),
        (AdapterConfig("lora", 0, PARAMETERS), "--lora-layers is 0"),
        (AdapterConfig("lora", -2, PARAMETERS), "--lora-layers is -2"),
        (AdapterConfig("lora", -1, {**PARAMETERS, "keys": ["q_proj"]}), "no layer matches the LoRA keys ['q_proj']"),
    ],
)
def test_settings_that_adapt_nothing_are_refused(config, fact):
    assert fact in error_of(attach_adapter, base(), config)


def test_what_cannot_be_trained_is_refused():
    assert "quantized model cannot be trained in full" in error_of(attach_adapter, base(True), config_of("full"))
    assert "'qlora' is unknown" in error_of(AdapterConfig, "qlora")


# saving and loading


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("with_head", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path, kind, form, with_head):
    model = trained(kind)
    head = ValueHead(32, std=1.0) if with_head else None
    save_adapter(tmp_path / form, model, config_of(kind), head)
    loaded = base()
    saved = load_adapter(loaded, tmp_path / form)
    assert saved.config == config_of(kind)
    assert same(logits_of(loaded, kind), logits_of(model, kind))
    assert kind == "none" or not same(logits_of(loaded, kind), base()(TOKENS))
    assert set(adapter_weights(loaded)) == set(adapter_weights(model))
    assert (saved.value_head is not None) == with_head
    if head is not None and saved.value_head is not None:
        assert same(saved.value_head.weight, head.weight)
    beside = [form] if form == "adapters" else ["adapters.json", form]
    assert sorted(path.name for path in tmp_path.iterdir()) == beside


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_on_a_quantized_base_goes_and_comes(tmp_path, kind):
    model = trained(kind, quantized=True)
    save_adapter(tmp_path / "adapters", model, config_of(kind))
    loaded = base(quantized=True)
    load_adapter(loaded, tmp_path / "adapters")
    assert same(loaded(TOKENS), model(TOKENS))


def test_the_description_holds_what_is_needed(tmp_path):
    config = config_of("lora", keys=["self_attn.q_proj"])
    config.provenance.append({"script": "sft.py", "flags": {"iters": 5}, "figures": {"steps": 5}})
    model = fresh("lora", keys=["self_attn.q_proj"])
    for form in FORMS:
        save_adapter(tmp_path / form, model, config)
        file = tmp_path / ("adapters/adapter_config.json" if form == "adapters" else "adapters.json")
        content = json.loads(file.read_text())
        assert content["provenance"][0]["flags"] == {"iters": 5}
        assert content["fine_tune_type"] == "lora" and content["model"] == "base"
        assert content["lora_parameters"] == {**PARAMETERS, "keys": ["self_attn.q_proj"]}
        assert read_adapter(tmp_path / form).config == config


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "none"])
def test_mlx_lm_opens_our_folder_with_or_without_a_head(tmp_path, tiny_folder, kind):
    model = load(str(tiny_folder)).model
    attach_adapter(model, config_of(kind))
    trained(kind, model=model)
    for head in (None, new_value_head(model, std=None)):
        save_adapter(tmp_path / "adapters", model, config_of(kind), head)
        assert (tmp_path / "adapters" / HEAD_FILE).is_file() == (head is not None)
        theirs, _ = mlx_lm.load(str(tiny_folder), adapter_path=str(tmp_path / "adapters"))
        assert same(theirs(TOKENS), model(TOKENS))
    assert kind == "none" or not same(model(TOKENS), load(str(tiny_folder)).model(TOKENS))


def test_a_value_head_scores_after_loading_as_before(tmp_path):
    model = trained("lora")
    head = new_value_head(model, std=None)
    expected = ScoringModel(model, head)(TOKENS, mx.array([5]))
    for form in FORMS:
        save_adapter(tmp_path / form, model, config_of("lora"), head)
        loaded = base()
        saved = load_adapter(loaded, tmp_path / form)
        assert saved.value_head is not None
        assert same(ScoringModel(loaded, saved.value_head)(TOKENS, mx.array([5])), expected)


def test_weights_are_never_loaded_before_their_layers_exist(tmp_path):
    """A non-strict load into a model without LoRA layers would load nothing."""
    model = trained("lora")
    plain = base()
    plain.freeze()
    message = error_of(set_adapter_weights, plain, adapter_weights(model))
    assert "(28 tensors)" in message and message.count("is unknown") == 28
    save_adapter(tmp_path / "adapters", model, config_of("lora"))
    resumed = base()
    load_adapter(resumed, tmp_path / "adapters")
    assert same(resumed(TOKENS), model(TOKENS))
    # and training can continue: exactly the adapter is trainable again
    assert set(adapter_weights(resumed)) == set(adapter_weights(model))


def test_every_mismatch_is_listed_at_once(tmp_path):
    model = trained("lora")
    weights = adapter_weights(model)
    names = sorted(weights)
    broken = dict(weights)
    del broken[names[0]]
    broken[names[1]] = mx.zeros((2, 9))
    broken["model.layers.7.self_attn.q_proj.lora_a"] = mx.zeros((2, 2))
    before = model(TOKENS)
    message = error_of(set_adapter_weights, model, broken, "my_adapter")
    assert message.startswith("my_adapter does not fit this model (3 tensors)")
    assert f"{names[0]} is missing" in message
    assert f"{names[1]} is (2, 9), the model has {tuple(weights[names[1]].shape)}" in message
    assert "model.layers.7.self_attn.q_proj.lora_a is unknown" in message
    assert same(model(TOKENS), before)


def test_an_adapter_for_another_base_is_refused(tmp_path):
    save_adapter(tmp_path / "adapters", trained("lora"), config_of("lora"))
    other = build("llama-tied", hidden_size=64, num_hidden_layers=1)
    message = error_of(load_adapter, other, tmp_path / "adapters")
    # one layer's 14 tensors are unknown; of the other 14, ten touch the hidden size
    assert message.count("is unknown") == 14 and "the model has (64, 4)" in message


# interruptions, and foreign files


def writers(form):
    """The functions with which `save_adapter` writes the parts of each form."""
    weights = (np, "savez") if form.endswith(".npz") else (models.adapters.mx, "save_safetensors")
    return [weights, (models.adapters if form == "adapters" else models.adapter_config, "write_json")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_an_interrupted_save_leaves_the_old_adapter_whole(tmp_path, monkeypatch, form, which, error):
    model = trained("lora")
    head = ValueHead(32, std=1.0)
    save_adapter(tmp_path / form, model, config_of("lora"), head)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    newer = trained("lora", model=trained("lora"))
    place, name = writers(form)[which]
    write = getattr(place, name)

    def half(*args, **kwargs):
        write(*args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, name, half)
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
            save_adapter(tmp_path / form, newer, config_of("lora", scale=5.0), ValueHead(32))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    save_adapter(tmp_path / form, newer, config_of("lora"))
    assert read_adapter(tmp_path / form).value_head is None  # the old head is gone with the old adapter


def test_a_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds other files" in error_of(save_adapter, tmp_path, fresh("lora"), config_of("lora"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_missing_part_is_named(tmp_path):
    assert "does not exist; name an adapter folder" in error_of(read_adapter, tmp_path / "none")
    for form in FORMS:
        save_adapter(tmp_path / form, fresh("lora"), config_of("lora"))
    (tmp_path / "adapters" / "adapters.safetensors").unlink()
    assert "is an incomplete adapter" in error_of(read_adapter, tmp_path / "adapters")
    (tmp_path / "adapters" / "adapter_config.json").unlink()
    assert "adapter_config.json does not exist" in error_of(read_adapter, tmp_path / "adapters")
    (tmp_path / "adapters.json").unlink()
    assert "adapters.json does not exist" in error_of(read_adapter, tmp_path / "adapters.npz")
    (tmp_path / "adapters.bin").write_bytes(b"")
    assert "cannot be read (Not a directory)" in error_of(read_adapter, tmp_path / "adapters.bin")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", [b"", b"no tensors at all"])
def test_weights_that_are_no_weights_are_named(tmp_path, form, content):
    save_adapter(tmp_path / form, fresh("lora"), config_of("lora"))
    path = tmp_path / form / "adapters.safetensors" if form == "adapters" else tmp_path / form
    path.write_bytes(content)
    assert "cannot be read" in error_of(read_adapter, tmp_path / form)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("{", "not valid JSON"),
        ("null", "adapter_config.json has None"),
        ("[]", "adapter_config.json has something else"),
        ('{"fine_tune_type": "other"}', "'other' as fine_tune_type"),
        ('{"fine_tune_type": ["lora"]}', "something else as fine_tune_type"),
        ('{"lora_parameters": {"rank": 4}}', "lora_parameters"),
        ('{"lora_parameters": [4]}', "lora_parameters"),
    ],
)
def test_a_description_that_is_none_is_named(tmp_path, content, fact):
    save_adapter(tmp_path / "adapters", fresh("lora"), config_of("lora"))
    (tmp_path / "adapters" / "adapter_config.json").write_text(content)
    assert fact in error_of(read_adapter, tmp_path / "adapters")


@pytest.mark.parametrize("form", ["adapters.npz", "adapters.safetensors"])
def test_a_description_of_other_weights_is_noticed(tmp_path, form):
    """A kill between the two renames: the .json is new, the weights are old."""
    path = tmp_path / form
    save_adapter(path, fresh("lora"), config_of("lora"))
    old = path.read_bytes()
    model = fresh("lora")
    model.update(tree_unflatten([(name, weight + 1) for name, weight in adapter_weights(model).items()]))
    save_adapter(path, model, config_of("lora"))
    read_adapter(path)
    path.write_bytes(old)
    line = error_of(read_adapter, path)
    assert line.startswith(f"{path} cannot be read: its checksum is not the one in {path.with_suffix('.json')}")
    # What was written before there were checksums has none.
    content = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({k: v for k, v in content.items() if k != "weights_sha256"}))
    read_adapter(path)
