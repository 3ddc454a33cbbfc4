"""What comes from TRL into PPOTrainer: its options, arguments and arrays, what is refused, and what is saved.

Not here: the numbers of a step (tests/test_trl_parity.py), whole programs (tests/test_trl_examples.py).
"""

import re
import runpy
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from common.errors import UserError
from models import adapters, loading
from models.torch_value_head import ValueHead as TorchValueHead
from models.value_head import ValueHead
from tests.torch_models import TOKENIZER, random_llama
from training import torch_trainer, trl_trainer
from training import trainer as mlx_trainer
from training.trl_config import REFUSED, LengthSampler, PPOConfig, Sampling, lora_adapter, sampling
from training.trl_trainer import Batches, like, token_ids

ROOT = Path(__file__).resolve().parent.parent
SIDES = {"mlx": mlx_trainer, "torch": torch_trainer}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
QUERIES = [[1, 30, 31], [1, 40], [1, 50, 51, 52], [1, 60]]
RESPONSES = [[20, 21], [22, 23, 24], [25], [26, 27, 28, 29]]
SCORES = [1.0, -0.5, 0.25, 2.0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random Llama of three layers."""
    return random_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=SIDES)
def side(request):
    return SIDES[request.param]


@pytest.fixture
def make(side, base):
    """A trainer on the random Llama. options: of PPOConfig."""

    def make(peft_config=None, ref_model=None, **options):
        config = PPOConfig(**{"batch_size": 4, "mini_batch_size": 4, "learning_rate": 1e-3, **options})
        model = side.AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=peft_config)
        return side.PPOTrainer(config, model, ref_model, TOKENIZER)

    return make


# --- options ---


OTHER: dict[str, Any] = {"tracker_project_name": "mine", "compare_steps": 2, "world_size": 2, "forward_batch_size": 4}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_option_is_named_with_what_to_use_instead(name):
    with pytest.raises(UserError, match=rf"{name} is .*not supported; {REFUSED[name][:20]}"):
        PPOConfig(**{name: OTHER.get(name, True)})


def test_what_states_trls_defaults_is_taken():
    given: dict[str, Any] = {"optimize_device_cache": False, "tracker_kwargs": {}, "compare_steps": 1}
    names: dict[str, Any] = {"tracker_project_name": "trl", "model_name": "gpt2", "task_name": "x"}
    assert PPOConfig(**given, **names, steps=20000) is not None


def test_the_options_in_the_librarys_words():
    config = PPOConfig(batch_size=24, mini_batch_size=4, gradient_accumulation_steps=3, lam=0.9, cliprange=0.1,
                       cliprange_value=0.3, use_score_norm=True, target_kl=0.5, learning_rate=3e-4)  # fmt: skip
    settings = config.settings()
    assert (settings.mini_batch_size, settings.gradient_accumulation_steps) == (12, 3)
    assert (settings.gae_lambda, settings.clip_range, settings.value_clip_range) == (0.9, 0.1, 0.3)
    assert settings.learning_rate == settings.value_head_learning_rate == 3e-4
    assert not settings.center_values and settings.lr_schedule == "constant" and settings.temperature == 1
    assert settings.max_grad_norm == settings.score_clip == 0  # none, as in TRL
    assert not settings.normalize_scores  # TRL subtracts the mean only where it scales
    assert settings.target_kl == 0 and PPOConfig(early_stopping=True, target_kl=0.5).settings().target_kl == 0.5
    scaled = PPOConfig(use_score_scaling=True, use_score_norm=True).settings()
    assert scaled.scale_scores and scaled.normalize_scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 20, "mini_batch_size": 8}, "batch_size 20 is not a multiple of .* 8; try batch_size 24"),
        ({"mini_batch_size": 0}, "at least 1"),
        ({"kl_penalty": "k9"}, "k9"),
        ({"learning_rate": -1.0}, "learning-rate"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(**options)


def test_transformers_parser_of_arguments_takes_the_options():
    from transformers import HfArgumentParser

    words = ["--batch_size", "8", "--mini_batch_size", "4", "--early_stopping", "--log_with", "wandb"]
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(words)
    assert config == PPOConfig(batch_size=8, mini_batch_size=4, early_stopping=True, log_with="wandb")


def test_an_option_that_trl_does_not_have_either():
    with pytest.raises(TypeError, match="cliprage"):
        PPOConfig(cliprage=0.1)  # type: ignore[call-arg]


# --- generation arguments and peft ---


def test_generation_arguments_of_the_examples():
    given = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 5, "max_new_tokens": 7}
    assert sampling(given, {2}, 3) == Sampling(7, 1.0, {2}, 5)
    assert sampling({**given, "eos_token_id": -1, "temperature": 0.7}, {2}, 3) == Sampling(7, 0.7, set(), 5)
    assert sampling({"max_new_tokens": 1, "eos_token_id": [4, 5]}, {2}, 3) == Sampling(1, 0.0, {4, 5}, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"top_k": 50}, "top_k is 50.*whole distribution"), ({"top_p": 0.9}, "top_p is 0.9"),
     ({"min_length": 3}, "min_length"), ({"num_beams": 2}, "num_beams"), ({"max_length": 20}, "use max_new_tokens"),
     ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"max_new_tokens": None}, "max_new_tokens"),
     ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0"), ({"bad_words_ids": [[1]]}, "bad_words_ids")],
    ids=str,
)  # fmt: skip
def test_generation_that_ppo_cannot_follow_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        sampling({"max_new_tokens": 4, **given}, {2}, 3)


LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"]


def test_a_peft_configuration_becomes_an_adapter():
    adapter = lora_adapter({**LORA, "lora_dropout": 0.1}, LAYERS, "base")
    assert adapter.lora_parameters == {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": LAYERS[:2]}
    assert (adapter.fine_tune_type, adapter.num_layers, adapter.model) == ("lora", -1, "base")
    by_default = lora_adapter({**LORA, "target_modules": None, "use_rslora": True}, LAYERS, "base")
    assert by_default.lora_parameters["keys"] == LAYERS[:2] and by_default.lora_parameters["scale"] == 4.0
    assert lora_adapter({**LORA, "use_dora": True}, LAYERS, "base").fine_tune_type == "dora"


def test_pefts_own_object_is_taken():
    from peft import LoraConfig

    given = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    assert lora_adapter(given, LAYERS, "base").lora_parameters == lora_adapter(LORA, LAYERS, "base").lora_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"target_modules": ["c_attn"]}, "no layer of base ends in one of c_attn"), ({"bias": "all"}, "bias"),
     ({"target_modules": "all-linear"}, "all-linear"), ({"layers_to_transform": [0]}, "layers_to_transform"),
     ({"peft_type": "IA3"}, "IA3"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")],
    ids=str,
)  # fmt: skip
def test_peft_that_has_no_counterpart_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        lora_adapter({**LORA, **changes}, LAYERS, "base")


# --- arrays, lengths, batches ---


@pytest.mark.parametrize("array", [mx.array, torch.tensor, np.array, list], ids=["mlx", "torch", "numpy", "list"])
def test_what_comes_back_is_of_the_kind_that_was_given(array):
    given = array([3, 4])
    assert token_ids(given) == [3, 4]
    made = like([5, 6, 7], given)
    assert type(made) is type(given) and token_ids(made) == [5, 6, 7]
    with pytest.raises(UserError, match="rows of shape"):
        token_ids(array([[3, 4]]))


def test_lengths_are_drawn_by_the_seed(side):
    draw = LengthSampler(4, 7)
    side.set_seed(3)
    lengths = [draw() for _ in range(50)]
    assert set(lengths) == {4, 5, 6}
    side.set_seed(3)
    assert [draw() for _ in range(50)] == lengths


def test_batches_are_shuffled_anew_and_whole():
    rows = [{"query": str(i), "id": i} for i in range(10)]
    batches = Batches(rows, 4, None, seed=0)
    first, second = ([batch["id"] for batch in batches] for _ in range(2))
    assert len(batches) == len(first) == 2 and all(len(ids) == 4 for ids in first)
    assert first != second and len({i for ids in first for i in ids}) == 8
    assert [batch["id"] for batch in Batches(rows, 4, None, seed=0)] == first
    assert next(iter(Batches(rows, 4, len, seed=0))) == 4  # a collator gets the rows
    with pytest.raises(UserError, match="10 rows, fewer than batch_size 11"):
        Batches(rows, 11, None, seed=0)


# --- generate ---


def test_generate_of_one_query_and_of_a_list(make):
    trainer = make()
    query = torch.tensor(QUERIES[0])
    one = trainer.generate(query, do_sample=True, max_new_tokens=5, eos_token_id=-1)
    assert one.shape == (1, 8) and one.dtype == query.dtype and one[0, :3].tolist() == QUERIES[0]
    queries = [torch.tensor(row) for row in QUERIES]
    many = trainer.generate(queries, batch_size=3, max_new_tokens=5, eos_token_id=-1)
    short = trainer.generate(queries, batch_size=3, max_new_tokens=5, eos_token_id=-1, return_prompt=False)
    for row, whole, response in zip(QUERIES, many, short, strict=True):
        assert whole.tolist() == row + response.tolist()  # greedy, as it is without do_sample
    assert trainer.generate(query, max_new_tokens=5, return_prompt=False, eos_token_id=-1).tolist()[0] == (
        short[0].tolist()
    )


def test_generate_draws_lengths_and_asks_the_reference(make):
    trainer = make()
    lengths = iter([2, 3])
    queries = [mx.array(row) for row in QUERIES]
    given = {"batch_size": 2, "return_prompt": False, "eos_token_id": -1}
    found = trainer.generate(queries, length_sampler=lambda: next(lengths), **given)
    assert [len(response) for response in found] == [2, 2, 3, 3]
    ours, theirs = trainer.generate(queries, max_new_tokens=6, generate_ref_response=True, **given)
    assert [row.tolist() for row in ours] == [row.tolist() for row in theirs]
    for _ in range(3):
        trainer.step(queries, [mx.array(row) for row in RESPONSES], SCORES)
    ours, again = trainer.generate(queries, max_new_tokens=6, generate_ref_response=True, **given)
    assert [row.tolist() for row in again] == [row.tolist() for row in theirs]  # the reference stays
    assert [row.tolist() for row in ours] != [row.tolist() for row in theirs]


def test_a_model_generates_rows_padded_on_the_right(side, tiny_digits):
    model = side.AutoModelForCausalLMWithValueHead.from_pretrained(str(tiny_digits))
    (eos,) = model.eos_token_ids
    rows = model.generate(torch.tensor([[1, 55]] * 16), do_sample=True, max_new_tokens=40, pad_token_id=7)
    for row in rows.tolist():
        if eos in row:
            assert set(row[row.index(eos) + 1 :]) <= {7}
    assert rows.shape[0] == 16 and rows.shape[1] <= 42


# --- step ---


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_step_learns_and_reports_under_both_names(make, peft_config):
    trainer = make(peft_config)
    stats = [trainer.step(QUERIES, RESPONSES, SCORES) for _ in range(3)]
    assert stats[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(stats[-1]["objective/kl"]) > 1e-3
    assert stats[0]["ppo/mean_scores"] == stats[0]["mean_score"] == pytest.approx(np.mean(SCORES))
    assert stats[0]["ppo/std_scores"] == pytest.approx(np.std(SCORES, ddof=1))
    assert stats[0]["tokens/responses_len_mean"] == 2.5 and stats[0]["tokens/queries_dist"].tolist() == [3, 2, 4, 2]
    assert stats[0]["objective/kl_dist"].shape == (4,) and stats[0]["ppo/policy/advantages"].shape == (10,)
    assert stats[1]["ppo/loss/total"] == pytest.approx(
        stats[1]["ppo/loss/policy"] + trainer.config.vf_coef * stats[1]["ppo/loss/value"]
    )
    assert stats[1]["ppo/policy/approxkl"] == stats[1]["approx_kl"]


def test_the_coefficient_follows_the_kl(make):
    trainer = make(init_kl_coef=0.1, target=1.0, horizon=40)
    stats = trainer.step(QUERIES, RESPONSES, SCORES)
    # KL 0 is a fifth, the most, below the target: 1 − 0.2 · 4 / 40.
    assert stats["objective/kl_coef"] == 0.1 and trainer.kl_ctl.value == pytest.approx(0.1 * 0.98)
    fixed = make(init_kl_coef=0.1, adap_kl_ctrl=False)
    fixed.step(QUERIES, RESPONSES, SCORES)
    assert fixed.kl_ctl.value == 0.1


def test_a_response_is_trained_on_past_an_eos(make):
    trainer = make()
    eos = next(iter(trainer.model.eos_token_ids))
    responses = [[20, eos, 21], [22, 23, 24], [eos], [26, 27, 28]]
    stats = trainer.step(QUERIES, responses, SCORES)
    assert stats["completion_length"] == 2.5 and stats["eos_share"] == 0.5
    assert stats["objective/logprobs"][0, 2] != 0


def test_updates_end_where_the_policy_has_moved_too_far(make):
    options = {"mini_batch_size": 2, "ppo_epochs": 3, "learning_rate": 0.01, "ratio_threshold": 1e9}
    assert make(**options).step(QUERIES, RESPONSES, SCORES)["updates"] == 6
    stopped = make(**options, early_stopping=True, target_kl=1e-3).step(QUERIES, RESPONSES, SCORES)
    assert 1 <= stopped["updates"] < 6
    skipped = make(**{**options, "ratio_threshold": 1e-6}).step(QUERIES, RESPONSES, SCORES)
    assert skipped["skipped_updates"] == 6 and np.isnan(skipped["ppo/loss/total"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((QUERIES[:3], RESPONSES, SCORES), "3 queries were given, batch_size is 4"),
        ((QUERIES, RESPONSES, SCORES[:2]), "2 scores were given"),
        ((QUERIES, [[], *RESPONSES[1:]], SCORES), "one of the responses is empty"),
        (([[], *QUERIES[1:]], RESPONSES, SCORES), "one of the queries is empty"),
        ((QUERIES, RESPONSES, [float("nan"), *SCORES[1:]]), "one finite number"),
        ((QUERIES, RESPONSES, [[1.0, 2.0], *SCORES[1:]]), "one finite number"),
        (([[row] for row in QUERIES], RESPONSES, SCORES), "rows of shape"),
        ((QUERIES, RESPONSES, SCORES, [[1]]), "response_masks is not supported"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(make, given, message):
    trainer = make()
    with pytest.raises(UserError, match=message):
        trainer.step(*given)


@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler", "training_data_collator"])
def test_other_arguments_of_the_trainer_are_refused(make, side, name):
    model = make().model
    with pytest.raises(UserError, match=f"PPOTrainer: {name} is .*not supported"):
        side.PPOTrainer(PPOConfig(), model, None, TOKENIZER, **{name: object()})
    with pytest.raises(UserError, match="ref_model is the model itself"):
        side.PPOTrainer(PPOConfig(), model, model, TOKENIZER)
    with pytest.raises(UserError, match="is a reference"):
        side.PPOTrainer(PPOConfig(), side.create_reference_model(model), None, TOKENIZER)


def test_other_arguments_of_loading_are_refused(side, base):
    models = side.AutoModelForCausalLMWithValueHead
    with pytest.raises(UserError, match=r"v_head_init_strategy is 'normal'.*starts at 0"):
        models.from_pretrained(base, v_head_init_strategy="normal")
    with pytest.raises(UserError, match="not a SimpleNamespace"):
        models.from_pretrained(SimpleNamespace())


def frozen_names(trainer):
    return {name for name, before, after in trainer if np.array_equal(before, after)}


def numpy_weights(model):
    if hasattr(model, "named_parameters"):
        return {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
    from mlx.utils import tree_flatten

    return {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}


def test_shared_layers_are_not_trained(side, base):
    model = side.AutoModelForCausalLMWithValueHead.from_pretrained(base)
    reference = side.create_reference_model(model, num_shared_layers=2)
    config = PPOConfig(batch_size=4, mini_batch_size=4, learning_rate=1e-2)
    trainer = side.PPOTrainer(config, model, reference, TOKENIZER)
    before = numpy_weights(model.pretrained_model)
    trainer.step(QUERIES, RESPONSES, SCORES)
    after = numpy_weights(model.pretrained_model)
    same = frozen_names((name, before[name], after[name]) for name in before)
    assert same == {name for name in before if "embed_tokens" in name or ".layers.0." in name or ".layers.1." in name}
    with pytest.raises(UserError, match="num_shared_layers is 3; it must be below the 3 layers"):
        side.create_reference_model(model, num_shared_layers=3)
    with pytest.raises(UserError, match="pattern"):
        side.create_reference_model(model, pattern="layers.{layer}")


PAGE = (ROOT / "docs/from_trl.md").read_text(encoding="utf-8")


def test_the_page_lists_what_is_refused_and_taken():
    table = PAGE.split("<!-- refused -->")[1].split("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert {name.strip("`"): remedy for name, remedy in rows} == REFUSED
    taken = PAGE.split("## Options")[1].split("<!-- refused -->")[0]
    assert set(re.findall(r"`([a-z_]+)`", taken)) == {field.name for field in fields(PPOConfig)} - set(REFUSED)


def test_the_page_names_the_stats(make):
    stats = make().step(QUERIES, RESPONSES, SCORES)
    table = PAGE.split("## Names of stats")[1].split("| TRL |")[1].split("Not reported")[0]
    named = set(re.findall(r"`([\w/]+)`", table)) - {"kl_penalty", "vf_coef", "responses"}
    responses = {name.replace("queries", "responses") for name in named if "queries" in name}
    assert named | responses == stats.keys()


def test_the_page_s_program_runs(monkeypatch, tmp_path, capsys):
    program = next(block for block in re.findall(r"(?:^(?: {4}.*)?\n)+", PAGE, re.MULTILINE) if "for _ in" in block)
    (tmp_path / "program.py").write_text(textwrap.dedent(program), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("program.py")
    assert len(capsys.readouterr().out.splitlines()) == 3 and (tmp_path / "my_ppo_model/config.json").is_file()


# --- what is left behind ---


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_what_is_saved_is_opened_again(make, side, peft_config, tmp_path):
    trainer = make(peft_config)
    trainer.step(QUERIES, RESPONSES, SCORES)
    folder = tmp_path / "saved"
    trainer.save_pretrained(folder)
    trainer.step(QUERIES, RESPONSES, SCORES)
    trainer.save_pretrained(folder)  # in place of the first
    saved = side.AutoModelForCausalLMWithValueHead.from_pretrained(str(folder))
    assert saved.is_peft_model is (peft_config is not None)
    again = side.PPOTrainer(trainer.config, saved, trainer.ref_model, TOKENIZER)
    mine, theirs = (t.step(QUERIES, RESPONSES, SCORES) for t in (trainer, again))
    for name in ("objective/kl", "ppo/val/mean", "objective/entropy"):  # before the update, so the same
        assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-5), name
    assert abs(theirs["ppo/val/mean"]) > 1e-4


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_other_side_opens_what_one_saved(make, side, base, peft_config, tmp_path):
    trainer = make(peft_config)
    trainer.step(QUERIES, RESPONSES, SCORES)
    trainer.save_pretrained(tmp_path / "saved")
    other = next(module for module in SIDES.values() if module is not side)
    models = other.AutoModelForCausalLMWithValueHead
    reference = None if peft_config else models.from_pretrained(base)
    opened = other.PPOTrainer(trainer.config, models.from_pretrained(str(tmp_path / "saved")), reference, TOKENIZER)
    mine, theirs = (t.step(QUERIES, RESPONSES, SCORES) for t in (trainer, opened))
    for name in ("objective/kl", "ppo/val/mean", "objective/entropy", "ppo/policy/entropy"):
        assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-4), name
    assert abs(mine["objective/kl"]) > 1e-3 and abs(mine["ppo/val/mean"]) > 1e-4


def test_a_saved_lora_is_an_adapter_folder(make, side, base, tmp_path):
    trainer = make(LORA)
    trainer.step(QUERIES, RESPONSES, SCORES)
    trainer.save_pretrained(tmp_path / "saved")
    model = loading.load(base).model
    saved = adapters.load_adapter(model, tmp_path / "saved")
    assert saved.value_head is None  # else fuse.py and talk_to_model.py would take it for a reward model
    assert saved.config.lora_parameters["rank"] == 4 and saved.config.model == base
    with pytest.raises(UserError, match="is an adapter already"):
        side.AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "saved"), peft_config=LORA)


def test_a_damaged_head_is_refused(make, side, tmp_path):
    folder = tmp_path / "saved"
    make().save_pretrained(folder)
    head = folder / trl_trainer.HEAD_FILE
    models = side.AutoModelForCausalLMWithValueHead
    save_file({"weight": np.zeros((1, 5), np.float32), "bias": np.zeros(1, np.float32)}, head)
    with pytest.raises(UserError, match=r"v_head.safetensors does not fit .* weight is \(1, 5\), the model has"):
        models.from_pretrained(str(folder))
    head.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match=r"v_head.safetensors .*save the model again"):
        models.from_pretrained(str(folder))


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.told = []

    def figures(self, step, figures):
        self.told.append((step, figures))

    def table(self, step, name, rows):
        self.told.append((step, name, rows))

    def close(self):
        pass


def test_stats_go_to_the_tracker(make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recorder = Recorder()
    monkeypatch.setattr(trl_trainer, "open_tracker", lambda log_with, folder: recorder)
    trainer = make(log_with="tensorboard")
    (folder,) = (tmp_path / "runs").glob("ppo_trainer-*")
    assert (folder / "config.json").is_file()
    stats = trainer.step(QUERIES, RESPONSES, SCORES)
    trainer.log_stats(stats, {"query": list("abcd"), "response": list("efgh")}, [torch.tensor(s) for s in SCORES])
    (step, figures), (_, name, rows) = recorder.told
    assert step == 1 and figures["objective/kl_coef"] == 0.2 and figures["mean_score"] == pytest.approx(0.6875)
    assert figures["env/reward_mean"] == pytest.approx(0.6875) and "objective/kl_dist" not in figures
    assert name == "game_log" and rows[1] == {"query": "b", "response": "f", "reward": -0.5}


def test_without_a_tracker_nothing_is_written(make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    trainer = make()
    trainer.log_stats(trainer.step(QUERIES, RESPONSES, SCORES), {}, SCORES)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="log-with"):
        make(log_with="comet")


def test_tensorboard_has_the_stats(make, monkeypatch, tmp_path):
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    trainer = make(log_with="tensorboard")
    trainer.log_stats(trainer.step(QUERIES, RESPONSES, SCORES), {"query": list("abcd")}, SCORES)
    trainer.tracker.close()
    content = b"".join(path.read_bytes() for path in tmp_path.glob("runs/*/tensorboard/*"))
    assert b"objective/kl" in content and b"ppo/loss/total" in content and b"game_log" in content


# --- the value head's bias, and imports ---


def test_a_head_with_a_bias_adds_it_and_one_without_has_none():
    hidden = np.array([[1.0, 2.0], [3.0, -1.0]], dtype=np.float32)
    head = ValueHead(2, bias=True)
    head.update({"weight": mx.array([[0.5, 1.0]]), "bias": mx.array([0.25])})
    assert head(mx.array(hidden)).tolist() == [2.75, 0.75]
    twin = TorchValueHead(2, bias=True)
    assert not any(weight.any() for weight in twin.parameters())  # it starts at 0
    twin.load_state_dict({"weight": torch.tensor([[0.5, 1.0]]), "bias": torch.tensor([0.25])})
    assert twin(torch.tensor(hidden)).tolist() == [2.75, 0.75]
    assert list(ValueHead(2).parameters()) == ["weight"] and list(TorchValueHead(2).state_dict()) == ["weight"]


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import training", {"mlx", "torch", "numpy"}),
        ("from training import PPOConfig, LengthSampler", {"mlx", "torch"}),
        ("import training.torch_trainer", {"mlx", "mlx_lm"}),
    ],
    ids=["training", "config", "torch"],
)
def test_what_is_imported_brings_no_more_than_it_needs(program, absent):
    code = f"{program}\nimport sys\nprint(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_other_names_of_the_package_are_not_there():
    import training

    with pytest.raises(AttributeError, match="PPOv2Trainer"):
        training.PPOv2Trainer  # noqa: B018
