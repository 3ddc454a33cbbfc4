"""models/memory_plan.py and models/outline.py: exact numbers of weights, hand-worked bytes, and measured peaks."""

import json
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks import plan as benchmark
from benchmarks.plan import LLAMA, SMALL, Cell
from common.errors import UserError
from models import memory_plan
from models.adapters import AdapterConfig, adapter_weights, attach_adapter
from models.memory_plan import EvaluationWork, MemoryPlan, PPOWork, SFTWork
from models.outline import outline_of
from tests.architectures import build, settings_of
from tests.plan_tables import CONFIGS

LORA = {"rank": 2, "scale": 1.0, "dropout": 0.0}
SHAPE = {**LLAMA, "hidden_size": 8, "num_hidden_layers": 3, "intermediate_size": 20, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 50}  # fmt: skip


def lora(layers=-1, kind="lora", **changes):
    return AdapterConfig(kind, layers, {**LORA, **changes})


PUBLISHED = {"Qwen3-0.6B": 0.596, "Llama-3.2-1B": 1.236, "SmolLM2-1.7B": 1.711, "Llama-3.2-3B": 3.213,
             "Mistral-7B": 7.248, "Qwen2.5-7B": 7.616, "Llama-3.1-8B": 8.030, "Qwen2.5-14B": 14.770}  # fmt: skip


@pytest.mark.parametrize(("name", "config"), [(n, c) for n, c in CONFIGS.items() if "quantization" not in c])
def test_the_sizes_are_the_published_ones_and_nothing_is_computed(name, config):
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    billions = next(size for short, size in PUBLISHED.items() if short in name)
    assert outline_of(config).weights / 2e9 == pytest.approx(billions, abs=0.002)
    assert mx.get_peak_memory() - before < 1e6


@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "gemma3", "mixtral"])
@pytest.mark.parametrize("adapter", [lora(1), lora(1, "dora"), AdapterConfig("soft_prompt", num_prompt_tokens=3)])
def test_an_outline_has_the_weights_of_the_model(family, adapter):
    if family == "mixtral" and adapter.fine_tune_type == "dora":
        pytest.skip("mlx-lm has no DoRA of experts")
    model = build(family)
    outline = outline_of({**settings_of(family), "dtype": "float32"}, adapter)
    assert outline.weights == sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    attach_adapter(model, adapter)
    assert outline.trained == sum(array.size for array in adapter_weights(model).values())
    assert outline.passed_layers == (len(model.layers) if outline.soft_tokens else 1)


def test_quantized_weights_take_what_mlx_stores():
    layer = nn.QuantizedLinear.from_linear(nn.Linear(256, 128, bias=False), 64, 4)
    config: dict[str, Any] = {**LLAMA, **SMALL, "hidden_size": 256, "dtype": "bfloat16"}
    of_layer = sum(array.nbytes for _, array in tree_flatten(layer.parameters())) - 2 * 2 * 256 * 128 // 64
    bits, plain = {**config, "quantization": {"bits": 4, "group_size": 64}}, outline_of(config).weights
    norms = (2 * config["num_hidden_layers"] + 1) * 256 * 2
    assert outline_of(bits).weights == (plain - norms) * of_layer / (2 * 256 * 128) + norms


def test_what_a_layer_keeps_by_hand():
    """Per token: norms 2 · 8 · 4; q 8, k and v 4 each, 2 heads of 6 places; gate, up, sigmoid, product of 20; of LoRAs
    the inputs 8 (q, k, v), 8 (o), 8 (gate, up), 20 (down) and 7 ranks of 2."""
    outline = outline_of(SHAPE, lora())
    attention, lora_inputs = 8 + 4 + 4 + 2 * 6, 8 + 8 + 8 + 20 + 7 * 2
    assert memory_plan.kept_a_token(outline, 6, on_gpu=True) == 4 * (16 + attention + 4 * 20 + lora_inputs)
    assert memory_plan.kept_a_token(outline, 6, on_gpu=False) == 4 * (16 + attention + 3 * 20 + lora_inputs)
    in_bf16 = outline_of({**SHAPE, "dtype": "bfloat16"}, lora())
    plain = 4 * 16 + 2 * (attention + 4 * 20)
    assert memory_plan.kept_a_token(in_bf16, 6, on_gpu=True) == plain + 4 * lora_inputs
    each = lora_inputs + 8 + 8 + 8  # q, k, v and gate, up convert their input by themselves
    assert memory_plan.kept_a_token(in_bf16, 6, on_gpu=False) == plain + 4 * each
    of_dora = outline_of({**SHAPE, "dtype": "bfloat16"}, lora(kind="dora"))
    outputs = 8 + 4 + 4 + 8 + 20 + 20 + 8
    assert memory_plan.kept_a_token(of_dora, 6, on_gpu=True) == plain + 4 * lora_inputs + 2 * outputs


def test_queries_and_values_keep_one_input_and_a_soft_prompt_none():
    two = lora(keys=["self_attn.q_proj", "self_attn.v_proj"])
    soft = AdapterConfig("soft_prompt", num_prompt_tokens=3)
    all_layers, of_two, of_soft = (
        memory_plan.kept_a_token(outline_of(SHAPE, each), 6, True) for each in (lora(), two, soft)
    )
    assert of_two - of_soft == 4 * (8 + 2 * 2)
    assert all_layers - of_two == 4 * (8 + 8 + 20 + 5 * 2)
    assert outline_of(SHAPE, soft).passed_layers == 3


def test_a_full_fine_tune_is_in_float32_with_a_second_model_as_reference():
    outline = outline_of({**SHAPE, "dtype": "bfloat16"}, AdapterConfig("full"))
    count = outline.trained
    assert outline.weights == 4 * count
    plan = memory_plan.plan_ppo(outline, PPOWork(4, 4, 2, 3, 5), on_gpu=True)
    assert plan.held["optimizer"] == 8 * count and plan.held["reference"] == 4 * count
    of_base = memory_plan.plan_ppo(outline, PPOWork(4, 4, 2, 3, 5, base_is_reference=True), on_gpu=True)
    assert of_base.held["reference"] == 2 * count


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    outline = outline_of(SHAPE, lora(2))
    tokens = 30
    layer = tokens * memory_plan.kept_a_token(outline, 6, True)
    assert memory_plan.activations(outline, tokens, 6, True, checkpoint=False) == 2 * layer
    assert memory_plan.activations(outline, tokens, 6, True, checkpoint=True) == 2 * tokens * 8 * 4 + layer


def test_the_kv_cache_is_that_of_the_completions_in_flight():
    found = memory_plan.sampling(outline_of(SHAPE, lora()), 4, 4, 3, 5, on_gpu=True)
    assert found["KV cache"] == 2 * (3 + 1) * 1 * 4 * 8 * 4 * 4  # one layer's twice, in float32
    long = memory_plan.sampling(outline_of(SHAPE, lora()), 4, 4, 200, 100, on_gpu=True)
    assert long["KV cache"] == 2 * 4 * 4 * 512 * 4 * 4  # it grows by 256


def test_logits_are_those_of_the_pieces_that_are_queued():
    outline = outline_of(SHAPE, lora())
    row, budget = 4 * 50, 13 * 10**5
    assert memory_plan.logits(outline, 10, budget, on_gpu=True) == 5 * row * 10  # a single piece
    rows = budget // (13 * row)  # 500, as thirteen arrays are counted on a GPU
    assert memory_plan.logits(outline, 2 * rows, budget, on_gpu=True, training=True) == 3 * 2 * row * rows
    many = 100 * rows
    assert memory_plan.logits(outline, many, budget, on_gpu=True) == 6 * row * rows
    assert memory_plan.logits(outline, many, budget, on_gpu=True, training=True) == 13 * row * rows
    on_cpu = memory_plan.logits(outline, many, budget, on_gpu=False, training=True)
    assert on_cpu == pytest.approx(9.3 / 16 * budget, rel=0.01)


def test_working_arrays_are_those_of_the_wider_half_of_a_layer():
    outline = outline_of(SHAPE, lora())
    short, long, longer = (memory_plan.working(outline, 10, length, on_gpu=True) for length in (1, 1000, 2000))
    assert short == 10 * 4 * (8 * 8 + 5 * (outline.intermediate + 2 * 4 + 4))
    assert longer - long == 10 * 4 * outline.heads * 1000
    assert memory_plan.working(outline, 10, 1, True, in_flight=2.0) == 2 * short


def test_only_layers_that_learn_keep_anything_and_their_input_is_kept_for_the_rollout():
    plans = [memory_plan.plan_ppo(outline_of(SHAPE, lora(n)), PPOWork(4, 4, 2, 3, 5), True) for n in (1, 2, 3)]
    kept = [plan.phases["update"]["kept activations"] for plan in plans]
    assert kept[1] == 2 * kept[0] and kept[2] == 3 * kept[0]
    assert [plan.phases["update"]["states of frozen layers"] for plan in plans] == [4 * 7 * 8 * 4] * 2 + [0]


def test_pieces_and_pairs_and_heads_count():
    outline = outline_of(SHAPE, lora())
    whole = memory_plan.plan_sft(outline, SFTWork(8, 8, 10), True)
    half = memory_plan.plan_sft(outline, SFTWork(4, 8, 10, several_pieces=True), True)
    kept = [plan.phases["training"]["kept activations"] for plan in (whole, half)]
    assert kept[0] == 2 * kept[1] and whole.phases["validation"] == half.phases["validation"]
    assert half.phases["training"]["gradients"] == 4 * outline.trained
    headed = memory_plan.plan_sft(outline, SFTWork(8, 8, 10, head=True), True)
    assert headed.held["adapter"] - whole.held["adapter"] == 4 * 8 and headed.phases["training"]["logits"] == 0


def test_gradients_count_where_activations_are_few():
    outline = outline_of(SHAPE, AdapterConfig("full"))
    training = memory_plan.plan_sft(outline, SFTWork(1, 1, 1), True).phases["training"]
    assert sum(training.values()) == 2 * 4 * outline.trained


def test_a_plan_s_peak_is_its_widest_phase():
    plan = MemoryPlan({"weights": 5, "adapter": 1}, {"sampling": {"KV cache": 3}, "update": {"kept": 2, "logits": 2}})
    assert (plan.peak_of("sampling"), plan.widest, plan.peak) == (9, "update", 10)


def test_an_evaluation_holds_the_others_too():
    outline = outline_of(SHAPE)
    work = EvaluationWork(4, 3, 5, other_models=1000)
    plan = memory_plan.plan_evaluation(outline, work, True)
    assert plan.held["other models"] == 1000 and list(plan.phases) == ["sampling"]
    assert "scoring" in memory_plan.plan_evaluation(outline, replace(work, reference=True), True).phases


def test_a_config_without_sizes_is_refused_in_a_line():
    with pytest.raises(UserError, match=r"intermediate_size.*family rwkv7"):
        outline_of({key: value for key, value in SHAPE.items() if key != "intermediate_size"} | {"model_type": "rwkv7"})
    with pytest.raises(UserError, match="quantization 'aqlm'"):
        outline_of({**SHAPE, "quantization_config": {"quant_method": "aqlm"}})
    with pytest.raises(UserError, match="nonesuch"):
        outline_of({**SHAPE, "model_type": "nonesuch"})


TINY = {**LLAMA, **SMALL, "num_hidden_layers": 10, "vocab_size": 400}
PEAKS = {
    "sft": Cell("sft.py", "--lora-layers -1", 128, TINY),
    "queries and values": Cell("sft.py", benchmark.QUERIES_AND_VALUES, 128, TINY),
    "full": Cell("sft.py", "--fine-tune-type full", 128, TINY),
    "checkpoint": Cell("sft.py", "--lora-layers -1 --grad-checkpoint", 256, TINY),
    "ppo": Cell("ppo_training.py", "--lora-layers -1 --batch-size 8 --mini-batch-size 8 --ppo-epochs 1 "
                                   "--max-completion-length 64", 64, TINY),
}  # fmt: skip


@pytest.mark.parametrize("name", PEAKS)
def test_the_planned_peak_is_the_measured_one(name):
    """On CPU; benchmarks/plan.py has more, and those of a simulated GPU."""
    cell = PEAKS[name]
    before = mx.get_active_memory()  # of other tests
    measured = max(benchmark.measure(cell).values()) - before
    planned = benchmark.plan(cell, on_gpu=False).peak
    assert planned == pytest.approx(measured, rel=0.2), f"{planned / 1e6:.1f} MB planned, {measured / 1e6:.1f} measured"


def test_the_benchmark_s_cells_and_table():
    assert len(benchmark.CELLS) >= 12
    for cell in benchmark.CELLS.values():
        json.dumps(cell.config)
        assert benchmark.plan(cell, on_gpu=True).peak > 0
    plan = MemoryPlan({"weights": 10**6}, {"training": {"logits": 10**6}})
    line = benchmark.line("full", "cpu", plan, {"training": 1_600_000})
    assert line == "| full | cpu | 2 | 2 | 1.25 | training 1.25 |"
