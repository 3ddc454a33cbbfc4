"""The formulas of docs/which_mac.md: exact parameter counts, and measured peaks within a quarter."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

from models.adapters import AdapterConfig, adapter_weights, attach_adapter
from models.grad_checkpoint import checkpoint_layers
from tests import mac_memory
from tests.mac_memory import SHAPES, Shape, activations, kv_cache, logits, lora_parameters, parameters

SMALL = Shape(64, 4, 192, 4, 2, 16, 500, True)
MB = 1e6


def built(shape):
    settings = {"model_type": "llama", "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
                "intermediate_size": shape.intermediate, "num_attention_heads": shape.heads, "head_dim": shape.width,
                "num_key_value_heads": shape.kv_heads, "rms_norm_eps": 1e-5, "vocab_size": shape.vocabulary,
                "tie_word_embeddings": shape.tied}  # fmt: skip
    return Model(ModelArgs(**settings))


def count(weights):
    return sum(array.size for _, array in weights)


@pytest.mark.parametrize("shape", [SMALL, SMALL._replace(tied=False, kv_heads=4, width=8)])
def test_parameters_and_cache_are_those_of_the_model(shape):
    model = built(shape)
    assert parameters(shape) == count(tree_flatten(model.parameters()))
    cache = make_prompt_cache(model)
    model(mx.zeros((3, 256), mx.int32), cache=cache)  # caches grow by 256
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache) == kv_cache(shape, 3 * 256, 4)
    attach_adapter(model, AdapterConfig("lora", 3, {"rank": 5, "scale": 1.0, "dropout": 0.0}))
    assert lora_parameters(shape, 5, 3) == count(adapter_weights(model).items())


PUBLISHED = {"Qwen3 0.6B": 0.596, "TinyLlama 1.1B": 1.100, "Llama 3.2 3B": 3.213, "Mistral 7B v0.3": 7.248,
             "Llama 3.1 8B": 8.030, "Qwen2.5 14B": 14.770}  # fmt: skip


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_the_sizes_are_the_published_ones(name, billions):
    assert parameters(SHAPES[name]) / 1e9 == pytest.approx(billions, abs=0.002)


def test_quantized_weights_take_what_is_said():
    layer = nn.QuantizedLinear.from_linear(
        nn.Linear(256, 128, bias=False).apply(lambda a: a.astype(mx.bfloat16)), 64, 4
    )
    stored = sum(array.nbytes for _, array in tree_flatten(layer.parameters()))
    assert stored == 256 * 128 * mac_memory.BITS["4-bit"] / 8


@pytest.mark.parametrize(("kind", "changes", "checkpoint", "trained_layers"), [
    ("full", {}, False, 6), ("lora", {}, False, 6), ("lora", {}, False, 2), ("lora", {}, True, 6),
    ("lora", {"vocabulary": 10_000, "layers": 2}, False, 2),
])  # fmt: skip
def test_the_peak_of_a_training_step(kind, changes, checkpoint, trained_layers):
    shape, batch, length = Shape(128, 6, 384, 4, 2, 32, 1000, True)._replace(**changes), 4, 128
    model = built(shape)
    attach_adapter(model, AdapterConfig(kind, trained_layers, {"rank": 8, "scale": 1.0, "dropout": 0.0}))
    model.train()
    if checkpoint:
        checkpoint_layers(model)
    optimizer, tokens = optim.Adam(1e-3), mx.zeros((batch, length), mx.int32)
    step = nn.value_and_grad(model, lambda model: nn.losses.cross_entropy(model(tokens), tokens, reduction="mean"))
    for _ in range(2):  # the first makes the optimizer's state
        mx.eval(model.parameters())
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        loss, gradient = step(model)
        optimizer.update(model, gradient)
        mx.eval(loss, model.parameters(), optimizer.state)
        del loss, gradient
    grown = mx.get_peak_memory() - before
    trained = count(adapter_weights(model).items())
    passed = shape._replace(layers=trained_layers)
    expected = activations(passed, batch, length, 4, checkpoint) + logits(shape, batch, length) + 4 * trained
    assert grown == pytest.approx(expected, rel=0.25), f"{grown / MB:.1f} MB, expected {expected / MB:.1f}"


def test_a_mac_is_large_enough_where_two_thirds_of_it_are():
    assert mac_memory.cell(5.33e9) == "5.3 → 8 GB" and mac_memory.cell(5.34e9) == "5.3 → 16 GB"
    assert mac_memory.cell(400e9) == "400.0 → none"
