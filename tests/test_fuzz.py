"""The fuzzer: it takes what is right, finds what is wrong, and gives the same inputs again; some of every reader here.

A million: python -m benchmarks.fuzz --inputs 1000000
"""

import itertools
import json
import random

import pytest

from benchmarks.mutations import LONG, LONGEST, Mutator
from common.errors import UserError

pytest.importorskip("hypothesis", reason="hypothesis, which is optional, is not installed")

from benchmarks import fuzz


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return fuzz.readers(tmp_path_factory.mktemp("fuzz"))


def inputs(examples, count, seed=0):
    mutator = Mutator(random.Random(seed), examples)
    return [mutator.next() for _ in range(count)]


def test_inputs_depend_on_the_seed_alone_and_are_damaged_in_many_ways():
    examples = ['{"step": 3, "best": {"value": [0.5]}}', b"\x10\0\0\0{}", {"choices": [{"a": 1}]}]
    found = inputs(examples, 2000)
    again, another = (list(map(repr, inputs(examples, 2000, seed))) for seed in (0, 1))
    assert list(map(repr, found)) == again != another
    assert {type(content) for content in found} >= {str, bytes, dict} and len(set(map(repr, found))) > 1000
    assert examples[2] == {"choices": [{"a": 1}]}
    texts = [content for content in found if isinstance(content, str)]
    assert any(text.startswith('{"step"') and '"best"' not in text for text in texts)
    assert any("NaN" in text for text in texts) and any("[[[[[[[" in text for text in texts)


def test_some_inputs_are_long():
    found = inputs(["ab"], LONG)
    assert len(found[-1]) >= LONGEST - 12 and max(map(len, found[:-1])) < LONGEST / 2


def test_what_comes_out_is_kept_but_for_a_user_s_mistake():
    raised = itertools.cycle([UserError("a"), UserError("a"), None, KeyError("b")])

    def read(content):
        error = next(raised)
        if error:
            raise error

    found = fuzz.Found()
    for number in range(400):
        found.give(fuzz.Reader(read, ["x"]), number)
    assert (found.inputs, found.refused, len(found.broken)) == (400, 200, fuzz.KEPT)
    assert found.broken[0].startswith("KeyError: 'b' (test_fuzz.py:") and found.broken[0].endswith(": 3")
    assert "| reader | 400 | 50% |" in fuzz.table({"reader": found})


def test_every_reader_takes_what_is_right(readers):
    for name, reader in readers.items():
        if name != "a data set's description":  # whose data are not there
            reader.read(reader.examples[0])


def test_of_some_inputs_no_reader_breaks(readers):
    """In five seconds; of a million: docs/robustness.md."""
    for name, reader in readers.items():
        mutator, found = Mutator(random.Random(name), reader.examples), fuzz.Found()
        for _ in range(300):
            found.give(reader, mutator.next())
        assert found.broken == [], name


def test_a_block_has_its_size_and_some_inputs_by_hypothesis(monkeypatch):
    monkeypatch.setattr(fuzz, "BLOCK", 100)
    given: list[str] = []
    found = fuzz.Found()
    fuzz.fuzz_block("a", fuzz.Reader(given.append, ["x" * 50]), 0, found)
    assert found.inputs == len(given) == 100 and sum("xxxx" in content for content in given) > 30
    assert json.dumps(given[: fuzz.BY_HYPOTHESIS])
