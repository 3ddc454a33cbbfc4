"""The update: schedules, Adam as PyTorch has it, clipping, the guard against NaN, saving and restoring."""

import io
import math
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_map

from common.errors import UserError
from models.cpu import adam
from training import optimizer as training_optimizer
from training.muon import muon_step
from training.optimizer import (
    gradient_norm,
    loss_and_gradients,
    make_optimizer,
    optimizer_arrays,
    restore_optimizer,
    scaled,
    update,
)
from training.schedules import SCHEDULES


class Net(nn.Module):
    """Two layers, the first of which may be frozen."""

    def __init__(self, seed=0, dropout=0.0):
        super().__init__()
        mx.random.seed(seed)
        self.first = nn.Linear(3, 4)
        self.drop = nn.Dropout(dropout)
        self.second = nn.Linear(4, 2)

    def __call__(self, x):
        return self.second(self.drop(mx.tanh(self.first(x))))


def square_loss(net, x, y):
    return mx.mean(mx.square(net(x) - y))


def data(seed):
    rng = np.random.default_rng(seed)
    return mx.array(rng.normal(size=(5, 3)), mx.float32), mx.array(rng.normal(size=(5, 2)), mx.float32)


def weights(net):
    return {name: np.array(array) for name, array in tree_flatten(net.parameters())}


def state_of(optimizer):
    return {name: np.array(array) for name, array in optimizer_arrays(optimizer).items()}


def same(a, b):
    """Bit for bit; NaN equals NaN."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def take_step(net, optimizer, seed, max_grad_norm=None):
    loss, gradients = nn.value_and_grad(net, square_loss)(net, *data(seed))
    return update(net, optimizer, loss, gradients, max_grad_norm)


# --- schedules ---


def rates(count, **settings):
    """The learning rate of each update, read off an update whose gradient is 1: Adam then moves by the rate."""
    net = nn.Linear(1, 1, bias=False)
    net.weight = mx.zeros((1, 1))
    optimizer = make_optimizer(**settings)
    optimizer.init(net.trainable_parameters())
    moved = []
    for _ in range(count):
        before = net.weight.item()
        update(net, optimizer, mx.array(1.0), {"weight": mx.ones((1, 1))}, None)
        moved.append(before - net.weight.item())
    return moved


def test_a_constant_rate_stays():
    np.testing.assert_allclose(rates(6, learning_rate=0.1, total_updates=3), [0.1] * 6, rtol=1e-4)


def test_a_linear_rate_falls_to_zero_at_the_end():
    expected = [0.1, 0.075, 0.05, 0.025, 0.0, 0.0]
    got = rates(6, learning_rate=0.1, total_updates=4, schedule="linear")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


def test_a_cosine_rate_falls_along_a_half_wave():
    expected = [0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    got = rates(5, learning_rate=0.1, total_updates=4, schedule="cosine")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_from_zero(schedule):
    got = rates(7, learning_rate=0.1, total_updates=20, schedule=schedule, warmup_updates=4)
    np.testing.assert_allclose(got[:5], [0.0, 0.025, 0.05, 0.075, 0.1], rtol=1e-4, atol=1e-7)
    if schedule in ("constant", "wsd"):
        np.testing.assert_allclose(got[5:], 0.1, rtol=1e-4)
    else:
        assert got[6] < got[5] <= 0.1 * (1 + 1e-4)


def test_wsd_holds_the_rate_until_the_last_fifth_of_all_updates():
    expected = [0.1] * 9 + [0.05, 0.0]
    np.testing.assert_allclose(rates(11, learning_rate=0.1, total_updates=10, schedule="wsd"), expected, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_with_a_warm_up_the_rate_still_ends_near_zero(schedule):
    got = rates(21, learning_rate=0.1, total_updates=20, schedule=schedule, warmup_updates=4)
    assert 0 <= got[20] < got[19] < 0.015


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_the_schedule_follows_the_plan_whatever_is_skipped(kind):
    """Of four planned updates the second and third are not made: the last still has the last rate, for every weight."""
    net, optimizer = Judged(), make_optimizer(0.1, 4, "linear", kind=kind, head_rate=0.02)
    optimizer.init(net.trainable_parameters())
    rates = []
    for planned in (0, 3, 4):
        update(net, optimizer, mx.array(1.0), judged_gradients(planned), None, planned)
        rates.append([part.learning_rate.item() for part in optimizer.optimizers])
    np.testing.assert_allclose(rates, [[0.1, 0.02], [0.025, 0.005], [0.0, 0.0]], atol=1e-8)
    assert [part.step.item() for part in optimizer.optimizers] == [3, 3]  # Adam corrects its bias by updates made


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="constant, linear, cosine"):
        make_optimizer(0.1, 10, schedule="step")


# --- Adam ---


@pytest.fixture(params=["by blocks", "by mlx"])
def way(request, monkeypatch):
    """Both ways to take a step: NumPy's, in blocks that end amid an array, and mlx's, as on a GPU."""
    monkeypatch.setattr(adam, "BLOCK", 5)
    if request.param == "by mlx":
        monkeypatch.setattr(adam, "serves", lambda *arrays: False)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_several_steps_equal_pytorch_s(weight_decay, way):
    net = Net()
    optimizer = make_optimizer(1e-2, 100, weight_decay=weight_decay)
    optimizer.init(net.trainable_parameters())
    twin = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in weights(net).items()}
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    theirs = kind(twin.values(), lr=1e-2, weight_decay=weight_decay)
    for seed in range(8):
        take_step(net, optimizer, seed)
        x, y = (torch.tensor(np.array(array)) for array in data(seed))
        theirs.zero_grad()
        hidden = torch.tanh(x @ twin["first.weight"].T + twin["first.bias"])
        ((hidden @ twin["second.weight"].T + twin["second.bias"] - y) ** 2).mean().backward()
        theirs.step()
        for name, value in weights(net).items():
            np.testing.assert_allclose(value, twin[name].detach().numpy(), rtol=0, atol=1e-5)


def operations(*arrays):
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count("shape=rectangle")


def matrix_steps(count, kind="adam"):
    """The weights of `count` matrices and their moments after three steps, and the operations of a fourth."""
    optimizer = make_optimizer(1e-2, 10, weight_decay=0.0, kind=kind)
    rng = np.random.default_rng(0)
    parameters = {f"w{i}": mx.array(rng.normal(size=(4, 3 + i)), mx.float32) for i in range(count)}
    gradients = {name: 0.1 * array for name, array in parameters.items()}
    optimizer.init(parameters)
    for _ in range(3):
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    arrays = [array for _, array in tree_flatten([parameters, optimizer.state])]
    after = tree_flatten([optimizer.apply_gradients(gradients, parameters), optimizer.state])
    return [np.array(array) for array in arrays], operations(*(array for _, array in after))


def test_on_a_gpu_a_step_is_two_operations_an_array(monkeypatch, compiling):
    """And not eighteen, each of which is launched for itself; one trace serves all matrices."""
    monkeypatch.setattr(adam, "serves", lambda *arrays: False)
    compiled, number = matrix_steps(5)
    assert number - matrix_steps(2)[1] == 3 * 2
    mx.disable_compile()
    plain, number = matrix_steps(5)
    assert number - matrix_steps(2)[1] == 3 * 18
    mx.enable_compile()
    for array, expected in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)


def test_on_a_gpu_muon_s_step_is_its_products_and_what_lies_between_them(compiling):
    compiled, number = matrix_steps(5, "muon")
    assert number - matrix_steps(2, "muon")[1] == 3 * 34  # 15 products, 5 transposes
    mx.disable_compile()
    plain, number = matrix_steps(5, "muon")
    assert number - matrix_steps(2, "muon")[1] == 3 * 85
    mx.enable_compile()
    for array, expected in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-6)


class Square(nn.Module):
    """Weights whose gradients are what a test says, by rows or by columns in memory."""

    def __init__(self):
        super().__init__()
        mx.random.seed(0)
        self.weight, self.bias = mx.random.normal((4, 3)), mx.random.normal((3,))


def gradients_of(seed, by_columns):
    rng = np.random.default_rng(seed)
    weight, bias = (mx.array(rng.normal(size=shape), mx.float32) for shape in ((4, 3), (3,)))
    weight = mx.contiguous(weight.T).T if by_columns else mx.contiguous(weight)
    mx.eval(weight)
    assert memoryview(weight).f_contiguous == by_columns
    return {"weight": weight, "bias": bias}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_mlx_s_adam_but_for_rounding_and_how_gradients_lie_changes_no_bit(weight_decay, way):
    nets, ours = [Square(), Square()], [make_optimizer(1e-2, 100, weight_decay=weight_decay) for _ in range(2)]
    theirs = optim.Adam(1e-2, bias_correction=True)
    if weight_decay:
        theirs = optim.AdamW(1e-2, weight_decay=weight_decay, bias_correction=True)
    mlx_net = Square()
    for net, optimizer in zip(nets, ours, strict=True):
        optimizer.init(net.trainable_parameters())
    for seed in range(6):
        for by_columns, (net, optimizer) in enumerate(zip(nets, ours, strict=True)):
            norm = update(net, optimizer, mx.array(1.0), gradients_of(seed, bool(by_columns)), 1.0)
        gradients = gradients_of(seed, False)
        assert norm == pytest.approx(float(gradient_norm(gradients)), rel=1e-6) and norm > 1
        shrunk = {name: gradient / (norm + 1e-6) for name, gradient in gradients.items()}
        theirs.update(mlx_net, shrunk)
    assert same(weights(nets[0]), weights(nets[1])) and same(state_of(ours[0]), state_of(ours[1]))
    for name, value in weights(mlx_net).items():
        np.testing.assert_allclose(weights(nets[0])[name], value, rtol=0, atol=1e-6)
    expected = {name: np.array(array) for name, array in tree_flatten(theirs.state)}
    assert state_of(ours[0]).keys() - {"learning_rate"} == expected.keys() - {"learning_rate"}
    for name in expected.keys() - {"learning_rate"}:
        np.testing.assert_allclose(state_of(ours[0])[name], expected[name], rtol=1e-5, atol=1e-9)


def taken(steps, **settings):
    """Weights and optimizer state after steps on scaled gradients."""
    net, optimizer = Square(), make_optimizer(1e-2, 100, "cosine", warmup_updates=2, **settings)
    optimizer.init(net.trainable_parameters())
    for seed in range(steps):
        optimizer.update(net, scaled(gradients_of(seed, by_columns=True), 0.3))
    return weights(net), state_of(optimizer)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("block", [1, 5, 100])
def test_both_ways_to_take_a_step_give_the_same_bits(block, weight_decay, monkeypatch):
    monkeypatch.setattr(adam, "serves", lambda *arrays: True)  # on a GPU, too
    taken_by_blocks = Mock(side_effect=adam.step)
    monkeypatch.setattr(adam, "step", taken_by_blocks)
    monkeypatch.setattr(adam, "BLOCK", block)
    ours = taken(6, weight_decay=weight_decay)
    assert taken_by_blocks.call_count == 12  # six steps of two arrays
    monkeypatch.setattr(adam, "serves", lambda *arrays: False)
    theirs = taken(6, weight_decay=weight_decay)
    assert taken_by_blocks.call_count == 12
    assert all(same(got, expected) for got, expected in zip(ours, theirs, strict=True))


def test_a_saved_state_does_not_move_with_later_steps():
    net, optimizer = Net(), make_optimizer(1e-2, 10)
    optimizer.init(net.trainable_parameters())
    for seed in range(2):
        take_step(net, optimizer, seed)
    arrays = optimizer_arrays(optimizer)
    saved = state_of(optimizer)
    take_step(net, optimizer, 2)
    assert same({name: np.array(array) for name, array in arrays.items()}, saved)
    assert not same(state_of(optimizer), saved)


def test_frozen_weights_stay():
    net = Net()
    net.first.freeze()
    optimizer = make_optimizer(0.1, 10)
    optimizer.init(net.trainable_parameters())
    before = weights(net)
    take_step(net, optimizer, 0)
    after = weights(net)
    assert all((before[name] == after[name]).all() == name.startswith("first") for name in before)


# --- clipping ---


class Record:
    """An optimizer that keeps the gradients it is given."""

    state: dict = {}  # noqa: RUF012
    schedule = None

    def update(self, module, gradients):
        self.gradients = gradients


def test_the_norm_is_over_all_gradients_together():
    assert float(gradient_norm({"a": mx.array([3.0]), "b": {"c": mx.array([[4.0]])}})) == 5.0
    # In float16 the square of 300 would overflow.
    assert float(gradient_norm({"a": mx.array([300.0, 400.0], mx.float16)})) == 500.0


@pytest.mark.parametrize(
    ("limit", "scale"), [(1.0, 1 / 5), (5.5, 1.0), (None, 1.0), (0, 1.0)]
)  # the gradient's norm is 5
def test_gradients_are_clipped_to_the_norm(limit, scale):
    recorder = Record()
    gradients = {"a": mx.array([3.0]), "b": {"c": mx.array([[-4.0]])}}
    assert update(nn.Module(), recorder, mx.array(0.0), gradients, limit) == 5.0
    assert recorder.gradients["a"].item() == pytest.approx(3 * scale, rel=1e-5)
    assert recorder.gradients["b"]["c"].item() == pytest.approx(-4 * scale, rel=1e-5)


# --- what is not finite ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient", "both"])
def test_a_loss_or_gradient_that_is_not_finite_touches_nothing(bad, where):
    net = Net()
    optimizer = make_optimizer(0.1, 10, schedule="linear", warmup_updates=2)
    optimizer.init(net.trainable_parameters())
    for seed in range(3):
        take_step(net, optimizer, seed)
    before, state = weights(net), state_of(optimizer)
    loss, gradients = nn.value_and_grad(net, square_loss)(net, *data(3))
    if where != "gradient":
        loss = mx.array(bad)
    if where != "loss":
        gradients["second"]["bias"] = mx.array([1.0, bad])
    assert math.isnan(update(net, optimizer, loss, gradients, 1.0))
    assert same(weights(net), before)
    assert same(state_of(optimizer), state)
    assert not math.isnan(take_step(net, optimizer, 4))
    assert not same(weights(net), before)


def test_finite_gradients_whose_norm_overflows_are_skipped():
    net = Net()
    optimizer = make_optimizer(0.1, 10)
    optimizer.init(net.trainable_parameters())
    before = weights(net)
    loss, gradients = nn.value_and_grad(net, square_loss)(net, *data(0))
    gradients["second"]["bias"] = mx.array([3e38, 3e38])
    assert math.isnan(update(net, optimizer, loss, gradients, None))
    assert same(weights(net), before)


# --- Muon, and a rate of its own for a value head ---


class Judged(nn.Module):
    """A matrix, a vector and a value head, all of which the loss moves."""

    def __init__(self):
        super().__init__()
        mx.random.seed(1)
        self.weight, self.bias = mx.random.normal((3, 4)), mx.random.normal((3,))
        self.value_head = nn.Linear(3, 1, bias=False)


def judged_gradients(seed):
    rng = np.random.default_rng(seed)
    weight, bias, head = (mx.array(rng.normal(size=shape), mx.float32) for shape in ((3, 4), (3,), (1, 3)))
    return {"weight": weight, "bias": bias, "value_head": {"weight": head}}


def judged_after(steps, **settings):
    """The weights before and after steps at the constant rate of 0.1, and the optimizer."""
    net, optimizer = Judged(), make_optimizer(0.1, 100, **settings)
    optimizer.init(net.trainable_parameters())
    before = weights(net)
    for seed in range(steps):
        norm = update(net, optimizer, mx.array(1.0), judged_gradients(seed), 0.5)
        assert norm > 0.5
    return before, weights(net), optimizer


def test_muon_steps_matrices_as_mlx_s_does_and_adam_the_rest():
    _, found, _ = judged_after(5, kind="muon")
    net, muon, adam = Judged(), optim.Muon(0.1, weight_decay=0.0), optim.Adam(1e-3, bias_correction=True)
    for seed in range(5):
        gradients = judged_gradients(seed)
        shrink = 0.5 / (float(gradient_norm(gradients)) + 1e-6)
        gradients = tree_map(lambda gradient, shrink=shrink: shrink * gradient, gradients)
        matrix = {"weight": gradients.pop("weight")}
        muon.update(net, matrix)
        adam.update(net, gradients)
    assert found.keys() == weights(net).keys() == {"weight", "bias", "value_head.weight"}
    for name, value in weights(net).items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6)


def test_muon_moves_every_direction_by_about_the_rate():
    before, after, _ = judged_after(1, kind="muon")
    sizes = np.linalg.svd(after["weight"] - before["weight"], compute_uv=False) / 0.1
    assert len(sizes) == 3 and np.all((sizes > 0.65) & (sizes < 1.25))
    gradient_sizes = np.linalg.svd(np.array(judged_gradients(0)["weight"]), compute_uv=False)
    assert gradient_sizes.max() / gradient_sizes.min() > 2  # which the step evens out


def test_a_matrix_transposed_takes_the_step_transposed_and_of_several_each_its_own():
    gradient, average = (mx.random.normal((2, 3, 5), key=mx.random.key(seed)) for seed in (0, 1))
    steps, averages = muon_step(gradient, average)
    np.testing.assert_allclose(averages, 0.95 * average + 0.05 * gradient, atol=1e-6)
    turned, _ = muon_step(gradient.swapaxes(1, 2), average.swapaxes(1, 2))
    np.testing.assert_allclose(turned.swapaxes(1, 2), steps, atol=1e-5)
    for index in range(2):
        np.testing.assert_allclose(muon_step(gradient[index], average[index])[0], steps[index], atol=1e-5)
    assert mx.array_equal(muon_step(mx.zeros((2, 3)), mx.zeros((2, 3)))[0], mx.zeros((2, 3)))


def test_muon_s_decay_shrinks_the_weights_beside_the_step():
    before, plain, _ = judged_after(1, kind="muon")
    _, decayed, _ = judged_after(1, kind="muon", weight_decay=0.2)
    np.testing.assert_allclose(decayed["weight"] - plain["weight"], -0.1 * 0.2 * before["weight"], atol=1e-6)
    assert np.abs(decayed["weight"] - plain["weight"]).max() > 1e-3


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_a_value_head_has_the_rate_that_it_is_given(kind):
    before, after, _ = judged_after(1, kind=kind, head_rate=0.02)
    moved = {name: np.abs(after[name] - before[name]) for name in before}
    np.testing.assert_allclose(moved["value_head.weight"], 0.02, rtol=1e-4)  # Adam's first step is the rate
    np.testing.assert_allclose(moved["bias"], 0.02 if kind == "muon" else 0.1, rtol=1e-4)
    if kind == "adam":
        np.testing.assert_allclose(moved["weight"], 0.1, rtol=1e-4)


@pytest.mark.parametrize(("kind", "rate", "expected"), [("adam", 0.1, 0.1), ("muon", 0.1, 1e-3), ("muon", 1e-4, 1e-4)])
def test_the_value_head_s_rate_where_none_is_given(kind, rate, expected):
    net, optimizer = Judged(), make_optimizer(rate, 100, kind=kind)
    optimizer.init(net.trainable_parameters())
    before = weights(net)
    update(net, optimizer, mx.array(1.0), judged_gradients(0), None)
    moved = np.abs(weights(net)["value_head.weight"] - before["value_head.weight"])
    np.testing.assert_allclose(moved, expected, rtol=2e-3)


def test_muon_leaves_all_untouched_where_a_gradient_is_not_finite():
    _, _, optimizer = judged_after(2, kind="muon")
    net, state = Judged(), state_of(optimizer)
    before, gradients = weights(net), judged_gradients(0)
    gradients["bias"] = mx.array([1.0, float("nan"), 1.0])
    assert math.isnan(update(net, optimizer, mx.array(1.0), gradients, 0.5))
    assert same(weights(net), before) and same(state_of(optimizer), state)


def test_an_unknown_optimizer_is_an_error():
    with pytest.raises(UserError, match="'sgd'; use one of adam, muon"):
        make_optimizer(0.1, 10, kind="sgd")


# --- saving and restoring ---


def continued(cut, total=6, **settings):
    """Weights and optimizer state after `total` steps, saved to a file and put back into fresh objects at `cut`."""
    net, optimizer = Net(dropout=0.3), make_optimizer(1e-2, total, "cosine", warmup_updates=2, **settings)
    optimizer.init(net.trainable_parameters())
    for step in range(total):
        if step == cut:
            yield net, optimizer
            saved_weights, saved_state = tree_flatten(net.parameters()), optimizer_arrays(optimizer)
            net, optimizer = Net(seed=9, dropout=0.3), make_optimizer(1e-2, total, "cosine", 2, **settings)
            net.load_weights(saved_weights)
            restore_optimizer(optimizer, net, saved_state)
        mx.random.seed(step)
        take_step(net, optimizer, step, 1.0)
    yield net, optimizer


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1}, {"kind": "muon"}, {"kind": "muon", "weight_decay": 0.1}]
)
def test_what_follows_a_restore_is_bit_for_bit_what_would_have_followed(settings):
    *_, (net, optimizer) = continued(cut=None, **settings)
    *_, (other_net, other_optimizer) = continued(cut=3, **settings)
    assert same(weights(net), weights(other_net))
    assert same(state_of(optimizer), state_of(other_optimizer))


def test_the_state_survives_a_file(tmp_path):
    net, optimizer = next(continued(cut=3))
    mx.save_safetensors(str(tmp_path / "o.safetensors"), optimizer_arrays(optimizer))
    fresh = make_optimizer(1e-2, 6, "cosine", warmup_updates=2)
    restore_optimizer(fresh, net, mx.load(str(tmp_path / "o.safetensors")))
    assert same(state_of(fresh), state_of(optimizer))
    assert fresh.step.item() == 3


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_state_that_does_not_fit_is_refused(change):
    net, optimizer = next(continued(cut=3))
    arrays = optimizer_arrays(optimizer)
    if change == "missing":
        arrays.pop("first.bias.m")
    elif change == "unknown":
        arrays["third.bias.m"] = mx.zeros(2)
    else:
        arrays["first.bias.m"] = mx.zeros(5)
    with pytest.raises(UserError, match="does not fit"):
        restore_optimizer(make_optimizer(1e-2, 6), net, arrays)


# --- compiled ---


def test_the_compiled_path_gives_the_same_and_follows_the_weights(monkeypatch, compiling):
    net = Net()
    optimizer = make_optimizer(0.1, 10)
    optimizer.init(net.trainable_parameters())
    monkeypatch.setattr(training_optimizer, "compiling_pays", lambda: False)
    plain = loss_and_gradients(net, square_loss)
    monkeypatch.setattr(training_optimizer, "compiling_pays", lambda: True)
    compiled = loss_and_gradients(net, square_loss)
    assert type(compiled) is not type(plain)
    for seed in range(3):
        (loss, gradients), (other_loss, other_gradients) = plain(*data(seed)), compiled(*data(seed))
        assert loss.item() == pytest.approx(other_loss.item(), abs=1e-6)
        for (name, gradient), (_, other) in zip(tree_flatten(gradients), tree_flatten(other_gradients), strict=True):
            np.testing.assert_allclose(np.array(gradient), np.array(other), atol=1e-6, err_msg=name)
        update(net, optimizer, loss, gradients, None)


def test_compiled_dropout_is_drawn_anew_and_from_the_seed(monkeypatch, compiling):
    net = Net(dropout=0.5)
    monkeypatch.setattr(training_optimizer, "compiling_pays", lambda: True)
    compiled = loss_and_gradients(net, square_loss)

    def losses(seed):
        mx.random.seed(seed)
        return [compiled(*data(0))[0].item() for _ in range(4)]

    first = losses(1)
    assert len(set(first)) > 1
    assert losses(1) == first
    assert losses(2) != first
