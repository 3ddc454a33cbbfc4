"""PPOTrainer against TRL 0.11.4 itself: the same weights, queries, responses and scores give the same three steps.

TRL's results are recorded (tests/trl_cases.py says how). With TRL_PYTHON naming the Python of its environment, they
are computed anew as well:  TRL_PYTHON=~/trl_env/bin/python python -m pytest tests/test_trl_parity.py
"""

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from models import adapters, peft_format, torch_adapters
from tests.torch_models import TOKENIZER
from tests.trl_cases import (
    BATCH,
    CASES,
    LORA,
    ORACLES,
    SIZES,
    STATS,
    STEPS,
    WHOLE_BATCH_STATS,
    Case,
    make_case,
    orders,
    run_trl,
)
from training import torch_trainer
from training import trainer as mlx_trainer
from training.trl_config import PPOConfig

TOLERANCE = 1e-4
NUMBERS = range(CASES)


class MLX:
    """How a case is put into the MLX side, and its weights are read."""

    trainer = mlx_trainer

    @staticmethod
    def set_weights(model, adapter, head):
        model.v_head.update({name: mx.array(weight) for name, weight in head.items()})
        if model.is_peft_model:
            adapters.set_adapter_weights(model.pretrained_model, {n: mx.array(w) for n, w in adapter.items()})

    @staticmethod
    def weights(model):
        head = {f"head/{name}": weight for name, weight in model.v_head.parameters().items()}
        found = {**adapters.adapter_weights(model.pretrained_model), **head}
        return {name: np.array(weight) for name, weight in found.items()}


class Torch:
    """The same of the PyTorch side."""

    trainer = torch_trainer

    @staticmethod
    def set_weights(model, adapter, head):
        model.v_head.load_state_dict({name: torch.from_numpy(weight) for name, weight in head.items()})
        if model.is_peft_model:
            given = {name: torch.from_numpy(weight) for name, weight in adapter.items()}
            torch_adapters.set_adapter_weights(model.pretrained_model, given)

    @staticmethod
    def weights(model):
        head = {f"head/{name}": weight for name, weight in model.v_head.state_dict().items()}
        found = {**torch_adapters.adapter_weights(model.pretrained_model), **head}
        return {name: weight.numpy(force=True) for name, weight in found.items()}


SIDES = [MLX, Torch]


def side_id(side):
    return side.__name__.lower()


def write_llama(folder, weights):
    """A model folder with these weights, which mlx-lm and transformers open."""
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", **SIZES}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2, "bos_token_id": 1}), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def by_our_names(weights):
    """A LoRA under mlx-lm's names and in its layout, from peft's; other weights unchanged."""
    named = {peft_format.our_name(name): weight for name, weight in weights.items()}
    turned = peft_format.TRANSPOSED
    return {name: np.ascontiguousarray(w.T if name.endswith(turned) else w) for name, w in named.items()}


def start(side, case: Case, folder: Path, **changes):
    """A trainer at the beginning of a case. changes: to TRL's options."""
    models = side.trainer.AutoModelForCausalLMWithValueHead
    lora = {**LORA, "peft_type": "LORA"} if case.lora else None
    model = models.from_pretrained(write_llama(folder / "policy", case.policy), peft_config=lora)
    side.set_weights(model, by_our_names(case.adapter), case.head)
    reference = None if case.lora else models.from_pretrained(write_llama(folder / "reference", case.reference))
    config = PPOConfig(**{**case.options, **changes})
    return side.trainer.PPOTrainer(config, model, reference, TOKENIZER)


def results_of(side, case, folder, **changes):
    """What tests/trl_oracle.py records, by our side."""
    trainer = start(side, case, folder, **changes)
    results = {}
    for number, step in enumerate(case.steps):
        stats = trainer.step(*step)
        results[f"{number}/stats"] = np.array([stats[name] for name in (*STATS, *WHOLE_BATCH_STATS)])
        results[f"{number}/advantages"] = stats["ppo/policy/advantages"]
    return {**results, **{f"final/{name}": weight for name, weight in side.weights(trainer.model).items()}}


def of_case(recorded, number):
    prefix = f"{number}/"
    found = {name.removeprefix(prefix): array for name, array in recorded.items() if name.startswith(prefix)}
    return by_our_names_of_final(found)


def by_our_names_of_final(found):
    final = by_our_names({name.removeprefix("final/"): w for name, w in found.items() if name.startswith("final/")})
    steps = {name: array for name, array in found.items() if not name.startswith("final/")}
    return {**steps, **{f"final/{name}": weight for name, weight in final.items()}}


def differences(case, ours, trl):
    """Name → the largest difference, relative to the largest number where that is above 1; weights absolutely."""
    assert ours.keys() == trl.keys()
    found = {}
    for name, expected in trl.items():
        actual = ours[name]
        if name.endswith("stats"):
            compared = len(STATS) + len(WHOLE_BATCH_STATS) * (case.options["mini_batch_size"] == BATCH)
            actual, expected = actual[:compared], expected[:compared]
        assert actual.shape == expected.shape, name
        error = np.abs(actual - expected)
        found[name] = float((error if name.startswith("final/") else error / np.maximum(1, np.abs(expected))).max())
    return found


@pytest.fixture(scope="module")
def recorded():
    return load_file(ORACLES)


@pytest.mark.parametrize("side", SIDES, ids=side_id)
@pytest.mark.parametrize("number", NUMBERS)
def test_three_steps_are_those_of_trl(side, number, recorded, tmp_path):
    case = make_case(number)
    trl = of_case(recorded, number)
    worst = differences(case, results_of(side, case, tmp_path), trl)
    assert max(worst.values()) < TOLERANCE, worst
    before = case.policy if not case.lora else by_our_names(case.adapter)
    moved = max(np.abs(trl[f"final/{name}"] - weight).max() for name, weight in before.items())
    assert moved > 5 * TOLERANCE  # so that weights which were left alone would not pass


@pytest.mark.parametrize("side", SIDES, ids=side_id)
@pytest.mark.parametrize(
    "changes",
    [{"lam": 0.5}, {"kl_penalty": "mse"}, {"init_kl_coef": 1.0}, {"cliprange_value": 1.0}, {"vf_coef": 2.0},
     {"learning_rate": 1e-2}, {"ppo_epochs": 2}, {"seed": 99}],
    ids=str,
)
def test_each_option_matters(side, changes, recorded, tmp_path):
    case = make_case(16)  # LoRA, mini batches of less than the batch
    assert case.options["mini_batch_size"] < BATCH
    worst = differences(case, results_of(side, case, tmp_path, **changes), of_case(recorded, 16))
    assert max(worst.values()) > 5 * TOLERANCE


def test_the_cases_cover_the_options():
    cases = [make_case(number) for number in NUMBERS]
    for half in (cases[: CASES // 2], cases[CASES // 2 :]):
        kinds = {name: {case.options[name] for case in half} for name in cases[0].options}
        for name in ("whiten_rewards", "use_score_scaling", "use_score_norm", "adap_kl_ctrl"):
            assert kinds[name] == {True, False}, name
        assert kinds["kl_penalty"] == {"kl", "abs", "mse", "full"}
        assert kinds["gradient_accumulation_steps"] == {1, 2} and len(kinds["mini_batch_size"]) > 1
        assert None in kinds["score_clip"] and len(kinds["score_clip"]) > 1
        assert None in kinds["max_grad_norm"] and len(kinds["max_grad_norm"]) > 1
    lengths = {len(row) for case in cases for step in case.steps for row in step.responses}
    assert len(lengths) > 3 and all(len(orders(case)) == STEPS * case.options["ppo_epochs"] for case in cases)


def test_trl_itself_gives_what_is_recorded(recorded):
    python = os.environ.get("TRL_PYTHON")
    if not python:
        pytest.skip("TRL_PYTHON does not name the Python of an environment with TRL 0.11.4")
    cases = [make_case(number) for number in NUMBERS]
    now = run_trl(python, cases)
    assert now.keys() == recorded.keys()
    for name, array in now.items():
        np.testing.assert_allclose(array, recorded[name], rtol=1e-4, atol=1e-5, err_msg=name)
