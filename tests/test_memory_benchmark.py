"""benchmarks/memory.py measures ways that do the same work."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks.memory import TYPES, WAYS, Cell, line, measure, scoring, sft, update

BUDGET = 5_000  # bytes: a row or two at a time


def cell(task, way, kind="float32"):
    return Cell(task, way, kind, rows=2, length=4, vocabulary=50, hidden=16, logits_bytes=BUDGET, repeats=1)


@pytest.mark.parametrize("task", [sft, scoring, update])
def test_pieces_and_whole_logits_give_the_same(task):
    results = []
    for way in ("pieces", "whole"):
        mx.random.seed(0)
        results.append(tree_flatten(task(cell(task.__name__, way))()))
    for (name, got), (_, expected) in zip(*results, strict=True):
        np.testing.assert_allclose(np.array(got), np.array(expected), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("task", "way"), [(task, way) for task, ways in WAYS.items() for way in ways])
def test_every_cell_runs(task, way, kind):
    figures = measure(cell(task, way, kind))
    assert figures["peak"] > figures["held"] > 0 and figures["seconds"] > 0


def test_a_line_of_the_table():
    figures = {"peak": 800.0, "held": 160e6, "seconds": 0.4}
    assert line(cell("sft", "pieces"), figures) == "| sft | float32 | pieces | 2 × 4 | 0.000 | 0.500 | 0.160 | 50.00 |"
