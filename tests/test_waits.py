"""How often a run waits for its device: once a mini batch, and while sampling only with the next pass at work.

On a GPU each wait leaves it without work until Python has built the next. What is counted is what makes mlx wait: a
number, a list or NumPy's array of an array that has not been computed, and `mx.eval`. On a simulated GPU, since parts
of a step run in NumPy on CPU.
"""

import io

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from data.digits import DigitRule, digit_prompts
from models.adapters import AdapterConfig
from models.generation import sample
from models.loading import load
from tests.architectures import build
from training import ppo_step
from training.advantages import advantages_and_returns
from training.ppo_learner import PPOLearner, build_policies, make_ppo_optimizer
from training.settings import PPOSettings, SFTSettings
from training.sft_loop import SFTProgress, build_trainee, make_objective, make_sft_optimizer, read_rows, sft_steps

READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__")


def has_graph(array):
    """Whether an array has not even been given to the device."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return "label" in graph.getvalue()


class Waits:
    """The waits of a process: what was waited for, and whether the device had more to do after that."""

    def __init__(self, monkeypatch):
        self.found: list[tuple[str, bool]] = []
        self.begun: list[list[mx.array]] = []  # by async_eval, in order, and not known to have ended
        for name in READS:
            monkeypatch.setattr(mx.array, name, self.reading(name, getattr(mx.array, name)))
        for name in ("array", "asarray"):
            monkeypatch.setattr(np, name, self.reading(name, getattr(np, name)))
        monkeypatch.setattr(mx, "eval", self.evaluating(mx.eval))
        monkeypatch.setattr(mx, "async_eval", self.beginning(mx.async_eval))

    def reading(self, name, original):
        def read(array, *args, **kwargs):
            if isinstance(array, mx.array):
                self.wait_for(name, array)
            return original(array, *args, **kwargs)

        return read

    def wait_for(self, name, array):
        at = next((i for i, arrays in enumerate(self.begun) if any(array is other for other in arrays)), None)
        if has_graph(array):
            self.found.append((name, False))
            self.begun.clear()
        elif at is not None:
            del self.begun[: at + 1]
            self.found.append((name, bool(self.begun)))

    def evaluating(self, original):
        def evaluate(*trees):
            self.found.append(("eval", False))
            self.begun.clear()
            original(*trees)

        return evaluate

    def beginning(self, original):
        def begin(*trees):
            self.begun.append([array for _, array in tree_flatten(trees) if isinstance(array, mx.array)])
            original(*trees)

        return begin

    def idle(self):
        """Those after which the device had nothing to do."""
        return [name for name, busy in self.found if not busy]


@pytest.fixture
def waits(monkeypatch):
    monkeypatch.setenv("TUNER_SIMULATE_GPU", "1")
    return Waits(monkeypatch)


READINGS = {
    "item": lambda x: x.item(),
    "tolist": lambda x: x.tolist(),
    "float": float,
    "int": int,
    "bool": bool,
    "index": lambda x: "abcd"[x],
    "asarray": lambda x: np.asarray(x),
    "array": lambda x: np.array(x),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_what_waits_is_counted(waits, read):
    known = mx.array(1)
    read(known)
    assert not waits.found
    fresh, begun, first, second = (known * factor for factor in (1, 1, 2, 3))
    read(fresh)
    read(fresh)  # it is known by now
    assert len(waits.found) == len(waits.idle()) == 1
    mx.async_eval(begun)
    read(begun)
    assert len(waits.found) == len(waits.idle()) == 2
    mx.async_eval(first)
    mx.async_eval(second)
    read(first)
    assert len(waits.found) == 3 and len(waits.idle()) == 2  # the second was at work
    mx.eval(known)
    assert waits.idle()[2:] == ["eval"]


def learner_and_rollout(folder, **changed):
    loaded = load(str(folder))
    settings = PPOSettings(batch_size=8, mini_batch_size=4, ppo_epochs=2, max_completion_length=6, **changed)
    policy, reference = build_policies(loaded, settings, AdapterConfig())
    learner = PPOLearner(policy.module, reference, loaded.tokenizer, make_ppo_optimizer(policy, settings), settings)
    learner.seed(0)
    prompts = [loaded.tokenizer.encode(prompt) for prompt in digit_prompts(DigitRule())[:8]]
    rollout, _ = learner.experience(prompts, learner.sample(prompts), np.arange(8, dtype=np.float32))
    return learner, rollout, advantages_and_returns(rollout, settings, 0.1)


@pytest.mark.parametrize(
    "changed", [{}, {"value_head_learning_rate": 1e-4}, {"optimizer": "muon", "learning_rate": 1e-3}], ids=str
)
def test_an_update_waits_once_a_mini_batch(tiny_folder, waits, changed):
    learner, rollout, estimates = learner_and_rollout(tiny_folder, max_grad_norm=1e-3, **changed)
    waits.found.clear()
    assert learner.update(0, rollout, *estimates, 0.1)["updates"] == 4
    assert waits.found == [("tolist", False)] * 4


def test_a_mini_batch_in_pieces_waits_for_each(tiny_folder, waits):
    """That is what pieces are for: only one's activations exist at a time."""
    learner, rollout, estimates = learner_and_rollout(tiny_folder, gradient_accumulation_steps=2)
    waits.found.clear()
    learner.update(0, rollout, *estimates, 0.1)
    assert waits.found == [("eval", False), ("tolist", False)] * 4


def test_an_sft_step_waits_once(tiny_folder, waits, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "2 4 6 8"}\n' * 8, encoding="utf-8")
    settings = SFTSettings(iters=6, batch_size=2, steps_per_report=100, steps_per_eval=100)
    loaded = load(str(tiny_folder))
    trainee = build_trainee(loaded, settings, AdapterConfig())
    training = make_objective(trainee, loaded.tokenizer, settings)
    read_rows(training, rows, trainee.model)
    optimizer = make_sft_optimizer(trainee, settings)
    steps = sft_steps(trainee.module, optimizer, training, training, settings, SFTProgress())
    for _ in range(5):
        waits.found.clear()
        next(steps)
        assert waits.found == [("tolist", False)]


@pytest.mark.parametrize("prompts", [[[1, 2, 3]] * 16, [[1, 2, 3], [4, 5]] * 8], ids=["of one length", "ragged"])
def test_sampling_has_the_next_pass_at_work_when_it_reads_a_token(waits, prompts):
    """Rows leave, too, which waits for nothing."""
    model = build("llama-tied")
    mx.random.seed(0)
    waits.found.clear()
    completions = sample(model, prompts, list(range(8)), 12)
    lengths = sorted(map(len, completions))
    assert lengths[0] < lengths[-1]
    assert waits.idle() == ["eval"] + ["asarray"] * (lengths[-1] == 12)  # the prompts; and the last token of all
    assert waits.found.count(("asarray", True)) == lengths[-1] - (lengths[-1] == 12)


def test_rejected_updates_are_known_by_the_same_read(tiny_folder, waits, monkeypatch):
    learner, rollout, estimates = learner_and_rollout(tiny_folder)
    monkeypatch.setattr(ppo_step, "rejected", lambda settings, stats: "skip")
    waits.found.clear()
    assert learner.update(0, rollout, *estimates, 0.1)["skipped_updates"] == 4
    assert waits.found == [("tolist", False)] * 4
