"""Sampling in PyTorch as on a GPU: prompts read in passes, and a pass at work whenever a token is looked at."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import torch_generation, torch_token_stats
from models.torch_generation import draw, sample
from models.torch_loading import load
from tests.torch_models import random_llama

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16], [17]]
ENDS = [3, 9, 14, 21, 27]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(random_llama(tmp_path_factory.mktemp("torch")), torch.device("cpu")).model


def completions(model, temperature=0.0, seed=0):
    torch.manual_seed(seed)
    counts: list[int] = []
    return sample(model, PROMPTS, ENDS, 20, temperature, on_token=counts.append), counts


def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch_generation, "_passes_ahead", lambda device: 1)


@pytest.mark.parametrize(("temperature", "seed"), [(0, 0), (1, 0), (1, 1)])
def test_looking_ahead_changes_no_completion(model, monkeypatch, temperature, seed):
    expected, counts = completions(model, temperature, seed)
    assert sum(counts) == sum(map(len, expected)) and max(map(len, expected)) == len(counts)
    as_on_a_gpu(monkeypatch)
    assert completions(model, temperature, seed) == (expected, counts)


@pytest.mark.parametrize(("device", "count"), [("cpu", 0), ("cuda", 1), ("mps", 1)])
def test_a_gpu_has_the_next_pass_before_a_token_is_looked_at(device, count):
    assert torch_generation._passes_ahead(torch.device(device)) == count


class Scalars(TorchDispatchMode):
    """Counts the numbers that Python takes out of tensors: on a GPU, each waits for all that it was given."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [4, 15])
def test_every_token_is_read_once_and_with_the_next_pass_at_work(model, monkeypatch, length):
    as_on_a_gpu(monkeypatch)
    monkeypatch.delattr(torch, "multinomial")  # it waits, where no dispatch is seen
    order: list[str] = []

    class Noted(torch_generation._OnItsWay):
        def read(self):
            order.append("read")
            return super().read()

    monkeypatch.setattr(torch_generation, "_OnItsWay", Noted)
    hook = model.register_forward_pre_hook(lambda *_: order.append("pass"))
    with Scalars() as scalars:
        sample(model, PROMPTS, [99], length)  # an id that is never drawn
    hook.remove()
    assert order == ["pass", *["pass", "read"] * (length - 1), "read"]
    assert scalars.count <= 2  # of the prompts' pads, by transformers, however long the completions are


def test_an_event_is_waited_for_before_its_numbers_are_taken(monkeypatch):
    order: list[str] = []

    class Event:
        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

    monkeypatch.setitem(torch_generation.EVENTS, "cpu", Event)
    token = torch_generation._OnItsWay(torch.tensor([3, 1]))
    assert order == ["record"] and token.read() == [3, 1] and order == ["record", "synchronize"]


@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_those_of_multinomial(seed):
    logits = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    expected = torch.multinomial(torch.softmax(logits / 0.7, dim=-1), num_samples=1)[:, 0]
    torch.manual_seed(seed)
    assert torch.equal(draw(logits, 0.7), expected)


def test_a_pass_reads_no_more_tokens_than_memory_is_counted_for(model, monkeypatch):
    expected, _ = completions(model)
    shapes = []
    model.register_forward_pre_hook(lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    assert completions(model)[0] == expected and shapes[0] == (4, 9)
    shapes.clear()
    monkeypatch.setattr(torch_generation, "TOKENS_A_PASS", 16)
    assert completions(model)[0] == expected
    assert shapes[:3] == [(4, 4), (4, 4), (4, 1)]


def test_a_pass_has_no_attention_scores_beyond_the_largest_array(model, monkeypatch):
    expected, _ = completions(model)
    shapes = []
    model.register_forward_pre_hook(lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    # Four heads, nine keys: 4 rows of 2 queries make 4 · 4 · 2 · 9 scores of 4 bytes.
    monkeypatch.setitem(torch_token_stats.LARGEST_ARRAY, "cpu", 4 * (4 * 4 * 2 * 9))
    assert completions(model)[0] == expected
    assert shapes[:5] == [(4, 2)] * 4 + [(4, 1)]
