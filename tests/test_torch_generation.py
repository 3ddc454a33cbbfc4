"""Sampling in PyTorch as on a GPU: prompts read in passes, and few waits for which rows have ended."""

import pytest
import torch

from models import torch_generation
from models.torch_generation import sample
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


@pytest.mark.parametrize("waits", [3, 8, 50])
@pytest.mark.parametrize(("temperature", "seed"), [(0, 0), (1, 0), (1, 1)])
def test_how_often_it_waits_changes_no_completion(model, monkeypatch, waits, temperature, seed):
    expected, counts = completions(model, temperature, seed)
    assert sum(counts) == sum(map(len, expected)) and max(map(len, expected)) == len(counts)
    monkeypatch.setattr(torch_generation, "_tokens_between_waits", lambda device: waits)
    assert completions(model, temperature, seed) == (expected, counts)


@pytest.mark.parametrize(("device", "count"), [("cpu", 1), ("cuda", 8), ("mps", 8)])
def test_a_gpu_is_waited_for_every_few_tokens(device, count):
    assert torch_generation._tokens_between_waits(torch.device(device)) == count


def test_a_pass_reads_no_more_tokens_than_memory_is_counted_for(model, monkeypatch):
    expected, _ = completions(model)
    shapes = []
    model.register_forward_pre_hook(lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    assert completions(model)[0] == expected and shapes[0] == (4, 9)
    shapes.clear()
    monkeypatch.setattr(torch_generation, "TOKENS_A_PASS", 16)
    assert completions(model)[0] == expected
    assert shapes[:3] == [(4, 4), (4, 4), (4, 1)]
