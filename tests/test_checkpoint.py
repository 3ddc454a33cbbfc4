"""Checkpoints: whole or absent, the last two kept, restored strictly."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from common.errors import UserError
from models.adapters import AdapterConfig, attach_adapter, load_adapter
from models.loading import load
from models.value_head import Policy, ScoringModel, ValueHead, new_value_head
from training import checkpoint, checkpoint_folders
from training.checkpoint import Trainee, restore_checkpoint, save_checkpoint
from training.checkpoint_folders import last_checkpoint
from training.optimizer import make_optimizer, optimizer_arrays, update

PARTS = ["adapter/adapter_config.json", "adapter/adapters.safetensors", "optimizer.safetensors", "state.json"]


def new_model(seed=0):
    """Stands for a language model: checkpoints only ask it for its trainable weights."""
    mx.random.seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    model.layers[0].freeze()
    return model


def new_trainee(seed=0, kind=None):
    model = new_model(seed)
    config = AdapterConfig("full")
    if kind is None:
        return Trainee(model, config, model)
    head = ValueHead(3, std=1.0)
    return Trainee(model, config, kind(model, head), head)


def train(trainee, optimizer, steps=2):
    for step in range(steps):
        gradients = tree_map(lambda w, scale=step + 1: scale * mx.ones_like(w), trainee.module.trainable_parameters())
        update(trainee.module, optimizer, mx.array(1.0), gradients, None)


@pytest.fixture(params=[None, ScoringModel, Policy], ids=["language model", "reward model", "policy"])
def trained(request):
    """A trainee that has taken two steps, its optimizer, and the kind of its module."""
    trainee, optimizer = new_trainee(kind=request.param), make_optimizer(0.1, 10)
    optimizer.init(trainee.module.trainable_parameters())
    train(trainee, optimizer)
    return trainee, optimizer, request.param


def bytes_of(trainee, optimizer):
    arrays = {**dict(tree_flatten(trainee.module.parameters())), **optimizer_arrays(optimizer)}
    return {name: np.array(array).tobytes() for name, array in arrays.items()}


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def parts(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_brings_back_weights_optimizer_and_state_bit_for_bit(trained, tmp_path):
    trainee, optimizer, kind = trained
    state = {"kl_coef": 0.1 + 0.2, "moments": {"count": 3, "mean": 1 / 3, "squares": 2e-17}}
    folder = save_checkpoint(tmp_path, 7, trainee, optimizer, state)
    other, other_optimizer = new_trainee(seed=0, kind=kind), make_optimizer(0.1, 10)
    assert restore_checkpoint(folder, other, other_optimizer) == {"step": 7, **state}
    assert bytes_of(other, other_optimizer) == bytes_of(trainee, optimizer)
    train(trainee, optimizer)
    train(other, other_optimizer)
    assert bytes_of(other, other_optimizer) == bytes_of(trainee, optimizer)


def test_what_a_checkpoint_holds(trained, tmp_path):
    trainee, optimizer, kind = trained
    folder = save_checkpoint(tmp_path, 7, trainee, optimizer, {})
    heads = {None: [], Policy: ["value_head.safetensors"],
             ScoringModel: ["adapter/value_head.safetensors", "value_head.safetensors"]}  # fmt: skip
    assert parts(folder) == sorted(PARTS + heads[kind])
    assert folder == tmp_path / "checkpoints" / "000007" == last_checkpoint(tmp_path)


def test_the_adapter_in_a_checkpoint_is_an_adapter_like_any_other(tiny_folder, tmp_path):
    model = load(str(tiny_folder)).model
    adapter = AdapterConfig()
    attach_adapter(model, adapter, seed=3)
    head = new_value_head(model, std=1.0)
    trainee, optimizer = Trainee(model, adapter, ScoringModel(model, head), head), make_optimizer(0.1, 10)
    optimizer.init(trainee.module.trainable_parameters())
    train(trainee, optimizer)
    folder = save_checkpoint(tmp_path, 1, trainee, optimizer, {})
    again = load(str(tiny_folder)).model
    saved = load_adapter(again, folder / "adapter")
    assert saved.config == adapter
    assert saved.value_head is not None and mx.array_equal(saved.value_head.weight, head.weight)
    expected = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(array, expected[name]) for name, array in tree_flatten(again.parameters()))


def test_the_last_two_are_kept(trained, tmp_path):
    trainee, optimizer, _ = trained
    for step in (0, 5, 10, 15):
        save_checkpoint(tmp_path, step, trainee, optimizer, {})
    assert names(tmp_path) == ["000010", "000015"]
    assert last_checkpoint(tmp_path).name == "000015"


def test_steps_are_ordered_as_numbers(tmp_path):
    trainee, optimizer = new_trainee(), make_optimizer(0.1, 10)
    optimizer.init(trainee.module.trainable_parameters())
    for step in (999_998, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, trainee, optimizer, {})
    assert names(tmp_path) == ["1000000", "999999"]
    assert last_checkpoint(tmp_path).name == "1000000"


def test_the_same_step_again_replaces_its_checkpoint(trained, tmp_path):
    trainee, optimizer, _ = trained
    save_checkpoint(tmp_path, 5, trainee, optimizer, {"run": 1})
    folder = save_checkpoint(tmp_path, 5, trainee, optimizer, {"run": 2})
    assert names(tmp_path) == ["000005"]
    assert json.loads((folder / "state.json").read_text(encoding="utf-8")) == {"step": 5, "run": 2}


@pytest.mark.parametrize("writer", ["save_adapter", "save_value_head", "optimizer_arrays", "write_json"])
@pytest.mark.parametrize("half_written", [False, True])
def test_a_stop_in_any_writer_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch, writer, half_written):
    trainee, optimizer = new_trainee(kind=Policy), make_optimizer(0.1, 10)
    optimizer.init(trainee.module.trainable_parameters())
    save_checkpoint(tmp_path, 5, trainee, optimizer, {})
    before = bytes_of(trainee, optimizer)
    train(trainee, optimizer)
    module = checkpoint if hasattr(checkpoint, writer) else checkpoint_folders
    real = getattr(module, writer)

    def stopped(*args, **kwargs):
        if half_written:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, writer, stopped)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 10, trainee, optimizer, {})
    monkeypatch.undo()
    assert names(tmp_path) == ["000005"]
    other, other_optimizer = new_trainee(kind=Policy), make_optimizer(0.1, 10)
    assert restore_checkpoint(last_checkpoint(tmp_path), other, other_optimizer)["step"] == 5
    assert bytes_of(other, other_optimizer) == before


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path):
    trainee, optimizer = new_trainee(), make_optimizer(0.1, 10)
    optimizer.init(trainee.module.trainable_parameters())
    save_checkpoint(tmp_path, 5, trainee, optimizer, {})
    # Without its state a folder is not whole; under its temporary name it is none at all.
    (tmp_path / "checkpoints" / "000010" / "adapter").mkdir(parents=True)
    shutil.copytree(tmp_path / "checkpoints" / "000005", tmp_path / "checkpoints" / ".000015.123.tmp")
    assert last_checkpoint(tmp_path).name == "000005"


def test_a_run_without_a_checkpoint_is_told_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        last_checkpoint(tmp_path)


@pytest.mark.parametrize("fault", ["shape", "missing", "optimizer", "head"])
def test_restoring_is_strict(tmp_path, fault):
    trainee, optimizer = new_trainee(kind=Policy), make_optimizer(0.1, 10)
    optimizer.init(trainee.module.trainable_parameters())
    folder = save_checkpoint(tmp_path, 5, trainee, optimizer, {})
    other, other_optimizer = new_trainee(kind=Policy), make_optimizer(0.1, 10)
    if fault == "shape":
        other.model.layers[1] = nn.Linear(3, 4)
    elif fault == "missing":
        other.model.layers[0].unfreeze()
    elif fault == "optimizer":
        mx.save_safetensors(str(folder / "optimizer.safetensors"), {"step": mx.array(1)})
    else:
        (folder / "value_head.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        restore_checkpoint(folder, other, other_optimizer)
    assert "\n" not in str(caught.value)
    if fault == "missing":
        assert "layers.0.weight" in str(caught.value) and "layers.0.bias" in str(caught.value)


def test_sizes_count_weights():
    assert new_trainee().sizes() == (12, 21)
    assert new_trainee(kind=Policy).sizes() == (15, 24)


def test_only_a_reward_model_s_head_belongs_to_the_product():
    assert new_trainee(kind=Policy).reward_head is None
    scoring = new_trainee(kind=ScoringModel)
    assert scoring.reward_head is scoring.value_head is not None
