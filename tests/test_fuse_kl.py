"""Fusing keeps what was learned: KL to the adapter, layers that get more bits, provenance."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

import fuse
from common.files import read_json
from data.batching import Example
from models.adapters import AdapterConfig, adapter_weights, attach_adapter, fuse_adapter, load_adapter, save_adapter
from models.export import fusing
from models.export.fused import save_fused
from models.export.fusing import FULL, MAX_KL, fuse_measured, share_kept
from models.export.measuring_rows import ROWS, MeasuringRows, measuring_rows
from models.export.model_card import PROVENANCE_FILE
from models.loading import load, twin
from tests.scripts import ROOT, call, fails
from training import ppo

ROW = MeasuringRows([Example([1, 2, 3, 4, 5, 6, 7, 8], 3), Example([8, 7, 6, 5, 4, 3], 1)], "2 rows")
TARGETS = ([2, 3, 4, 5, 6], [0, 1, 2, 3, 4])  # positions before the trained tokens
BIG, SMALL = 0.1, 0.01  # standard deviations of what training added to the LoRA: 4 bits keep 100 % or 23 % of it


def quantized(folder, source, **settings):
    loaded = load(str(source))
    model, config = mlx_lm.utils.quantize_model(loaded.model, loaded.config, **settings)
    mlx_lm.utils.save(folder, source, model, loaded.tokenizer, config)
    return folder


@pytest.fixture(scope="module")
def base(tiny_folder, tmp_path_factory):
    """The untrained tiny model in 4 bits."""
    return quantized(tmp_path_factory.mktemp("models") / "q4", tiny_folder, group_size=32, bits=4)


def adapted(folder, size=BIG, kind="lora"):
    """The model in `folder`, with a LoRA as if trained."""
    loaded = load(str(folder))
    config = AdapterConfig(kind, -1, {"rank": 4, "scale": 3.0, "dropout": 0.1}, model=str(folder))
    attach_adapter(loaded.model, config)
    mx.random.seed(5)
    moved = [(name, w + size * mx.random.normal(w.shape)) for name, w in adapter_weights(loaded.model).items()]
    loaded.model.load_weights(moved, strict=False)
    loaded.model.eval()
    return loaded, config


def kl_of(loaded, adapter, model):
    """Mean KL from whole logits on the texts that the adapter's model samples."""
    kls = [
        ppo.full_kl(adapter(tokens), model(tokens), 1.0)[0]
        for tokens in (mx.array([row.tokens[:-1]]) for row in measuring_rows(adapter, loaded.tokenizer, []).examples)
    ]
    return mx.concatenate(kls).mean().item()


def kl_on_row(adapter, model):
    """Mean KL on ROW from whole logits."""
    parts = []
    for example, positions in zip(ROW.examples, TARGETS, strict=True):
        tokens = mx.array([example.tokens])
        parts.append(ppo.full_kl(adapter(tokens)[0], model(tokens)[0], 1.0)[mx.array(positions)])
    return mx.concatenate(parts).mean().item()


def bits_of(model):
    return {name: module.bits for name, module in model.named_modules() if isinstance(module, nn.QuantizedLinear)}


# --- the measures ---


def test_the_share_kept_is_what_lies_along_the_change():
    layer = LoRALinear(2, 2, r=1, scale=2.0)
    layer.linear.weight = mx.array([[1.0, 0.0], [0.0, 1.0]])
    layer.lora_a, layer.lora_b = mx.array([[1.0], [0.0]]), mx.array([[0.5, 0.0]])  # changes W[0, 0] by 1
    fused = nn.Linear(2, 2, bias=False)
    for weight, share in (([[2.0, 0.0], [0.0, 1.0]], 1.0), ([[1.25, 7.0], [0.0, 1.0]], 0.25), ([[1, 0], [0, 1]], 0.0)):
        fused.weight = mx.array(weight)
        assert share_kept(layer, fused) == pytest.approx(share)
    layer.lora_b = mx.zeros((1, 2))  # nothing was learned, so nothing is lost
    assert share_kept(layer, fused) == 1.0


def test_enough_layers_are_taken_and_no_more():
    assert [fusing._enough([4, 3, 2, 1], share) for share in (1.0, 0.6, 0.59, 0.3, 0.1, 0.0)] == [0, 1, 2, 2, 3, 4]


def test_a_probe_hands_on_the_adapters_output_and_adds_up_the_difference():
    layer, fused = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    layer.weight, fused.weight = mx.eye(2), mx.array([[1.0, 0.0], [0.0, 1.5]])
    probe = fusing._Probe(layer, fused)
    x = mx.array([[3.0, 4.0], [1.0, 0.0]])
    assert np.array_equal(probe(x), x)
    assert probe.loss.item() == pytest.approx((2**2 / 25 + 0) / 2)
    probe(x[1:])
    assert probe.loss.item() == pytest.approx(0.08)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_kl_is_that_of_whole_logits(base, kind):
    loaded, _ = adapted(base, kind=kind)
    adapter = twin(loaded.model)
    report = fuse_measured(loaded, ROW, max_kl=float("inf"))
    assert report.kl == report.plain_kl == pytest.approx(kl_on_row(adapter, loaded.model), rel=1e-4)
    assert report.kl > MAX_KL
    assert report.tokens == 10 and report.bits == {}
    plain = twin(adapter)
    fuse_adapter(plain)
    expected = dict(tree_flatten(plain.parameters()))
    assert all(np.array_equal(array, expected[name]) for name, array in tree_flatten(loaded.model.parameters()))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_nothing_is_lost_without_quantization(tiny_folder, kind):
    loaded, _ = adapted(tiny_folder, kind=kind)
    before = twin(loaded.model)
    report = fuse_measured(loaded, ROW)
    assert report.kl < 1e-6 and report.bits == {} and report.base_bits == 0
    assert list(report.kept.values()) == pytest.approx([1.0] * (14 if kind == "lora" else 0), abs=1e-3)
    assert kl_on_row(load(str(tiny_folder)).model, before) > 0.01  # the adapter does change the model


# --- more bits ---


@pytest.mark.parametrize(("size", "max_kl"), [(BIG, MAX_KL), (SMALL, 0.001)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_layers_get_8_bits_until_the_kl_is_small_and_mlx_lm_opens_them(base, tmp_path, capsys, size, max_kl, dtype):
    loaded, config = adapted(base, size)
    save_adapter(tmp_path / "adapters", loaded.model, config)
    folder = base
    if dtype != mx.float32:
        other = load(str(base))
        other.model.set_dtype(dtype)
        folder = tmp_path / "base"
        mlx_lm.utils.save(folder, base, other.model, other.tokenizer, other.config)
    words = ("--model", folder, "--adapter-file", tmp_path / "adapters", "--save-path", tmp_path / "out")
    tuned = load(str(folder))
    load_adapter(tuned.model, tmp_path / "adapters")
    call(fuse.main, *words, "--max-fuse-kl", max_kl)
    printed = capsys.readouterr().out
    assert "fused in 4 bits: KL to the adapter 0.0" in printed and f"above --max-fuse-kl {max_kl:g}" in printed

    model, _ = mlx_lm.load(str(tmp_path / "out"))
    run = read_json(tmp_path / "out" / PROVENANCE_FILE)[-1]
    figures, layers = run["figures"], run["layers"]
    assert figures["kl"] <= max_kl < figures["kl_in_base_bits"]
    assert kl_of(tuned, tuned.model, model) <= 1.001 * max_kl
    wide = {name for name, bits in bits_of(model).items() if bits == 8}
    assert 0 < len(wide) == figures["layers_in_8_bits"] <= len(layers) == 14
    assert len(wide) < 14 or size == SMALL
    assert wide == {name for name, layer in layers.items() if layer.get("bits") == 8}
    quantization = read_json(tmp_path / "out" / "config.json")["quantization"]
    assert wide == {name for name, own in quantization.items() if isinstance(own, dict)}
    assert f"of 14 adapted layers {len(wide)} in 8 bits: KL {figures['kl']:.4f}" in printed
    assert all(layers[name]["share_kept"] > 0.98 for name in wide)
    stored = mx.load(str(tmp_path / "out" / "model.safetensors")).values()
    assert {array.dtype for array in stored} == {dtype, mx.uint32}


def test_the_layers_that_lose_most_for_their_size_come_first(base):
    loaded, _ = adapted(base)
    comparison_losses = {}

    class Watched(fusing._Comparison):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            comparison_losses.update({name: self.losses[name] / fusing._size(self.fused[name]) for name in self.fused})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusing, "_Comparison", Watched)
        report = fuse_measured(loaded, ROW)
    narrow = comparison_losses.keys() - report.bits
    assert narrow and min(comparison_losses[name] for name in report.bits) >= max(comparison_losses[n] for n in narrow)


@pytest.mark.parametrize("bits", [4, 8])
def test_where_8_bits_do_not_suffice_layers_are_written_in_full(tiny_folder, tmp_path, bits):
    folder = quantized(tmp_path / "base", tiny_folder, group_size=64, bits=bits)
    loaded, config = adapted(folder)
    save_adapter(tmp_path / "adapters", loaded.model, config)
    adapter = twin(loaded.model)
    words = ("--model", folder, "--adapter-file", tmp_path / "adapters", "--save-path", tmp_path / "out")
    call(fuse.main, *words, "--max-fuse-kl", "0.00001")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    run = read_json(tmp_path / "out" / PROVENANCE_FILE)[-1]
    full = {name for name, layer in run["layers"].items() if layer.get("bits") == "full"}
    assert full and not full & bits_of(model).keys()
    assert len(full) == run["figures"]["layers_in_full_precision"] and run["figures"]["kl"] <= 1e-5
    assert kl_of(loaded, adapter, model) < 1e-4
    assert any(isinstance(module, nn.QuantizedEmbedding) for module in model.modules())  # not adapted: as it was


def test_a_base_of_other_numbers_gets_affine_8_bits(tiny_folder, tmp_path):
    """mxfp4, whose scales are no floating-point numbers."""
    folder = quantized(tmp_path / "base", tiny_folder, group_size=32, bits=4, mode="mxfp4")
    loaded, config = adapted(folder)
    save_adapter(tmp_path / "adapters", loaded.model, config)
    adapter = twin(loaded.model)
    words = ("--model", folder, "--adapter-file", tmp_path / "adapters", "--save-path", tmp_path / "out")
    call(fuse.main, *words)
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert 8 in bits_of(model).values() and kl_of(loaded, adapter, model) <= 1.001 * MAX_KL
    call(fuse.main, *words, "--de-quantize")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert not bits_of(model) and kl_of(loaded, adapter, model) < 0.005


def test_infinity_is_the_old_way_and_a_negative_limit_is_refused(base, tmp_path, capsys):
    loaded, config = adapted(base)
    save_adapter(tmp_path / "adapters", loaded.model, config)
    words = ("--model", base, "--adapter-file", tmp_path / "adapters", "--save-path", tmp_path / "out")
    assert "--max-fuse-kl is -1; it has to be" in fails(capsys, fuse.main, *words, "--max-fuse-kl", -1)
    assert "--max-fuse-kl is nan; it" in fails(capsys, fuse.main, *words, "--max-fuse-kl", "nan")
    call(fuse.main, *words, "--max-fuse-kl", "inf")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert set(bits_of(model).values()) == {4}
    run = read_json(tmp_path / "out" / PROVENANCE_FILE)[-1]
    assert run["flags"]["max_fuse_kl"] == "inf" and run["figures"]["kl"] > MAX_KL
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| kl | {run['figures']['kl']} |" in text and "`fuse.py`" in text


def test_a_training_script_keeps_it_too(base, tmp_path):
    loaded, _ = adapted(base)
    adapter = twin(loaded.model)
    save_fused(loaded, tmp_path / "out")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert 8 in bits_of(model).values() and kl_of(loaded, adapter, model) <= 1.001 * MAX_KL


def test_a_widened_model_can_be_tuned_and_fused_again(base, tmp_path):
    loaded, config = adapted(base)
    save_adapter(tmp_path / "adapters", loaded.model, config)
    for source, target in ((base, "first"), (tmp_path / "first", "second")):
        words = ("--model", source, "--adapter-file", tmp_path / "adapters", "--save-path", tmp_path / target)
        call(fuse.main, *words)
    first, second = (mlx_lm.load(str(tmp_path / name))[0] for name in ("first", "second"))
    assert all(bits_of(second)[name] == 8 for name, bits in bits_of(first).items() if bits == 8)
    both = load(str(tmp_path / "first"))
    load_adapter(both.model, tmp_path / "adapters")
    assert kl_of(both, both.model, second) <= 1.001 * MAX_KL
    assert [run["script"] for run in read_json(tmp_path / "second" / PROVENANCE_FILE)] == ["fuse.py", "fuse.py"]


# --- the rows ---


def test_rows_are_of_the_adapters_own_validation_data(tiny_digits, tmp_path):
    loaded = load(str(tiny_digits))
    rows = [{"prompt": f"{n} ", "completion": f"{n + 2}"} for n in range(100, 130)]
    (tmp_path / "mine_valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags: dict[str, object] = {"data": str(tmp_path), "data_base": "mine_"}
    runs = [{"script": "sft.py", "flags": flags, "figures": {}}]
    found = measuring_rows(loaded.model, loaded.tokenizer, runs)
    texts = [loaded.tokenizer.decode(example.tokens[:-1]) for example in found.examples]
    assert texts[0] == "<s>100 102" and texts[-1] == "<s>129 131" and len(texts) == ROWS
    assert found.source == f"8 rows of {tmp_path}/mine_valid.jsonl"
    prompt = len(loaded.tokenizer.encode("100 "))
    assert found.examples[0].first_target == prompt
    flags["mask_prompt"] = False
    assert measuring_rows(loaded.model, loaded.tokenizer, runs).examples[0].first_target < prompt
    # of a reward model
    shutil.copy(ROOT / "data/reward_function_increasing_mult_2_valid.jsonl", tmp_path / "scored_valid.jsonl")
    flags |= {"data_base": "scored_", "reward_model": True}
    assert "scored_valid" in measuring_rows(loaded.model, loaded.tokenizer, runs).source


@pytest.mark.parametrize("flags", [None, {"data": "nowhere", "data_base": "x_"}, {"data": "tests", "data_base": "x_"}])
def test_without_data_the_model_writes_its_own_rows(tiny_digits, flags):
    loaded = load(str(tiny_digits))
    runs = [{"script": "sft.py", "flags": flags, "figures": {}}] if flags else []
    state = np.array(mx.random.state[0])
    first, second = (measuring_rows(loaded.model, loaded.tokenizer, runs) for _ in range(2))
    assert first == second and len(first.examples) == ROWS and first.source == "8 texts that it sampled"
    assert len({tuple(example.tokens) for example in first.examples}) > 1
    assert np.array_equal(state, np.array(mx.random.state[0]))


def test_full_precision_has_no_number_of_bits():
    """It must not be taken for a number of bits in the config of a model."""
    layers = {"a": nn.QuantizedLinear(64, 64, group_size=32, bits=8), "b": nn.Linear(64, 64)}
    before = {"group_size": 32, "bits": 4, "b": {"group_size": 32, "bits": 8}}
    made = fusing._per_layer(before, layers, {"a": 8, "b": FULL})
    assert made == {"group_size": 32, "bits": 4, "a": {"group_size": 32, "bits": 8, "mode": "affine"}}
